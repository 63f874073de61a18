"""Generation with the key/value cache against the plain forward pass, and its independence of batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURES, sequences, tiny_config

from nemo_advrm.engine import row_group
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.written import Written
from nemo_advrm.errors import ConfigError

pytestmark = pytest.mark.platform

HIDDEN = (0, 2, 40)
NEW = 12


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, single: Runtime) -> MegatronModel:
    cfg = tiny_config(request.param, init_method_std=0.3)
    return build_model(cfg.model, cfg.precision, "lm", 64, seed=2, trainable=False, banned_token_ids=HIDDEN)


@torch.no_grad()
def _next_logits(model: MegatronModel, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    return model.parts[0](ids, torch.arange(len(tokens))[None], read_at_B=torch.tensor([len(tokens) - 1]))[0]


def _without_cache(model: MegatronModel, prompt: list[int], stops: tuple[int, ...]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(_next_logits(model, tokens).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def _greedy(model: MegatronModel, prompts: list[list[int]], stops: tuple[int, ...]) -> list[list[int]]:
    return generate(model, prompts, Sampling(NEW, stops, temperature=0), torch.zeros(len(prompts), NEW)).responses


def test_cached_greedy_generation_of_ragged_prompts_equals_the_argmax_without_a_cache(model: MegatronModel) -> None:
    prompts = sequences(9, seed=1, longest=14)
    assert len({len(p) for p in prompts}) > 4
    expected = [_without_cache(model, prompt, ()) for prompt in prompts]
    assert _greedy(model, prompts, ()) == expected
    assert len({tuple(r) for r in expected}) > 4


def test_a_stop_token_is_the_last_one_of_its_response_and_ends_it(model: MegatronModel) -> None:
    prompts = sequences(12, seed=1, longest=14)
    free = _greedy(model, prompts, ())
    stops = (free[0][3], free[1][6])
    made = generate(model, prompts, Sampling(NEW, stops, temperature=0), torch.zeros(12, NEW))
    for response, ended, whole in zip(made.responses, made.ended, free, strict=True):
        first = next((i for i, token in enumerate(whole) if token in stops), None)
        assert response == (whole if first is None else whole[: first + 1])
        assert ended == (first is not None)
    assert True in made.ended


def test_a_response_that_ends_with_its_last_allowed_token_has_ended(model: MegatronModel) -> None:
    prompt = sequences(1, seed=4)[0]
    stop = _without_cache(model, prompt, ())[0]
    made = generate(model, [prompt], Sampling(1, (stop,), temperature=0), torch.zeros(1, 1))
    assert (made.responses, made.ended) == ([[stop]], [True])


def test_finished_rows_leave_the_batch_without_changing_the_others(
    model: MegatronModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = sequences(12, seed=1, longest=14)
    free = _greedy(model, prompts, ())
    stops = tuple({row[0] for row in free[:6]})
    kept: list[int] = []
    original: Callable[[KVCache, torch.Tensor], None] = KVCache.keep_rows
    monkeypatch.setattr(KVCache, "keep_rows", lambda self, rows: (kept.append(rows.numel()), original(self, rows)))
    responses = _greedy(model, prompts, stops)
    assert kept and kept[0] <= 9 and all(later < before for before, later in pairwise(kept))
    assert responses == [_without_cache(model, prompt, stops) for prompt in prompts]


@pytest.mark.parametrize("every", [2, 3, 50])
def test_responses_do_not_depend_on_how_often_the_host_looks_which_have_ended(
    model: MegatronModel, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    prompts = sequences(12, seed=1, longest=14)
    sampling = Sampling(NEW, (1, 5, 6, 7, 8, 9, 10, 11), temperature=0.9, top_p=0.95)
    numbers = uniforms(3, 12, NEW)
    expected = generate(model, prompts, sampling, numbers)
    assert len({len(response) for response in expected.responses}) > 3

    kept: list[int] = []
    original: Callable[[KVCache, torch.Tensor], None] = KVCache.keep_rows
    monkeypatch.setattr(KVCache, "keep_rows", lambda self, rows: (kept.append(rows.numel()), original(self, rows)))
    monkeypatch.setattr(row_group, "Written", lambda *args: Written(*args[:-1], every))
    assert generate(model, prompts, sampling, numbers) == expected
    assert bool(kept) == (every < NEW)


@pytest.mark.parametrize("max_rows", [1, 2, 5, 100])
def test_samples_do_not_depend_on_the_batch_they_are_made_in(model: MegatronModel, max_rows: int) -> None:
    prompts = sequences(9, seed=1, longest=14)
    sampling = Sampling(NEW, (1, 5, 6, 7), temperature=0.9, top_p=0.95)
    numbers = uniforms(3, 9, NEW)
    together = generate(model, prompts, sampling, numbers)
    assert generate(model, prompts, sampling, numbers, max_rows) == together
    order = [8, 3, 0, 5]
    some = generate(model, [prompts[i] for i in order], sampling, numbers[order])
    assert some.responses == [together.responses[i] for i in order]


def test_hidden_tokens_and_vocabulary_padding_never_appear(single: Runtime) -> None:
    cfg = tiny_config("llama", init_method_std=1e-4)  # all tokens nearly equally likely
    model = build_model(cfg.model, cfg.precision, "lm", 59, seed=2, trainable=False, banned_token_ids=HIDDEN)
    assert model.vocab_size == 64
    prompts = [[5, 6]] * 64
    made = generate(model, prompts, Sampling(20, (1,), temperature=5.0), uniforms(0, 64, 20))
    seen = {token for response in made.responses for token in response}
    assert seen == set(range(59)) - set(HIDDEN)


def test_sampling_is_reproducible_and_rows_keep_their_numbers() -> None:
    assert torch.equal(uniforms(5, 3, 7), uniforms(5, 10, 7)[:3])
    assert not torch.equal(uniforms(5, 3, 7), uniforms(6, 3, 7))
    for rows in (1, 2, 15, 16, 17, 64):
        assert torch.equal(uniforms(0, rows, 9), uniforms(0, 200, 9)[:rows])


def test_generation_leaves_no_trace_in_later_forward_passes(model: MegatronModel) -> None:
    tokens = sequences(1, seed=9)[0]
    before = _next_logits(model, tokens)
    _greedy(model, sequences(4), ())
    assert torch.equal(_next_logits(model, tokens), before)


def test_no_prompts_give_no_responses(model: MegatronModel) -> None:
    assert generate(model, [], Sampling(4, (1,)), torch.zeros(0, 4)).responses == []


def test_a_prompt_that_leaves_no_room_or_is_empty_is_refused_before_anything_is_generated(model: MegatronModel) -> None:
    with pytest.raises(ConfigError, match=r"prompt 1 has 60 tokens.*encoder_seq_length=64"):
        generate(model, [[5], [5] * 60], Sampling(5, (1,)), torch.zeros(2, 5))
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        generate(model, [[]], Sampling(5, (1,)), torch.zeros(1, 5))
    full = generate(model, [[5] * 59], Sampling(5, (), temperature=0), torch.zeros(1, 5))
    assert len(full.responses[0]) == 5
