"""Adversarial pairs in NeMo-Aligner's reward model training, by the example script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plugin
import pytest
import sentencepiece
import torch

from nemo_advrm.data.mixing import draw_replacements
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.integrations.nemo_aligner.rollout_reader import as_prompt

STEPS, BATCH, RATIO = 3, 4, 0.5
FACTS = Provenance(0, 1, 1, 0, (1.0, 0.0), (2.0, -1.0), 3.0, "attack/policy/model", (0.5, 0.5))
ADVERSARIAL = [AdversarialPair(as_prompt("the cat"), f" ran to {w}", f" sat {w} {w}", FACTS) for w in ("mat", "tree")]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_share_of_every_batch_is_adversarial(
    aligner: Callable[..., list[Any]], files: plugin.Files, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    PairStore(tmp_path / "store.jsonl").append(ADVERSARIAL)
    pairs = files.prompts.with_name("pairs.jsonl")
    plugin.run_script(
        plugin.EXAMPLES / "train_reward_model_adversarial.py",
        tmp_path,
        f"pretrained_checkpoint.restore_from_path={files.actor}",
        f"model.data.data_prefix={{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
        f"augmentation.pairs_path=[{tmp_path / 'store.jsonl'}]",
        f"augmentation.ratio={RATIO}",
        "model.encoder_seq_length=64",
        "model.micro_batch_size=2",
        f"model.global_batch_size={BATCH}",
        f"trainer.rm.max_steps={STEPS}",
        f"trainer.rm.val_check_interval={STEPS}",
        f"++model.tensor_model_parallel_size={tensor}",
        f"++model.make_vocab_size_divisible_by={8 // tensor}",  # the vocabulary is padded alike at every size
        f"++model.pipeline_model_parallel_size={pipeline}",
        f"exp_manager.checkpoint_callback_params.model_parallel_size={tensor * pipeline}",
        processes=tensor * pipeline,
    )
    texts = [json.loads(line)["text"] for line in pairs.read_text().splitlines()]
    chosen, rejected = (
        ["the cat" + answer for answer in answers]
        for answers in ([p.chosen for p in ADVERSARIAL], [p.rejected for p in ADVERSARIAL])
    )
    (nemo,) = (tmp_path / "run" / "checkpoints").glob("*.nemo")
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(files.prompts.with_name("tok.model")))
    ids = encoder.encode([*texts, *chosen, *rejected])
    known = {tuple(row) for row in ids[: len(texts)]}
    pool = [tuple(row) for row in ids[len(texts) :]]
    batches = [json.loads(line) for line in (tmp_path / "rm_batches.jsonl").read_text().splitlines()]
    assert len(batches) == STEPS
    for step, batch in enumerate(batches):
        placed = dict(draw_replacements(BATCH, len(ADVERSARIAL), RATIO, 1234, step))
        assert len(placed) == RATIO * BATCH
        for place, (one, two) in enumerate(zip(batch["chosen"], batch["rejected"], strict=True)):
            if place in placed:
                assert tuple(one) == pool[placed[place]] and tuple(two) == pool[len(ADVERSARIAL) + placed[place]]
            else:
                assert tuple(one) in known and tuple(two) in known
    # the saved file opens at another layout, and has learned what the batches taught
    (scores,) = aligner(("score", {"path": str(nemo), "texts": [*chosen, *rejected]}))
    better, worse = torch.tensor(scores).chunk(2)
    assert better.mean() > worse.mean()
    assert PairStore(tmp_path / "run" / "adversarial_pairs.jsonl").load() == ADVERSARIAL
