"""Steps of repeating shapes, recorded as graphs, give the tokens and log-probabilities of a CPU's steps."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from decoding_jobs import FailedGraph, Made, RecordedGraph, both_ways
from distributed import Worlds
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine import step_graphs
from nemo_advrm.engine.attention import CachedSelfAttention, FusedCoreAttention
from nemo_advrm.engine.decoding import decoding
from nemo_advrm.engine.generation import generate
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.step_graphs import StepGraphs
from nemo_advrm.engine.step_shapes import EXACT, StepShapes
from nemo_advrm.errors import ConfigError

SHAPES = StepShapes(block=8, halves=True, look_every=3)
STOPS = (TOKENIZER.eos_id, *range(5, 12))
GREEDY = Sampling(14, STOPS, temperature=0)
SAMPLED = Sampling(14, STOPS, temperature=0.9, top_k=30, top_p=0.95)


def _agree(exact: Made, repeating: Made) -> None:
    assert (repeating.responses, repeating.ended) == (exact.responses, exact.ended)
    assert repeating.log_probs == pytest.approx(exact.log_probs, abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("llama", {}),  # grouped queries
        ("gpt", {}),
        ("llama", {"sliding_window": 6}),
        ("llama", {"attention_softcap": 20.0, "sliding_window": 6, "sliding_window_every": 2}),
    ],
    ids=["llama", "gpt", "window", "softcap"],
)
def test_repeating_shapes_give_the_same_tokens_and_log_probs(
    single: Runtime, architecture: str, model: dict[str, Any], sampling: Sampling
) -> None:
    exact, repeating = both_ways(architecture, {"init_method_std": 0.3, **model}, sampling, SHAPES)
    _agree(exact, repeating)
    assert len({len(response) for response in exact.responses}) > 2 and len(exact.log_probs) > 40
    # few shapes: whole blocks up to the longest row possible, and half of 5 rows, of these, ...
    assert {rows for rows, _ in repeating.steps} <= {5, 2, 1} and {end for _, end in repeating.steps} <= {8, 16, 24}
    assert len(set(repeating.steps)) < len(set(exact.steps)) / 2
    # every shape that returns is captured once, over all batches, and is replayed from its second step on
    counts = [repeating.steps.count(shape) for shape in dict.fromkeys(repeating.steps)]
    assert sorted(repeating.replays) == sorted(count - 1 for count in counts if count > 1)
    assert sum(repeating.replays) > 10 and not repeating.given_up


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(tensor=2), {"sliding_window": 6, "sequence_parallel": True}),
        (Layout(pipeline=2), {"sliding_window": 6}),
        (Layout(pipeline=2), {"virtual_pipeline_model_parallel_size": 2}),
    ],
    ids=["tp2", "pp2", "pp2-interleaved"],
)
def test_repeating_shapes_give_the_same_on_every_rank(
    worlds: Worlds, layout: Layout, model: dict[str, Any], sampling: Sampling
) -> None:
    settings = {"init_method_std": 0.3, **model}
    kwargs = {"architecture": "llama", "model": settings, "sampling": sampling, "shapes": SHAPES}
    made = worlds.run(layout, "decoding_jobs", "both_ways", 2, **kwargs)
    for exact, repeating in made:
        _agree(exact, repeating)
        assert sum(repeating.replays) > 10 and not repeating.given_up
    assert made[0][1].responses == made[1][1].responses
    assert len(made[1][1].log_probs) > 40  # of the last stage


def test_a_capture_that_fails_on_one_tensor_parallel_rank_is_given_up_on_both(worlds: Worlds) -> None:
    kwargs = {"architecture": "llama", "model": {}, "sampling": SAMPLED, "shapes": SHAPES, "fails_on": 1}
    for rank, (exact, repeating) in enumerate(worlds.run(Layout(tensor=2), "decoding_jobs", "both_ways", 2, **kwargs)):
        _agree(exact, repeating)
        assert repeating.replays == [0]
        why = "RuntimeError: operation not permitted" if rank else "another tensor-parallel rank could not"
        assert len(repeating.given_up) == 1 and repeating.given_up[0].startswith(why)


class Steps:
    """Doubles its inputs by a weight; keeps the addresses that it worked on."""

    def __init__(self, graph: type[RecordedGraph] = RecordedGraph, **options: Any) -> None:
        self.weight = torch.tensor([2.0])
        self.addresses: list[int] = []
        self.graphs: list[RecordedGraph] = []
        self.given_up: list[str] = []

        def new_graph() -> RecordedGraph:
            self.graphs.append(graph())
            return self.graphs[-1]

        self.run = StepGraphs(new_graph, lambda: [self.weight], self.given_up.append, **options)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.addresses.append(x.data_ptr())
        return x * self.weight

    def __call__(self, key: object, *values: float) -> list[float]:
        return self.run(key, self.step, torch.tensor(values)).tolist()


def test_a_step_runs_once_as_it_is_and_is_then_captured_and_replayed_on_inputs_of_its_own() -> None:
    steps = Steps()
    assert steps("a", 1.0, 2.0) == [2.0, 4.0] and not steps.graphs
    assert [steps("a", value, 0.0) for value in (3.0, 4.0, 5.0)] == [[6.0, 0.0], [8.0, 0.0], [10.0, 0.0]]
    assert [graph.replays for graph in steps.graphs] == [3]
    assert len(set(steps.addresses[1:])) == 1  # the capture and all replays


def test_every_key_has_a_graph_of_its_own() -> None:
    steps = Steps()
    for value in (1.0, 2.0, 3.0):
        assert steps("one", value) == [2 * value]
        assert steps("two", value, value) == [2 * value] * 2
    assert [graph.replays for graph in steps.graphs] == [2, 2]


def test_graphs_are_dropped_when_a_tensor_that_they_read_has_moved() -> None:
    steps = Steps()
    for key in ("a", "b", "a", "b"):
        steps(key, 1.0)
    steps.weight.fill_(3.0)  # trained in place: replays read it
    assert steps("a", 1.0) == [3.0] and [graph.replays for graph in steps.graphs] == [2, 1]
    here = steps.weight
    steps.weight = torch.tensor([5.0])
    assert here.data_ptr() != steps.weight.data_ptr()
    assert [steps(key, 1.0) for key in ("a", "b", "a", "b")] == [[5.0]] * 4
    assert [graph.replays for graph in steps.graphs] == [2, 1, 1, 1]


def test_after_a_capture_that_failed_steps_run_as_they_are() -> None:
    steps = Steps(FailedGraph)
    assert [steps(key, 2.0) for key in ("a", "a", "a", "b", "b")] == [[4.0]] * 5
    assert len(steps.graphs) == 1
    assert steps.given_up == ["RuntimeError: operation not permitted when stream is capturing"]


def test_the_reason_is_the_first_error_of_a_capture() -> None:
    class Ended(RecordedGraph):
        def capture(self, work: Any) -> torch.Tensor:
            try:
                raise MemoryError("no room")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    steps = Steps(Ended)
    steps("a", 1.0), steps("a", 1.0)
    assert steps.given_up == ["MemoryError: no room"]


def test_no_graph_is_used_that_another_rank_does_not_have() -> None:
    steps = Steps(all_captured=lambda captured: False)
    assert [steps("a", 2.0) for _ in range(3)] == [[4.0]] * 3
    assert [graph.replays for graph in steps.graphs] == [0]
    assert steps.given_up == ["another tensor-parallel rank could not capture it"]


@pytest.fixture(scope="module")
def model(single: Runtime) -> MegatronModel:
    cfg = tiny_config("llama", init_method_std=0.3)
    return build_model(cfg.model, cfg.precision, "lm", 64, seed=2, trainable=False)


def test_a_cpu_has_no_graphs(model: MegatronModel) -> None:
    assert step_graphs.step_graphs(model, "auto", list) is None
    assert step_graphs.step_graphs(model, "never", list) is None
    with pytest.raises(ConfigError, match=r"rl\.decoding_graphs=always needs a GPU"):
        generate(model, [[5]], Sampling(2, ()), torch.zeros(1, 2), graphs="always")


def test_giving_up_is_said_once_for_a_model(model: MegatronModel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"decoding_graphs=always: .* could not be captured .*\(no room\)"):
        step_graphs.give_up(model, "always", "no room")
    assert not model.capture_failure
    with caplog.at_level(logging.WARNING):
        step_graphs.give_up(model, "auto", "no room")
    assert model.capture_failure == "no room" and "(no room): generation runs without graphs" in caplog.text
    model.capture_failure = ""


def test_ended_rows_stay_until_half_of_them_are_enough() -> None:
    def kept(rows: int, *running: int) -> list[int] | None:
        found = SHAPES.rows_to_keep(torch.tensor(running), rows)
        return None if found is None else found.tolist()

    assert kept(8, *range(5)) is None
    assert kept(8, 1, 3, 5, 7) == [1, 3, 5, 7]
    assert kept(8, 2, 5, 7) == [0, 2, 5, 7]
    assert kept(8, 6) == [6]
    assert kept(5, 3, 4) == [3, 4]
    assert kept(1, 0) is None
    exact = EXACT.rows_to_keep(torch.tensor([0, 2, 4]), 4)
    assert exact is not None and exact.tolist() == [0, 2, 4]
    assert EXACT.rows_to_keep(torch.tensor([0, 1, 2, 3]), 5) is None


def test_one_batch_after_another_uses_the_same_memory() -> None:
    cache = KVCache(4, 21, torch.device("cpu"), block=8)
    assert cache.max_sequence_length == 24
    cache.begin(torch.tensor([2, 5, 7]))
    new = torch.randn(7, 3, 2, 6)
    cache.update(1, new, new)
    cache.start_decoding()
    where = [tensor.data_ptr() for tensor in cache.tensors()]
    ends = []
    for _ in range(10):
        ends.append(cache.attended)
        keys, _ = cache.update(1, new[:1], new[:1])
        assert keys.shape == (cache.attended, 3, 2, 6)
        cache.advance()
    assert ends == [8] * 1 + [16] * 8 + [24]
    cache.keep_rows(torch.tensor([1, 2]))
    torch.testing.assert_close(cache.update(1, new[:1, 1:], new[:1, 1:])[0][:5, 0], new[:5, 1])
    assert cache.lengths_B.tolist() == [15, 17]
    cache.keep_rows(torch.tensor([0]))
    assert cache.attended == 16
    cache.begin(torch.tensor([1, 1, 2, 3]))
    assert cache.prefilling and cache.lengths_B.tolist() == [1, 1, 2, 3]
    assert [tensor.data_ptr() for tensor in cache.tensors()] == where


def test_our_attention_takes_the_place_of_another_while_tokens_are_generated(
    model: MegatronModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of Transformer Engine, of which no build for CPUs exists."""

    class Theirs(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise AssertionError("it would compute arbitrary masks by its unfused path")

    prompts, sampling, unused = [[5, 6, 7], [8, 9]], Sampling(6, (), temperature=0), torch.zeros(2, 6)
    expected = generate(model, prompts, sampling, unused)
    layers = [module for module in model.parts[0].modules() if isinstance(module, CachedSelfAttention)]
    theirs = [Theirs() for _ in layers]
    for layer, core in zip(layers, theirs, strict=True):
        monkeypatch.setattr(layer, "core_attention", core)
    assert generate(model, prompts, sampling, unused) == expected
    with decoding(model.parts):
        assert all(type(layer.core_attention) is FusedCoreAttention for layer in layers)
    assert [layer.core_attention for layer in layers] == theirs
