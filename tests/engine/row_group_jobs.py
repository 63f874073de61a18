"""Generation in groups of rows, of which each stage of a pipeline has another in work; on all ranks of a layout."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from decoding_jobs import Made, as_on_a_gpu
from tiny import TOKENIZER, sequences, tiny_config
from torch import Tensor

from nemo_advrm.engine import checkpoint, generation, row_group, runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.generation import generate, likeliest_tokens, uniforms
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.stages import Pass, Stages
from nemo_advrm.engine.step_shapes import StepShapes

PROMPTS = sequences(12, seed=5, longest=9)
Answer = tuple[list[list[int]], list[bool]]


def save_initial(architecture: str, path: str) -> None:
    """The checkpoint that every layout reads; its next tokens differ enough from row to row."""
    cfg = tiny_config(architecture, runtime.current().layout, init_method_std=0.3)
    checkpoint.save(Path(path), build_policy(cfg, TOKENIZER, "", 2, trainable=False))


def _policy(architecture: str, path: str, model: dict[str, Any]) -> MegatronModel:
    cfg = tiny_config(architecture, runtime.current().layout, **model)
    return build_policy(cfg, TOKENIZER, path, 0, trainable=False)


@contextlib.contextmanager
def _in_groups(count: int | None) -> Iterator[None]:
    """Inside, batches are divided into ``count`` groups; by the layout, if it is None."""
    own = generation.groups_in_flight if count is None else lambda rows: min(rows, count)
    with patch.object(generation, "groups_in_flight", own):
        yield


def answers(
    architecture: str,
    path: str,
    model: dict[str, Any],
    samplings: list[Sampling],
    counts: list[int | None],
    shapes: StepShapes | None = None,
    share: bool = False,
) -> list[tuple[list[Answer], list[int], set[int]]]:
    """Responses by every sampling, replays of graphs, and which groups had caches of their own, for each of ``counts``.

    Args:
        shapes: of steps that are recorded as graphs; None as on a CPU.
        share: data-parallel rank 1 generates for the first 3 prompts only.
    """
    policy = _policy(architecture, path, model)
    prompts = PROMPTS[:3] if share and runtime.current().dp_rank else PROMPTS
    found = []
    for count in counts:
        made = Made()
        begun: list[KVCache] = []  # kept, so that no two have the same id
        token_pass = row_group.token_pass

        def watched(tokens_B: Tensor, cache: KVCache, *args: Any, original: Any = token_pass, to: Any = begun) -> Pass:
            to.append(cache)
            passed: Pass = original(tokens_B, cache, *args)
            return passed

        gpu = as_on_a_gpu(shapes, made) if shapes else contextlib.nullcontext()
        rows = []
        with _in_groups(count), gpu, patch.object(row_group, "token_pass", watched):
            for sampling in samplings:
                result = generate(policy, prompts, sampling, uniforms(7, 12, sampling.max_new_tokens), max_rows=7)
                rows.append((result.responses, result.ended))
        found.append((rows, made.replays, {len({id(cache) for cache in begun}) // len(samplings)}))
    return found


def likeliest(path: str, model: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return likeliest_tokens(_policy("llama", path, model), PROMPTS, 3, max_rows=7)


def events(path: str, model: dict[str, Any], limit_seconds: float) -> list[str]:
    """What this rank did, in order, while the last stage keeps token 2 of group 0 until group 1 has passed stage 0.

    It waits ``limit_seconds`` at most for the first stage to say so, and fails then.
    """
    rt = runtime.current()
    store = dist.distributed_c10d._get_default_store()
    done: list[str] = []
    numbers: dict[int, int] = {}  # of groups by their caches
    made = {"token_pass": row_group.token_pass, "pick": row_group.pick, "shared": Stages.shared_tokens}

    def token_pass(tokens_B: Tensor, cache: KVCache, graphs: Any, take: Callable[[Tensor], None]) -> Pass:
        group = numbers.setdefault(id(cache), len(numbers))
        token = int(cache._new_tokens)
        passed = made["token_pass"](tokens_B, cache, graphs, take)

        def run(part: Any, hidden: Tensor | None) -> Tensor:
            output: Tensor = passed.run(part, hidden)
            done.append(f"group {group} token {token}")
            if rt.is_first_stage and (group, token) == (1, 2):
                store.set("group 1 has passed", "1")
            return output

        return Pass(passed.rows, passed.length, run, passed.take)

    def pick(*args: Any) -> Tensor:
        if done and done[-1] == "group 0 token 2":
            store.wait(["group 1 has passed"], timedelta(seconds=limit_seconds))
        picked: Tensor = made["pick"](*args)
        return picked

    def shared_tokens(self: Stages, rows: int) -> Tensor:
        tokens_B: Tensor = made["shared"](self, rows)
        done.append("tokens came")
        return tokens_B

    sampling = Sampling(4, (), temperature=0)
    with (
        patch.object(row_group, "token_pass", token_pass),
        patch.object(row_group, "pick", pick),
        patch.object(Stages, "shared_tokens", shared_tokens),
    ):
        generate(_policy("llama", path, model), PROMPTS[:4], sampling, uniforms(7, 4, 4))
    store.delete_key("group 1 has passed")
    return done


def error(path: str) -> str:
    """What this rank raised when the last stage failed in the middle of a batch, and left the job."""
    policy = _policy("llama", path, {})
    calls: list[int] = []
    pick = row_group.pick

    def fails(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("no token")
        return pick(*args)

    raised = ""
    try:
        with patch.object(row_group, "pick", fails):
            generate(policy, PROMPTS, Sampling(6, (), temperature=0), torch.zeros(12, 6))
    except Exception as failure:
        raised = f"{type(failure).__name__}: {failure}"
    if raised.startswith("ValueError"):
        runtime.stop()
        gc.collect()
    return raised
