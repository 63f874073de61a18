"""The tier that runs reward clients of other frameworks: ``make test-frameworks`` builds an environment for each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hf_models import tiny_hf
from hf_tokenizers import CHATML, save_hf
from reward_members import save_hf_reward
from server_process import ServerProcess
from tiny import TOKENIZER, tiny_config

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.data.messages import Message
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rollouts.types import Rollouts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT_SECONDS = 1200.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",  # else it writes a token into the home directory
    # a busy machine takes longer than Ray's 15 s to start its agents
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_raylet_start_wait_time_s": "300",
}
# (prompt, response, whether it ended by itself)
CHATS = [
    ("What is the question?", "The answer is the question.", True),
    ("Is it the answer?", "the the the", True),
    ("What is it?", "question, and then", False),
    ("Why?", "answer <think> the question </think>\n the", True),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(2 * LIMIT_SECONDS))
            name = item.path.stem.removeprefix("test_")
            if not os.environ.get(f"{name.upper()}_PYTHON"):  # here, so that no server is started for nothing
                reason = f"the environment of {name} is not there: run make test-frameworks"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def framework(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs functions of ``<framework>_jobs.py`` in one process of the framework's environment, whose imports are slow.

    The answer of each function that raised is None; its traceback is printed.
    """

    def run(name: str, **jobs: dict[str, Any]) -> dict[str, Any]:
        program = Path(os.environ[f"{name.upper()}_PYTHON"]).absolute()
        assert program.exists(), f"{name.upper()}_PYTHON={program} does not exist"
        directory = tmp_path_factory.mktemp(name)
        (directory / "jobs.json").write_text(json.dumps([f"{name}_jobs", jobs]))
        environment = {**os.environ, **ENVIRONMENT}
        command = [str(program), str(HERE / "framework_driver.py"), "jobs.json", "answers.json"]
        with (directory / "log").open("w") as log:
            # a session of its own: Ray leaves processes when its parent is killed
            process = subprocess.Popen(
                command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(LIMIT_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert status == 0, (directory / "log").read_text()[-5000:]
        answers, errors = json.loads((directory / "answers.json").read_text())
        print(*errors, sep="\n")
        return answers

    return run


@dataclass
class ServedChats:
    """A server of two reward models, the policy's tokenizer, and the rewards of ``CHATS`` computed in this process.

    Attributes:
        rewards: of the chats as they are.
        completed: of the chats as if all had ended, for clients that do not say so.
    """

    server: ServerProcess
    policy: Path
    rewards: list[float]
    completed: list[float]

    @property
    def chats(self) -> list[dict[str, Any]]:
        return [{"prompt": prompt, "response": text, "ended": ended} for prompt, text, ended in CHATS]


@pytest.fixture(scope="session")
def served(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedChats]:
    home = tmp_path_factory.mktemp("frameworks")
    policy = save_hf(home / "policy", template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tiny_hf("llama3", vocab_size=280, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(policy)
    hf = save_hf_reward(home / "hf", seed=1)
    source = save_hf_reward(home / "source", seed=2)
    convert(ConvertConfig(from_="hf", path=str(source), to="megatron", out=str(home / "megatron")))
    members = [f"hf:{hf}", str(home / "megatron")]
    loaded = load_members(tiny_config(), members, TOKENIZER)

    def rewards(ended: list[bool]) -> list[float]:
        rollouts = Rollouts(
            prompts=[(Message(role="user", content=prompt),) for prompt, _, _ in CHATS],
            responses=[response for _, response, _ in CHATS],
            ended=ended,
            prompt_tokens=[[]] * len(CHATS),
            response_tokens=[[]] * len(CHATS),
            prompt_index=[0] * len(CHATS),
            fingerprint="of the policy's tokenizer",
        )
        return UncertaintyReward(loaded).compute_rewards(rollouts).rewards_N.tolist()

    server = ServerProcess(home / "server", f"ensemble.members=[{','.join(members)}]")
    yield ServedChats(server, policy, rewards([ended for _, _, ended in CHATS]), rewards([True] * len(CHATS)))
    server.terminate()
