"""Compares greedy generation with a key/value cache in tokens/s: our generate against transformers' generate.

``gpu/generate_against_transformers.py`` runs the same sides on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from common import (
    FIRST_ID,
    PAD_ID,
    Llama,
    compare,
    describe_machine,
    our_config,
    our_facts,
    our_model,
    peer_model,
    random_weights,
)
from sides import Side

if TYPE_CHECKING:
    import torch

CUTS = (0.0, 0.02, 0.25, 0.5, 1.0)  # places of a response where its token is checked
NEAR = 16  # a token that is not among so many likeliest is far from the likeliest one
FAR = 99.0


@dataclass(frozen=True)
class Options:
    """What both sides do.

    Attributes:
        exact: the sides must write the same tokens; else each only tokens that are nearly the likeliest, because in
            bf16 two of these may be equally likely.
    """

    batch: int
    new_tokens: int
    eos: tuple[int, ...]
    shape: Llama
    accelerator: str = "cpu"
    exact: bool = True


def data(options: Options) -> list[list[int]]:
    """Draw prompts of 16 to 192 tokens."""
    rng = np.random.default_rng(0)
    longest = min(192, options.shape.context - options.new_tokens)
    lengths = np.exp(rng.normal(4.2, 0.6, options.batch)).astype(int).clip(16, longest)
    return [rng.integers(FIRST_ID, options.shape.vocab, size=n).tolist() for n in lengths]


def _table(responses: list[list[int]], options: Options) -> np.ndarray:
    """Return responses as [batch, new_tokens], with -1 after the end of a response."""
    table = np.full((options.batch, options.new_tokens), -1)
    for row, response in zip(table, responses, strict=True):
        row[: len(response)] = response
    return table


def _beginnings(prompts: list[list[int]], responses: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Return prompts with the first part of their responses, and the token that was written next."""
    rows, nexts = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        for place in sorted({int(cut * (len(response) - 1)) for cut in CUTS}):
            rows.append(prompt + response[:place])
            nexts.append(response[place])
    return rows, nexts


def _behind(log_probs_NK: torch.Tensor, ids_NK: torch.Tensor, nexts: list[int]) -> np.ndarray:
    """Return how much less likely each next token is than the likeliest one, in nats; FAR if it is not near it."""
    import torch

    found_NK = ids_NK == torch.tensor(nexts)[:, None]
    behind_N = log_probs_NK[:, 0] - log_probs_NK.masked_fill(~found_NK, -torch.inf).amax(-1)
    return behind_N.clamp(max=FAR).numpy()


def ours(options: Options, graphs: str = "auto") -> Side:
    import torch

    from nemo_advrm.engine.generation import generate, likeliest_tokens
    from nemo_advrm.engine.sampling import Sampling

    prompts = data(options)
    model = our_model(options.shape, "lm", random_weights(options.shape, "lm"), options.accelerator)
    captures = _count_captures() if options.accelerator == "gpu" else []
    facts = our_facts(our_config(options.shape, options.accelerator)) | {"decoding_graphs": graphs}

    def responses(new_tokens: int = options.new_tokens) -> list[list[int]]:
        sampling = Sampling(new_tokens, options.eos, temperature=0.0)
        return generate(model, prompts, sampling, torch.zeros(options.batch, new_tokens), graphs=graphs).responses

    def check() -> np.ndarray:
        made = responses()
        facts.update(graphs=len(captures), capture_seconds=sum(captures), capture_failure=model.capture_failure)
        facts["first_token_seconds"] = _seconds(lambda: responses(1))
        if options.exact:
            return _table(made, options)
        rows, nexts = _beginnings(prompts, made)
        ids_NK, log_probs_NK = likeliest_tokens(model, rows, NEAR, options.batch)
        return _behind(log_probs_NK, ids_NK, nexts)

    return Side(check, lambda: sum(map(len, responses())), facts=facts)


def ours_without_graphs(options: Options) -> Side:
    return ours(options, "never")


def _count_captures() -> list[float]:
    """Return a list that gets the seconds of every capture of a CUDA graph from now on."""
    from nemo_advrm.engine.step_graphs import CUDAGraph

    seconds: list[float] = []
    capture = CUDAGraph.capture

    def timed(graph: CUDAGraph, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        output = capture(graph, work)
        seconds.append(time.perf_counter() - started)
        return output

    CUDAGraph.capture = timed  # type: ignore[method-assign]
    return seconds


def _seconds(work: Callable[[], Any]) -> float:
    """Return the time of the second of two runs."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peer(options: Options) -> Side:
    import torch

    prompts = data(options)
    device, dtype = ("cuda", torch.bfloat16) if options.accelerator == "gpu" else ("cpu", torch.float32)
    model = peer_model(options.shape, "lm", random_weights(options.shape, "lm"), device).to(dtype)
    model.generation_config.eos_token_id = list(options.eos)
    longest = max(map(len, prompts))
    tokens = torch.full((options.batch, longest), PAD_ID)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # generation in transformers needs left padding
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    facts: dict[str, Any] = {"precision": str(dtype)}

    @torch.inference_mode()
    def responses(new_tokens: int = options.new_tokens) -> list[list[int]]:
        output = model.generate(
            tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=PAD_ID,
        )
        rows = output[:, longest:].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in options.eos), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    @torch.inference_mode()
    def behind(rows: list[list[int]], nexts: list[int]) -> np.ndarray:
        found = []
        for row, token in zip(rows, nexts, strict=True):
            logits = model(torch.tensor([row], device=device), logits_to_keep=1).logits[:, -1].float()
            log_probs, ids = torch.log_softmax(logits, -1).topk(NEAR)
            found.append(_behind(log_probs.cpu(), ids.cpu(), [token]))
        return np.concatenate(found)

    def check() -> np.ndarray:
        made = responses()
        facts["first_token_seconds"] = _seconds(lambda: responses(1))
        return _table(made, options) if options.exact else behind(*_beginnings(prompts, made))

    return Side(check, lambda: sum(map(len, responses())), facts=facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--eos", type=int, nargs="+", default=[1], help="ids that end a response")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    describe_machine()
    options = Options(args.batch, args.new_tokens, tuple(args.eos), Llama())
    compare("generation", "tokens", {"ours": ours, "transformers": peer}, options, args.repeats)


if __name__ == "__main__":
    main()
