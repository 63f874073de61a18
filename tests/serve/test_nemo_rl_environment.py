"""The NeMo-RL environment against a running server, with stubs for NeMo-RL's interface and Ray's decorator."""

from __future__ import annotations

import abc
import importlib
import runpy
import sys
import types
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch
import yaml
from conftest import Served

EXAMPLES = Path(__file__).parents[2] / "examples" / "nemo_rl"
MetadataT = TypeVar("MetadataT")


class EnvironmentReturn(NamedTuple, Generic[MetadataT]):
    """The fields of nemo_rl/environments/interfaces.py at commit 7ea279a."""

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list[Any] | None


class EnvironmentInterface(abc.ABC, Generic[MetadataT]):
    @abc.abstractmethod
    def step(self, message_log_batch: Any, metadata: Any) -> Any: ...

    @abc.abstractmethod
    def global_post_process_and_metrics(self, batch: Any) -> Any: ...


def _stub(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    _stub(monkeypatch, "ray", remote=lambda cls: cls)
    _stub(monkeypatch, "nemo_rl")
    _stub(monkeypatch, "nemo_rl.environments")
    interfaces = {"EnvironmentInterface": EnvironmentInterface, "EnvironmentReturn": EnvironmentReturn}
    _stub(monkeypatch, "nemo_rl.environments.interfaces", **interfaces)
    name = "nemo_advrm.integrations.nemo_rl.environment"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).AdvRMEnvironment
    sys.modules.pop(name, None)


def test_a_step_gives_the_rewards_of_this_process(served: Served, environment: Any) -> None:
    # NeMo-RL's logs: the rendered prompt, then the response without its end token
    texts = [text.removesuffix(" <eos>").partition("<sep> ") for text in served.texts()]
    logs = [
        [{"role": "user", "content": prompt + sep}, {"role": "assistant", "content": response}]
        for prompt, sep, response in texts
    ]
    env = environment({"server": served.server.address})
    result = env.step(logs, [{"i": i} for i in range(4)])
    assert result.rewards.tolist() == pytest.approx(served.expected, abs=1e-4)
    assert result.terminateds.tolist() == [True] * 4 and result.metadata[3] == {"i": 3}
    assert result.answers == [response for _, _, response in texts] and len(result.observations) == 4

    batch = {"total_reward": result.rewards}
    same, metrics = env.global_post_process_and_metrics(batch)
    assert same is batch and metrics["advrm/reward"] == pytest.approx(sum(served.expected) / 4, abs=1e-4)
    assert env.global_post_process_and_metrics({}) == ({}, {})


def test_the_example_registers_the_environment_that_its_configuration_names(
    monkeypatch: pytest.MonkeyPatch, environment: Any
) -> None:
    registered, registry = {}, {}
    _stub(monkeypatch, "nemo_rl.distributed")
    executables = types.SimpleNamespace(SYSTEM="python")
    _stub(monkeypatch, "nemo_rl.distributed.virtual_cluster", PY_EXECUTABLES=executables)
    name = "nemo_rl.distributed.ray_actor_environment_registry"
    _stub(monkeypatch, name, ACTOR_ENVIRONMENT_REGISTRY=registry)
    _stub(monkeypatch, "nemo_rl.environments.utils", register_env=registered.__setitem__)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    runpy.run_path(str(EXAMPLES / "run_grpo.py"))["register"]()

    config = yaml.safe_load((EXAMPLES / "grpo_advrm.yaml").read_text())
    module, _, cls = registered[config["data"]["default"]["env_name"]].rpartition(".")
    assert getattr(importlib.import_module(module), cls) is environment
    assert registry == {f"{module}.{cls}": "python"} and list(config["env"]) == list(registered)
