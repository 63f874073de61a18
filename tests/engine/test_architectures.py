"""Each architecture of the conversion tables computes, generates and trains as transformers does, at every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import architecture_jobs
import pytest
import torch
from distributed import Worlds
from hf_models import ARCHITECTURES, VOCABULARY, tiny_hf
from transformers import PreTrainedModel

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.generation import generate
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
NEW = 12
# layout and sequence parallelism
PLACES = {
    "one": (Layout(), False),
    "tp2": (Layout(tensor=2), False),
    "tp2_sequence_parallel": (Layout(tensor=2), True),
    "pp2": (Layout(pipeline=2), False),
    "cp2": (Layout(context=2), False),
}


def _tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# longer than the windows and than the context before rope scaling
TOKENS = _tokens(4, 40, seed=0)
PROMPTS = [row[:length].tolist() for row, length in zip(_tokens(6, 24, seed=1), (3, 24, 1, 9, 4, 17), strict=True)]


@dataclass(frozen=True)
class Case:
    """A Hugging Face model, our configuration of it and the checkpoint of its weights."""

    name: str
    hf: PreTrainedModel
    config: ModelConfig
    path: str


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Case:
    hf = tiny_hf(request.param)
    config = architecture_jobs.config_of(hf)
    model = architecture_jobs.build(config)
    architecture_jobs.put(model, architecture_jobs.tensors_of(hf))
    path = tmp_path_factory.mktemp(request.param) / "lm"
    checkpoint.save(path, model)
    return Case(request.param, hf, config, str(path))


@pytest.fixture(scope="module", params=PLACES)
def run(request: pytest.FixtureRequest, single: Runtime, worlds: Worlds) -> Any:
    """Runs a job of architecture_jobs at a place; gives the results of all ranks."""
    layout, sequence_parallel = PLACES[request.param]

    def everywhere(job: str, **kwargs: Any) -> list[Any]:
        kwargs["sequence_parallel"] = sequence_parallel
        if layout.model_parallel == 1:
            return [getattr(architecture_jobs, job)(**kwargs)]
        return worlds.run(layout, "architecture_jobs", job, **kwargs)

    everywhere.place = request.param  # type: ignore[attr-defined]
    return everywhere


@pytest.fixture(scope="module")
def computed(case: Case, run: Any) -> list[tuple[torch.Tensor, list[list[int]]]]:
    """(logits of TOKENS, greedy responses to PROMPTS) of all ranks."""
    return run("compute", config=case.config, path=case.path, tokens_BS=TOKENS, prompts=PROMPTS, new=NEW)


@torch.no_grad()
def test_logits_are_those_of_transformers(case: Case, computed: list[Any]) -> None:
    expected = case.hf(TOKENS).logits
    assert expected.std() > 0.5
    for logits, _ in computed:
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.fixture(scope="module")
def continuations(case: Case) -> list[list[int]]:
    """What transformers generates after each of PROMPTS, greedily and one prompt at a time."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    made = [case.hf.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert len({tuple(row) for row in made}) > 3 and all(len(row) == NEW for row in made)
    return made


def test_greedy_generation_from_the_cache_is_that_of_transformers(
    continuations: list[list[int]], computed: list[Any]
) -> None:
    for _, responses in computed:
        assert responses == continuations


def test_rows_of_the_cache_that_end_leave_the_others_as_they_were(case: Case, continuations: list[list[int]]) -> None:
    stops = {continuations[0][3], continuations[1][6]}
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), NEW) for row in continuations]
    assert min(ends) < NEW
    model = architecture_jobs.build(case.config, path=case.path)
    # more rows than are decoded together
    made = generate(model, PROMPTS * 4, Sampling(NEW, tuple(stops), temperature=0), torch.zeros(len(PROMPTS) * 4, NEW))
    assert made.responses == [row[:end] for row, end in zip(continuations, ends, strict=True)] * 4


def test_a_step_of_gradient_descent_is_that_of_transformers(case: Case, run: Any, tmp_path: Path) -> None:
    rate = 0.5
    hf = tiny_hf(case.name)
    before = architecture_jobs.tensors_of(hf)
    if case.config.num_moe_experts and run.place == "tp2":
        pytest.skip("experts need sequence parallelism to train")
    loss, expected = architecture_jobs.descended(hf, TOKENS, rate)

    out = str(tmp_path / "out")
    for found in run("descend", config=case.config, path=case.path, tokens_BS=TOKENS, rate=rate, out=out):
        assert found == pytest.approx(loss, abs=1e-5)
    trained = dict(architecture_jobs.build(case.config, path=out).parts[0].named_parameters())
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            trained[name].data, tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (tensor - before[name]).abs().max() > 1e-3, name  # or nothing was compared


@torch.no_grad()
def test_scores_are_those_of_the_sequence_classifier(case: Case) -> None:
    hf = tiny_hf(case.name, reward=True)
    config = architecture_jobs.config_of(hf)
    model = architecture_jobs.build(config, "reward")
    architecture_jobs.put(model, architecture_jobs.tensors_of(hf))
    expected = torch.cat([hf(torch.tensor([prompt])).logits for prompt in PROMPTS])
    padded = torch.zeros(len(PROMPTS), 24, dtype=torch.int64)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    positions = torch.arange(24).expand_as(padded)
    last = torch.tensor([len(prompt) - 1 for prompt in PROMPTS])
    torch.testing.assert_close(model.parts[0](padded, positions, read_at_B=last), expected, **TOLERANCE)

    biased = architecture_jobs.build(replace(config, head_bias=True), "reward")
    architecture_jobs.put(biased, {**architecture_jobs.tensors_of(hf), "head.bias": torch.tensor([1.5])})
    torch.testing.assert_close(biased.parts[0](padded, positions, read_at_B=last), expected + 1.5, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama31", {"rope_scaling": ""}),
        ("llama31", {"rope_scaling_factor": 4.0}),
        ("llama31", {"rope_scaling_low_freq_factor": 2.0}),
        ("llama31", {"rope_scaling_high_freq_factor": 8.0}),
        ("llama31", {"rope_scaling_original_context": 64}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"sliding_window_every": 2}),
        ("gemma2", {"sliding_window_every": 1}),
        ("gemma2", {"attention_softcap": 0.0}),
        ("gemma2", {"logit_softcap": 0.0}),
        ("gemma2", {"query_scale": 0.0}),
        ("gemma2", {"embedding_scale": 1.0}),
        ("gemma2", {"activation": "geglu"}),
        ("gemma2", {"normalization": "RMSNorm"}),
        ("nemotron", {"rotary_percent": 1.0}),
        ("nemotron", {"normalization": "LayerNorm"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "_".join(f"{k}={v}" for k, v in value.items()),
)
@torch.no_grad()
def test_the_comparison_would_notice_another_value(single: Runtime, name: str, changed: dict[str, Any]) -> None:
    hf = tiny_hf(name)
    model = architecture_jobs.build(replace(architecture_jobs.config_of(hf), **changed))
    architecture_jobs.put(model, architecture_jobs.tensors_of(hf))
    difference = (architecture_jobs.logits(model, TOKENS) - hf(TOKENS).logits).abs().max()
    assert difference > 3 * TOLERANCE["atol"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.attention_softcap=-1"], "model.attention_softcap=-1"),
        (["model.logit_softcap=-30"], "model.logit_softcap=-30"),
        (["model.sliding_window=-1"], "model.sliding_window=-1"),
        (["model.sliding_window_every=2"], "model.sliding_window_every=2"),
        (["model.rope_scaling=llama4"], "model.rope_scaling=llama4"),
        (["model.rope_scaling=llama3", "model.position_embedding_type=learned_absolute"], "model.rope_scaling=llama3"),
        (["model.rope_scaling=llama3", "model.rope_scaling_high_freq_factor=1"], "rope_scaling_high_freq_factor=1"),
        (["model.embedding_scale=8", "model.position_embedding_type=learned_absolute"], "model.embedding_scale=8"),
        (["model.kv_channels=15"], "model.rotary_percent=1"),
        (["model.rotary_percent=0.03"], "model.rotary_percent=0.03"),
    ],
)
def test_impossible_architectures_are_refused_by_key(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["model=tiny", *overrides])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_sliding_window_goes_with_learned_positions() -> None:
    overrides = ["model.sliding_window=8", "model.position_embedding_type=learned_absolute", "model.kv_channels=15"]
    assert load_config(["model=tiny", *overrides]).model.sliding_window == 8
