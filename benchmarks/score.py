"""Compares reward-model scoring in sequences/s with transformers' LlamaForSequenceClassification.

``gpu/score_against_transformers.py`` runs the same sides on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from common import (
    PAD_ID,
    Llama,
    compare,
    describe_machine,
    our_config,
    our_facts,
    our_model,
    peer_model,
    ragged_lengths,
    ragged_sequences,
    random_weights,
)
from sides import Side


@dataclass(frozen=True)
class Options:
    sequences: int
    batch: int
    shape: Llama
    accelerator: str = "cpu"


def data(options: Options) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = ragged_lengths(options.sequences, rng, options.shape.context)[:, 0]
    return ragged_sequences(lengths, rng, options.shape.vocab)


def ours(options: Options) -> Side:
    from nemo_advrm.engine.scoring import score_sequences

    sequences = data(options)
    model = our_model(options.shape, "reward", random_weights(options.shape, "reward"), options.accelerator)

    def work() -> float:
        score_sequences(model, sequences, PAD_ID)
        return len(sequences)

    facts = our_facts(our_config(options.shape, options.accelerator))
    return Side(lambda: score_sequences(model, sequences, PAD_ID).numpy(), work, facts=facts)


def _peer(options: Options, by_length: bool) -> Side:
    import torch

    sequences = data(options)
    device, dtype = ("cuda", torch.bfloat16) if options.accelerator == "gpu" else ("cpu", torch.float32)
    model = peer_model(options.shape, "reward", random_weights(options.shape, "reward"), device).to(dtype)
    order = list(range(len(sequences)))
    if by_length:
        order.sort(key=lambda i: -len(sequences[i]))

    @torch.inference_mode()
    def score() -> np.ndarray:
        scores = np.zeros(len(sequences), dtype=np.float32)
        for start in range(0, len(order), options.batch):
            rows = order[start : start + options.batch]
            longest = max(len(sequences[i]) for i in rows)
            tokens = torch.full((len(rows), longest), PAD_ID)
            mask = torch.zeros(len(rows), longest, dtype=torch.int64)
            for row, i in enumerate(rows):
                tokens[row, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[row, : len(sequences[i])] = 1
            logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
            scores[rows] = logits[:, 0].float().cpu().numpy()
        return scores

    def work() -> float:
        score()
        return len(sequences)

    return Side(score, work)


def peer_in_file_order(options: Options) -> Side:
    return _peer(options, by_length=False)


def peer_by_length(options: Options) -> Side:
    return _peer(options, by_length=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="rows per batch in transformers")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    describe_machine()
    sides = {"ours": ours, "transformers, file order": peer_in_file_order, "transformers, by length": peer_by_length}
    compare("scoring", "sequences", sides, Options(args.sequences, args.batch, Llama()), args.repeats)


if __name__ == "__main__":
    main()
