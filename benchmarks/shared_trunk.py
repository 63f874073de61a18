"""Compares ensembles on one trunk or base with one reward model and with as many: parameters, memory, scoring time.

All sides score the same sequences. A repeat scores them by all members: one head, K heads of one trunk, K sets of
adapters on one base, or K models.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from common import (
    PAD_ID,
    Llama,
    compare,
    copy_weights,
    describe_machine,
    our_config,
    ragged_lengths,
    ragged_sequences,
    random_weights,
    start_runtime,
)
from sides import Side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    sequences: int
    members: int
    shape: Llama


@dataclass(frozen=True)
class _Tokenizer:
    """The part of a tokenizer that scoring reads."""

    pad_id: int = PAD_ID


def members(options: Options, heads: int, models: int) -> Side:
    """``heads`` members on each of ``models`` trunks; the first member is the same one in every side."""
    from nemo_advrm.engine.model import build_model
    from nemo_advrm.rewards.shared_trunk import SharedTrunk

    start_runtime()
    cfg, shape = our_config(options.shape), options.shape
    trunks = []
    for seed in range(models):
        model = build_model(
            cfg.model,
            cfg.precision,
            "reward",
            shape.vocab,
            seed=seed,
            trainable=False,
            head_outputs=heads,
            heads=heads,
        )
        own = model.parts[0].head.weight.clone()
        copy_weights(model, random_weights(shape, "reward", seed))
        model.parts[0].head.weight[1:] = own[1:]
        trunks.append(SharedTrunk(model, _Tokenizer()))  # type: ignore[arg-type]
    rows = _rows(options)

    def first_member(wanted: list[list[int]]) -> Tensor:
        read = [trunk.scores(wanted) for trunk in trunks for _ in range(heads)]  # each member asks for its column
        return read[0].reshape(len(wanted), -1)[:, 0]

    def work() -> float:
        # the trunk knows the scores of the last rows: another order makes them others, as in every step of a training
        rows.append(rows.pop(0))
        first_member(list(rows))
        return len(rows)

    return Side(lambda: first_member(list(rows)).numpy(), work)


def adapters(options: Options) -> Side:
    """The members as adapters of ``model.lora`` on one base; they add nothing yet, which costs the same."""
    from nemo_advrm.engine.lora import AdapterSet, to_fill
    from nemo_advrm.engine.model import build_model
    from nemo_advrm.engine.scoring import score_sequences

    start_runtime()
    cfg, shape = our_config(options.shape), options.shape
    cfg.model.peft = "lora"
    model = build_model(cfg.model, cfg.precision, "reward", shape.vocab, seed=0, trainable=False)
    copy_weights(model, random_weights(shape, "reward", 0))
    sets = []
    for _ in range(options.members):
        with to_fill(model.parts, cfg.model, cfg.model.lora) as filled:
            sets.append(AdapterSet(filled, [(model.parts[0], copy.deepcopy(model.parts[0].head))]))
    rows = _rows(options)

    def by_all(wanted: list[list[int]]) -> Tensor:
        read = []
        for one in sets:
            with one.applied():
                read.append(score_sequences(model, wanted, PAD_ID))
        return read[0]

    def work() -> float:
        by_all(rows)
        return len(rows)

    return Side(lambda: by_all(rows).numpy(), work)


def _rows(options: Options) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = ragged_lengths(options.sequences, rng, options.shape.context)[:, 0]
    return ragged_sequences(lengths, rng, options.shape.vocab)


def print_parameters(options: Options) -> None:
    from nemo_advrm.engine.parameters import adapter_parameters, model_parameters

    model, vocab = our_config(options.shape).model, options.shape.vocab
    one, shared = (model_parameters(model, "reward", vocab, count).total for count in (1, options.members))
    adapted = shared + options.members * model.num_layers * adapter_parameters(model, 1)
    sizes = {"1 head": one, "heads": shared, "adapter": adapted, "models": options.members * one}
    for name, total in sizes.items():
        print(f"parameters, {name:7} {4 * total / 2**20:8.3f} MiB in fp32, {total / one:.4f} of one model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    describe_machine()
    options = Options(args.sequences, args.members, Llama())
    print_parameters(options)
    sides: dict[str, Callable[..., Side]] = {
        f"{args.members} heads": partial(members, heads=args.members, models=1),
        "1 head": partial(members, heads=1, models=1),
        f"{args.members} sets of adapters": adapters,
        f"{args.members} models": partial(members, heads=1, models=args.members),
    }
    compare("scoring by all members", "sequences", sides, options, args.repeats)


if __name__ == "__main__":
    main()
