"""Every parallel layout computes what a single process computes: one test body each, parametrised over layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import parity_jobs
import pytest
import torch
from distributed import Worlds
from tiny import ARCHITECTURES, TOKENIZER, tiny_config

from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass(frozen=True)
class Place:
    """A layout, the number of processes, the model keys that belong to it, and what is compared there."""

    layout: Layout
    processes: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SEQUENCE = {"sequence_parallel": True}
# Every way to split meets both architectures by itself. Where ways meet each other one does: tied embeddings, which
# first and last stages share, or, with sequence parallelism, biases, whose gradients tensor-parallel ranks add up.
PLACES = {
    "tp2": Place(Layout(tensor=2)),
    "tp2_sequence_parallel": Place(Layout(tensor=2), model=SEQUENCE),
    "pp2": Place(Layout(pipeline=2)),
    "dp2": Place(Layout()),
    "tp2_pp2": Place(Layout(tensor=2, pipeline=2), 4, architectures=("llama",)),
    "tp2_pp2_sequence_parallel": Place(Layout(tensor=2, pipeline=2), 4, SEQUENCE, ("gpt",)),
    "tp2_dp2": Place(Layout(tensor=2), 4, architectures=("llama",)),
    "pp2_dp2": Place(Layout(pipeline=2), 4, architectures=("llama",)),
    "pp2_uneven": Place(Layout(pipeline=2), model={"num_layers_in_first_pipeline_stage": 1}),
    "pp2_interleaved": Place(Layout(pipeline=2), model={"virtual_pipeline_model_parallel_size": 2}),
    "dp2_distributed_optimizer": Place(Layout(), model={"use_distributed_optimizer": True, **OVERLAP}),
    "cp2": Place(Layout(context=2)),
    "tp2_cp2_sequence_parallel": Place(Layout(tensor=2, context=2), 4, SEQUENCE, ("gpt",)),
    "pp2_cp2": Place(Layout(pipeline=2, context=2), 4, architectures=("llama",)),
    # matrices of experts over tensor-parallel ranks; whole ones over these, over ranks with other rows, over both
    "tp2_sequence_parallel_experts": Place(Layout(tensor=2), model=SEQUENCE, architectures=("experts",)),
    "tp2_ep2": Place(Layout(tensor=2, expert=2), model=SEQUENCE, architectures=("experts",)),
    "ep2_distributed_optimizer": Place(
        Layout(expert=2), model={"use_distributed_optimizer": True, **OVERLAP}, architectures=("experts",)
    ),
    "tp2_ep4": Place(Layout(tensor=2, expert=4), 4, SEQUENCE, ("experts",)),
    "pp2_ep2": Place(Layout(pipeline=2, expert=2), 4, architectures=("experts",)),
    "tp2_selective_recompute": Place(Layout(tensor=2), model={**SEQUENCE, "recompute": "selective"}),
}
CASES = {f"{name}-{model}": (place, model) for name, place in PLACES.items() for model in place.architectures}
# one of each way to split, both architectures
ON_EVERY_PLATFORM = (
    "tp2_sequence_parallel-gpt",
    "pp2_interleaved-gpt",
    "dp2_distributed_optimizer-llama",
    "cp2-llama",
    "tp2_pp2-llama",
)


@pytest.fixture(
    scope="session",
    params=[pytest.param(n, marks=[pytest.mark.platform] if n in ON_EVERY_PLATFORM else []) for n in CASES],
)
def case(request: pytest.FixtureRequest) -> tuple[Place, str]:
    return CASES[request.param]


@pytest.fixture(scope="session")
def place(case: tuple[Place, str]) -> Place:
    return case[0]


@pytest.fixture(scope="session")
def architecture(case: tuple[Place, str]) -> str:
    return case[1]


@pytest.fixture(scope="session")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of the checkpoints of an architecture, saved once by this process."""
    return parity_jobs.initial_checkpoints(tmp_path_factory)


@pytest.fixture(scope="session")
def alone(single: Runtime) -> Callable[..., Any]:
    """The single process's answer to a job, computed once."""
    answers: dict[str, Any] = {}

    def answer(job: str, **kwargs: Any) -> Any:
        key = f"{job} {sorted((k, str(v)) for k, v in kwargs.items() if k != 'out')}"
        if key not in answers:
            answers[key] = getattr(parity_jobs, job)(model={}, **kwargs)
        return answers[key]

    return answer


def _same_metrics(there: dict[str, float], here: dict[str, float]) -> None:
    assert there.keys() == here.keys()
    for name, value in here.items():
        if name != "tokens":  # counted per rank
            assert there[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def _weights(architecture: str, head: str, path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of any layout, read by this process."""
    cfg = tiny_config(architecture)
    model = build_model(cfg.model, cfg.precision, head, TOKENIZER.vocab_size, seed=9, trainable=False)  # type: ignore[arg-type]
    checkpoint.load(Path(path), model)
    return {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}


def _same_weights(architecture: str, head: str, there: str, here: str, start: str) -> None:
    theirs, ours, before = (_weights(architecture, head, path) for path in (there, here, start))
    assert theirs.keys() == ours.keys() and len(ours) > 20
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert any((tensor - before[name]).abs().max() > 1e-3 for name, tensor in ours.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_is_computed_in_several_microbatches(single: Runtime, architecture: str) -> None:
    assert parity_jobs.microbatches_of_a_step(architecture) > 2


def test_reward_model_training_is_that_of_one_process(
    worlds: Worlds,
    place: Place,
    architecture: str,
    initial: Callable[[str], str],
    alone: Callable[..., Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kwargs: dict[str, Any] = {"architecture": architecture, "path": initial(architecture), "loss": "bt"}
    reference = Path(initial(architecture)) / "trained_reward"
    here = alone("train_reward_model", out=str(reference), **kwargs)
    everyone = worlds.run(
        place.layout,
        "parity_jobs",
        "train_reward_model",
        place.processes,
        model=place.model,
        out=str(tmp_path / "out"),
        **kwargs,
    )
    assert {"train/loss", "train/accuracy", "train/margin", "train/chosen_std", "grad_norm"} <= here[0].keys()
    assert math.isfinite(here[1]["train/loss"]) and here[0]["grad_norm"] > 0.1
    for there in everyone:
        for step in range(2):
            _same_metrics(there[step], here[step])
    _same_weights(architecture, "reward", str(tmp_path / "out"), str(reference), f"{initial(architecture)}/reward")


def test_supervised_training_is_that_of_one_process(
    worlds: Worlds,
    place: Place,
    architecture: str,
    initial: Callable[[str], str],
    alone: Callable[..., Any],
    tmp_path: Path,
) -> None:
    kwargs: dict[str, Any] = {"architecture": architecture, "path": initial(architecture)}
    reference = Path(initial(architecture)) / "trained_lm"
    here = alone("train_supervised", out=str(reference), **kwargs)
    everyone = worlds.run(
        place.layout,
        "parity_jobs",
        "train_supervised",
        place.processes,
        model=place.model,
        out=str(tmp_path / "out"),
        **kwargs,
    )
    for there in everyone:
        for step in range(2):
            _same_metrics(there[step], here[step])
    _same_weights(architecture, "lm", str(tmp_path / "out"), str(reference), f"{initial(architecture)}/lm")


def test_scores_are_those_of_one_process(
    worlds: Worlds, place: Place, architecture: str, initial: Callable[[str], str], alone: Callable[..., Any]
) -> None:
    kwargs = {"architecture": architecture, "path": initial(architecture)}
    here = alone("scores", **kwargs)
    assert here.shape == (11,) and here.std() > 0.05
    for there in worlds.run(place.layout, "parity_jobs", "scores", place.processes, model=place.model, **kwargs):
        torch.testing.assert_close(there, here, **TOLERANCE)


def test_hidden_states_are_those_of_one_process(
    worlds: Worlds, place: Place, architecture: str, initial: Callable[[str], str], alone: Callable[..., Any]
) -> None:
    kwargs = {"architecture": architecture, "path": initial(architecture)}
    scores_N, hidden_NH = here = alone("hidden_states", **kwargs)
    assert torch.equal(scores_N, alone("scores", **kwargs))  # the same forward pass
    assert hidden_NH.shape == (11, 32) and hidden_NH.dtype == torch.float32 and hidden_NH.std(0).min() > 0.05
    for there in worlds.run(place.layout, "parity_jobs", "hidden_states", place.processes, model=place.model, **kwargs):
        torch.testing.assert_close(there, here, **TOLERANCE)


def test_log_probs_and_entropy_are_those_of_one_process(
    worlds: Worlds, place: Place, architecture: str, initial: Callable[[str], str], alone: Callable[..., Any]
) -> None:
    kwargs = {"architecture": architecture, "path": initial(architecture)}
    here = alone("log_probs", **kwargs)
    assert here[0].min() < -1 and here[1].max() > 1
    for there in worlds.run(place.layout, "parity_jobs", "log_probs", place.processes, model=place.model, **kwargs):
        torch.testing.assert_close(there, here, **TOLERANCE)


def test_the_critic_is_that_of_one_process(
    worlds: Worlds, place: Place, architecture: str, initial: Callable[[str], str], alone: Callable[..., Any]
) -> None:
    kwargs = {"architecture": architecture, "path": initial(architecture)}
    values, metrics, after = alone("train_critic", **kwargs)
    assert (after - values).abs().max() > 1e-3
    for there in worlds.run(place.layout, "parity_jobs", "train_critic", place.processes, model=place.model, **kwargs):
        torch.testing.assert_close(there[0], values, **TOLERANCE)
        _same_metrics(there[1], metrics)
        torch.testing.assert_close(there[2], after, **TOLERANCE)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(10, (TOKENIZER.eos_id, 5, 9), temperature=0),
        Sampling(10, (TOKENIZER.eos_id, 5, 9), temperature=0.9, top_k=30, top_p=0.95),
    ],
    ids=["greedy", "sampled"],
)
def test_generation_gives_the_tokens_of_one_process(
    worlds: Worlds,
    place: Place,
    architecture: str,
    sampling: Sampling,
    initial: Callable[[str], str],
    alone: Callable[..., Any],
) -> None:
    kwargs: dict[str, Any] = {"architecture": architecture, "path": initial(architecture), "sampling": sampling}
    here = alone("responses_of", **kwargs)
    assert len({len(r) for r in here[0]}) > 1 or sampling.temperature == 0

    kwargs |= {"model": place.model, "max_rows": 5}
    there = worlds.run(place.layout, "parity_jobs", "responses_of", place.processes, **kwargs)
    assert there == [here] * place.processes


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_of_fewer_rows_than_ranks_is_that_of_one_process(
    worlds: Worlds, initial: Callable[[str], str], alone: Callable[..., Any], processes: int
) -> None:
    kwargs = {"architecture": "llama", "path": initial("llama"), "rows": 1}
    here = alone("validate", **kwargs)
    for there in worlds.run(Layout(pipeline=processes // 2), "parity_jobs", "validate", processes, model={}, **kwargs):
        _same_metrics(there, here)
