"""Compares greedy generation with a key/value cache in tokens/s: our generate against transformers' generate."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from common import (
    FIRST_ID,
    PAD_ID,
    Llama,
    compare,
    describe_machine,
    our_model,
    peer_model,
    random_weights,
)
from sides import Side


@dataclass(frozen=True)
class Options:
    batch: int
    new_tokens: int
    eos: tuple[int, ...]
    shape: Llama


def data(options: Options) -> list[list[int]]:
    """Draw prompts of 16 to 192 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4.2, 0.6, options.batch)).astype(int).clip(16, 192)
    return [rng.integers(FIRST_ID, options.shape.vocab, size=n).tolist() for n in lengths]


def _table(responses: list[list[int]], options: Options) -> np.ndarray:
    """Return responses as [batch, new_tokens], with -1 after the end of a response."""
    table = np.full((options.batch, options.new_tokens), -1)
    for row, response in zip(table, responses, strict=True):
        row[: len(response)] = response
    return table


def ours(options: Options) -> Side:
    import torch

    from nemo_advrm.engine.generation import generate
    from nemo_advrm.engine.sampling import Sampling

    prompts = data(options)
    model = our_model(options.shape, "lm", random_weights(options.shape, "lm"))
    sampling = Sampling(options.new_tokens, options.eos, temperature=0.0)
    unused = torch.zeros(options.batch, options.new_tokens)

    def responses() -> list[list[int]]:
        return generate(model, prompts, sampling, unused).responses

    return Side(lambda: _table(responses(), options), lambda: sum(map(len, responses())))


def peer(options: Options) -> Side:
    import torch

    prompts = data(options)
    model = peer_model(options.shape, "lm", random_weights(options.shape, "lm"))
    model.generation_config.eos_token_id = list(options.eos)
    longest = max(map(len, prompts))
    tokens = torch.full((options.batch, longest), PAD_ID)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # generation in transformers needs left padding
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    @torch.inference_mode()
    def responses() -> list[list[int]]:
        output = model.generate(
            tokens, attention_mask=mask, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=PAD_ID
        )
        rows = output[:, longest:].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in options.eos), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    return Side(lambda: _table(responses(), options), lambda: sum(map(len, responses())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
