"""What the tests of the plug-in share: tiny models as .nemo files, servers of them, and scripts run to their end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ports import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES = ROOT / "examples" / "nemo_aligner"
START_SECONDS = 240.0
LIMIT_SECONDS = 600.0
TEXT = "the cat sat on a mat and dog ran to red big house with small blue tree good bad answer yes no why"
WORDS = TEXT.split()
VOCABULARY = 40
ROW = [5, 6, 7, 8, 9, 20]
PROMPTS = ["the cat", "why the red house", "a good answer", "no dog ran to", "big tree", "small mat with"]
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "encoder_seq_length": 64,
    "max_position_embeddings": 64,
    "make_vocab_size_divisible_by": 8,
    "activation": "fast-swiglu",
    "normalization": "rmsnorm",
    "bias": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "data": {"data_impl": "jsonl"},
}
# what NeMo-Aligner's scripts need on a CPU, see driver.ON_CPU
ON_CPU = (
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "++model.use_cpu_initialization=True",
    "++model.transformer_engine=False",
    "model.megatron_amp_O2=False",
    "~model.optim",
    "+model.optim={name: sgd, lr: 0.05}",
    "++model.overwrite_base_config.optim=True",
)


@dataclass
class Files:
    """A policy and two reward models as NeMo-Aligner wrote them, the latter also as checkpoints of this package."""

    actor: Path
    reward_models: list[Path]
    checkpoints: list[Path]
    prompts: Path
    log_probs: list[list[float]]


def write_files(aligner: Callable[..., list[Any]], home: Path, reward_models: int = 2) -> Files:
    import sentencepiece

    from nemo_advrm.config.schema import ConvertConfig
    from nemo_advrm.convert.conversion import convert

    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    (home / "corpus.txt").write_text("\n".join(text(12) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(home / "corpus.txt"),
        model_prefix=str(home / "tok"),
        vocab_size=VOCABULARY,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_id=0,
        num_threads=1,
        minloglevel=2,
    )
    section = {
        "library": "sentencepiece",
        "type": None,
        "model": str(home / "tok.model"),
        "sentencepiece_legacy": False,
    }
    model = {**MODEL, "tokenizer": {**section, "vocab_file": None, "merge_file": None}}
    write_pairs(home / "pairs.jsonl", [(f"good {text(4)}", f"bad {text(4)}") for _ in range(12)])
    # each of them twice: one epoch is long enough for every trainer
    (home / "prompts.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS * 2))
    actor, members = home / "actor.nemo", [home / f"rm_{k + 1}.nemo" for k in range(reward_models)]
    jobs: list[tuple[str, dict[str, Any]]] = [("create", {"model": model, "out": str(actor)})]
    for seed, path in enumerate(members, start=1):
        training = {"data": str(home / "pairs.jsonl"), "steps": 3, "texts": [], "seed": seed}
        jobs.append(("train_rm", {"base": str(actor), "out": str(path), **training}))
    jobs.append(("log_probs", {"path": str(actor), "rows": [ROW]}))
    answers = aligner(*jobs)
    checkpoints = []
    for path in members:
        out = path.with_suffix("")
        convert(ConvertConfig(from_="nemo", path=str(path), to="megatron", out=str(out)), report=lambda line: None)
        checkpoints.append(out)
    return Files(actor, members, checkpoints, home / "prompts.jsonl", answers[-1])


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    """NeMo-Aligner's preference data: a chosen line, then its rejected one."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for pair in pairs for text in pair))


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    own.pop("MASTER_PORT", None)
    own.pop("NEMO_ADVRM_TOKEN", None)
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{HERE}", **more}


def python() -> str:
    if not os.environ.get("ALIGNER_PYTHON"):
        pytest.skip("the environment of NeMo-Aligner is not there: run make test-aligner")
    return str(Path(os.environ["ALIGNER_PYTHON"]).absolute())


def run_script(
    script: Path, directory: Path, *overrides: str, processes: int = 1, fails: bool = False
) -> list[dict[str, Any]]:
    """Run a script to its end, or to its failure; the rollout batches that its trainer was given."""
    directory.mkdir(parents=True, exist_ok=True)
    command = command_of(script, directory, *overrides, processes=processes)
    batches = directory / "batches.jsonl"
    status = run_to_end(command, directory / "log", environment(ADVRM_BATCHES=str(batches)))
    assert (status != 0) == fails, (directory / "log").read_text()[-6000:]
    return [json.loads(line) for line in batches.read_text().splitlines()] if batches.exists() else []


def run_to_end(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a program in the directory of its log; its status. Nothing that it has started is left."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        return process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {LIMIT_SECONDS:g} s:\n{log.read_text()[-4000:]}") from None
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and what it has started: a launcher's processes have their own sessions."""
    started: list[psutil.Process] = []
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def command_of(script: Path, directory: Path, *overrides: str, processes: int = 1) -> list[str]:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    place = (f"trainer.devices={processes}", f"exp_manager.explicit_log_dir={directory / 'run'}")
    return [python(), *launcher, str(HERE / "run_script.py"), str(script), *ON_CPU, *place, *overrides]


@dataclass
class Critic:
    """A critic server of NeMo-Aligner; its checkpoints are in ``directory/run``."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]

    def values(self, tokens: list[list[int]]) -> list[list[float]]:
        """What the server answers now for rows of equal length."""
        width = len(tokens[0])
        inputs = [
            {"name": "tokens", "shape": [len(tokens), width], "datatype": "INT64", "data": tokens},
            {"name": "sequence_lengths", "shape": [len(tokens), 1], "datatype": "INT64", "data": [width] * len(tokens)},
        ]
        url = f"http://127.0.0.1:{self.port}/v2/models/critic_infer/infer"
        request = urllib.request.Request(url, json.dumps({"inputs": inputs}).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            outputs = json.loads(answer.read())["outputs"]
        (flat,) = (output["data"] for output in outputs if output["name"] == "values")
        return [flat[i : i + width] for i in range(0, len(flat), width)]


@contextlib.contextmanager
def critic(directory: Path, nemo: Path, *overrides: str, processes: int = 1) -> Iterator[Critic]:
    """NeMo-Aligner's critic server over real PyTriton, on the weights of a reward model."""
    directory.mkdir(parents=True)
    port = free_port()
    start = (f"pretrained_checkpoint.restore_from_path={nemo}", f"trainer.ppo.port={port}")
    command = command_of(HERE / "serve_critic.py", directory, *start, *overrides, processes=processes)
    models = [f"http://127.0.0.1:{port}/v2/models/critic_{name}/ready" for name in ("infer", "train", "save")]

    def ready() -> bool:
        try:
            return all(urllib.request.urlopen(url, timeout=5).status == 200 for url in models)
        except OSError:
            return False

    # PyTriton starts a Python of its own, which must find libpython where it is not a system's
    library = sysconfig.get_config_var("LIBDIR")
    with background(command, directory / "log", ready, LD_LIBRARY_PATH=library) as process:
        yield Critic(directory, port, process)


@contextlib.contextmanager
def serving(directory: Path, *settings: str) -> Iterator[str]:
    """``nemo-advrm serve``; its address HOST:PORT."""
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "nemo_advrm.cli", "serve", f"run_dir={directory}", "serve.port=0", *settings]
    announced = directory / "server.json"
    with background([*command, "trainer.accelerator=cpu"], directory / "log", announced.exists):
        yield json.loads(announced.read_text())["address"].removeprefix("http://")


@contextlib.contextmanager
def background(
    command: list[str], log: Path, ready: Callable[[], bool], **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves until the block ends."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment(**more), stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            failed = process.poll() is not None or time.monotonic() > deadline
            assert not failed, f"{command[:3]} did not start:\n{log.read_text()[-4000:]}"
            time.sleep(0.2)
        yield process
    finally:
        end(process)


def trained_sequences(batches: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of every response that was trained on, with its prompt."""
    return [
        row[:end]
        for batch in batches
        for row, end in zip(batch["response_tokens"], batch["response_lengths"], strict=True)
    ]
