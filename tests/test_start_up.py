"""Which heavy packages each light command imports: a start-up of seconds is noticed by nobody but the user."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import tiny_hf
from hf_tokenizers import CHATML, save_hf

pytestmark = pytest.mark.long

FILES = Path(__file__).resolve().parent / "old_files"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# packages, and parts of torch, that take a tenth of a second or more to import
HEAVY = _names(
    """accelerate datasets fastapi google httpx huggingface_hub hydra jinja2 lightning matplotlib megatron nemo
    networkx numpy omegaconf pandas PIL psutil pyarrow pydantic pytorch_lightning requests rich safetensors scipy
    sentencepiece sklearn sympy tensorboard tokenizers torch torchmetrics transformer_engine transformers uvicorn wandb
    scipy.stats torch._dynamo torch._inductor torch.distributed.checkpoint torch.distributed.tensor"""
)
CONFIGURATION = frozenset({"hydra", "omegaconf"})
TORCH = frozenset({"torch", "numpy"})
ROWS = frozenset({"pydantic", "safetensors"})  # of runs: their validation, and hidden states
# what transformers, which decides for itself, imports with a model, and torch with distributed checkpoints
WITH_TRANSFORMERS = _names(
    """accelerate google huggingface_hub jinja2 networkx PIL psutil pydantic requests safetensors scipy sentencepiece
    sklearn sympy tokenizers torch torch._dynamo torch._inductor torch.distributed.checkpoint torch.distributed.tensor
    transformers numpy scipy.stats httpx rich"""
)
WITH_CHECKPOINTS = _names(
    """networkx sympy jinja2 torch._dynamo torch._inductor torch.distributed.checkpoint torch.distributed.tensor
    psutil rich"""
)
# with the inference contexts that Megatron-Core imports come wandb, pydantic and google, with its timers tensorboard
WITH_MEGATRON = WITH_CHECKPOINTS | _names("megatron wandb pydantic google tensorboard pandas PIL requests")

# runs a command, then reports which packages are loaded
PROGRAM = """
import json, sys, threading, types
from http.server import BaseHTTPRequestHandler, HTTPServer
from nemo_advrm import cli

class Server(BaseHTTPRequestHandler):  # a server of nemo-advrm serve, as a client sees it
    def do_GET(self):
        self.answer({"tokenizer": None})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.answer({"scores": [float(len(row["response"])) for row in body["samples"]]})
    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *_):
        pass

words = sys.argv[2:]
if any("PORT" in word for word in words):
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [word.replace("PORT", str(server.server_port)) for word in words]
if words[0] == "serve":  # all but the loop that waits for requests
    from nemo_advrm.serve import server
    server._Server.run = lambda self, sockets: None
status = cli.main(words)
loaded = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
print("\\nLOADED " + json.dumps(loaded))
sys.exit(status)
"""


def loaded(*words: str, status: int = 0) -> set[str]:
    """The packages of HEAVY that a command imports."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(sorted(HEAVY)), *words],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == status, run.stdout + run.stderr
    return set(json.loads(run.stdout.rpartition("LOADED ")[2]))


@pytest.fixture(scope="module")
def hf_member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face reward model with its tokenizer."""
    directory = tmp_path_factory.mktemp("hf")
    tiny_hf("llama3", reward=True, vocab_size=280).save_pretrained(directory)
    template = CHATML.replace("{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}", "")
    return save_hf(directory, template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q {i}?", "chosen": f"the answer {i}", "rejected": f"is {i}"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FILES / "run", tmp_path / "run"))


def test_help_imports_no_heavy_package() -> None:
    assert not loaded("--help")
    assert loaded("evaluate", "--help") <= CONFIGURATION


def test_doctor_imports_torch_alone(tmp_path: Path) -> None:
    assert loaded("doctor") <= CONFIGURATION | TORCH | {"rich"}


def test_evaluate_of_a_hugging_face_member_imports_no_megatron(hf_member: Path, pairs: Path, tmp_path: Path) -> None:
    words = [f"ensemble.members=[hf:{hf_member}]", f"data.validation_path={pairs}", "trainer.accelerator=cpu"]
    found = loaded("evaluate", f"run_dir={tmp_path / 'e'}", *words)
    assert found <= CONFIGURATION | WITH_TRANSFORMERS and "transformers" in found


def test_evaluate_of_a_server_imports_neither_megatron_nor_transformers(pairs: Path, tmp_path: Path) -> None:
    words = ["ensemble.members=[http://127.0.0.1:PORT]", f"data.validation_path={pairs}", "trainer.accelerator=cpu"]
    found = loaded("evaluate", f"run_dir={tmp_path / 'e'}", *words)
    # httpx imports rich for a command line of its own
    assert found <= CONFIGURATION | TORCH | ROWS | {"httpx", "psutil", "rich"}


def test_evaluate_of_a_megatron_member_imports_no_training_frame(pairs: Path, tmp_path: Path) -> None:
    words = [f"ensemble.members=[{FILES / 'checkpoint'}]", f"data.validation_path={pairs}", "trainer.accelerator=cpu"]
    found = loaded("evaluate", f"run_dir={tmp_path / 'e'}", *words)
    assert found <= CONFIGURATION | TORCH | ROWS | WITH_MEGATRON | {"httpx"}
    assert not found & {"nemo", "lightning", "pytorch_lightning", "transformers", "datasets"}


def test_serve_imports_what_its_members_need(tmp_path: Path) -> None:
    words = ["ensemble.members=[http://127.0.0.1:PORT]", "serve.port=0", "trainer.accelerator=cpu"]
    found = loaded("serve", f"run_dir={tmp_path / 's'}", *words)
    server = {"fastapi", "uvicorn", "httpx", "psutil", "rich", "jinja2"}
    assert found <= CONFIGURATION | TORCH | ROWS | server and "uvicorn" in found


def test_select_imports_no_megatron(old_run: Path) -> None:
    words = ["selection.threshold_z=-99", "selection.require_ended=false", "model=tiny"]
    found = loaded("select", f"run_dir={old_run}", *words)
    assert found <= CONFIGURATION | TORCH | ROWS | {"psutil"}


def test_report_imports_what_it_draws_and_fits_with(old_run: Path) -> None:
    (old_run / "state.json").write_text('{"stages": {}}')
    found = loaded("report", f"run_dir={old_run}")
    drawing = {"matplotlib", "PIL", "jinja2", "rich", "scipy"}
    assert found <= CONFIGURATION | TORCH | ROWS | drawing | {"psutil"} and "matplotlib" in found


def test_export_pairs_imports_no_torch(old_run: Path, tmp_path: Path) -> None:
    words = [f"pairs={old_run / 'pairs.jsonl'}", f"out={tmp_path / 'out.jsonl'}", "template=transcript"]
    assert loaded("export_pairs", *words) <= CONFIGURATION | {"pydantic"}


def test_convert_imports_no_megatron(hf_member: Path, tmp_path: Path) -> None:
    to_megatron = loaded("convert", "from=hf", f"path={hf_member}", "to=megatron", f"out={tmp_path / 'megatron'}")
    assert to_megatron <= CONFIGURATION | WITH_TRANSFORMERS
    words = ["from=megatron", f"path={tmp_path / 'megatron'}", "to=nemo", f"out={tmp_path / 'rm.nemo'}"]
    to_nemo = loaded("convert", *words, f"tokenizer={hf_member}")
    assert to_nemo <= CONFIGURATION | WITH_TRANSFORMERS


def test_plan_imports_megatron_only_to_build_the_models() -> None:
    small = ["model=tiny", "plan.gpus=2"]
    assert loaded("plan", *small, "plan.search=true") <= CONFIGURATION | TORCH
    built = loaded("plan", *small, "trainer.devices=2")
    assert built <= CONFIGURATION | TORCH | WITH_MEGATRON
    assert not built & {"nemo", "lightning", "pytorch_lightning", "transformers", "datasets"}
