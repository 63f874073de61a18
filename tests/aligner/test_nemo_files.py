"""NeMo-Aligner 0.7.0 itself as counterpart: it writes what is read here, and reads what is written here."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convert_jobs
import pytest
import sentencepiece
import torch
from distributed import Worlds

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.nemo_aligner_rows import as_transcript, rows_of
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine.runtime import Layout, Runtime

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = "the cat sat on a mat and dog ran to red big house with small blue tree good bad answer yes no why because"
WORDS = TEXT.split()
TEXTS = ["the cat", "why is the sky blue", "a good answer because yes", "no no no", "x"]
ROWS = [[5, 6, 7, 8, 9, 20, 30, 12], [4, 5, 39, 38]]
STEPS = 4
# tokens that NeMo puts behind a SentencePiece vocabulary (its legacy mode), as its chat templates have them
SPECIAL = {"eos_token": "<end>", "pad_token": "<pad>", "bos_token": "<begin>", "sep_token": "<turn>"}
SPECIAL_TEXTS = ["<begin>the cat<turn> why<turn><end>", "no <turn>", "<turn>", "the cat", " <turn>  good<turn>", ""]
# 40 entries: a vocabulary that needs no padding, whose entries NeMo gives probability
VOCABULARY = 40
SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "encoder_seq_length": 64,
    "max_position_embeddings": 64,
    "make_vocab_size_divisible_by": 8,
    "data": {"data_impl": "jsonl"},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # gated, RMSNorm, grouped queries, partial rotary, no biases, untied
    "llama": {
        "ffn_hidden_size": 48,
        "num_query_groups": 2,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "bias": False,
        "position_embedding_type": "rope",
        "rotary_percentage": 0.5,
        "share_embeddings_and_output_weights": False,
    },
    # squared ReLU, LayerNorm, biases, learned positions
    "gpt": {
        "ffn_hidden_size": 64,
        "activation": "squared-relu",
        "normalization": "layernorm",
        "bias": True,
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": False,
    },
}
# NeMo-Aligner cannot start a reward model from an actor without an output layer of its own
ARCHITECTURES["tied"] = {**ARCHITECTURES["llama"], "share_embeddings_and_output_weights": True}
REWARD_MODELS = ("llama", "gpt")


@dataclass
class Written:
    """What NeMo-Aligner wrote, and what it computes with it."""

    actors: dict[str, Path]
    reward_models: dict[str, Path]
    losses: dict[str, list[float]]
    scores: dict[str, list[float]]
    log_probs: dict[str, list[list[float]]]
    ids: list[list[int]]
    special: dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    lines = "\n".join(" ".join(draw.choice(WORDS) for _ in range(12)) for _ in range(300))
    (directory / "corpus.txt").write_text(lines)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tok"),
        vocab_size=VOCABULARY,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_id=0,
        num_threads=1,
        minloglevel=2,
    )
    return directory / "tok.model"


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Original pairs and the pairs of an attack, as NeMo-Aligner's jsonl."""
    directory, draw = tmp_path_factory.mktemp("data"), random.Random(1)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    originals = [{"prompt": text(4), "chosen": f"good {text(2)}", "rejected": f"bad {text(2)}"} for _ in range(12)]
    write_jsonl_atomic(directory / "original.jsonl", originals)
    facts = Provenance(1, 2, 1, 0, (1.0, 0.0), (2.0, -1.0), 3.0, "policy", (0.5, 0.5))
    pairs = [AdversarialPair((), f"good {text(3)}", f"bad {text(3)}", facts) for _ in range(12)]
    store = PairStore(directory / "pairs.jsonl")
    store.append(pairs)
    rows = [*load_preferences(directory / "original.jsonl").rows, *store.to_preferences()]
    lines = (row for pair in rows for row in rows_of(pair, as_transcript))
    write_jsonl_atomic(directory / "augmented.jsonl", lines)
    return directory / "augmented.jsonl"


@pytest.fixture(scope="module")
def written(
    aligner: Callable[..., list[Any]], tokenizer: Path, augmented: Path, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    """Actors, and reward models trained from them on our pairs, all made by one process."""
    directory = tmp_path_factory.mktemp("nemo")
    section = {"library": "sentencepiece", "type": None, "model": str(tokenizer), "sentencepiece_legacy": False}
    actors = {name: directory / f"{name}_actor.nemo" for name in ARCHITECTURES}
    reward_models = {name: directory / f"{name}_rm.nemo" for name in REWARD_MODELS}
    jobs: list[tuple[str, dict[str, Any]]] = []
    for name, architecture in ARCHITECTURES.items():
        model = {**SHAPE, **architecture, "tokenizer": {**section, "vocab_file": None, "merge_file": None}}
        jobs.append(("create", {"model": model, "out": str(actors[name])}))
    jobs += [("log_probs", {"path": str(path), "rows": ROWS}) for path in actors.values()]
    training = {"data": str(augmented), "steps": STEPS, "texts": TEXTS}
    jobs += [
        ("train_rm", {"base": str(actors[name]), "out": str(path), **training}) for name, path in reward_models.items()
    ]
    legacy = {**section, "sentencepiece_legacy": True, "special_tokens": SPECIAL}
    jobs.append(("tokenizer_ids", {"settings": legacy, "texts": SPECIAL_TEXTS}))
    jobs.append(("token_ids", {"path": str(actors["llama"]), "texts": TEXTS}))
    answers = aligner(*jobs)
    trained = dict(zip(REWARD_MODELS, answers[2 * len(actors) :], strict=False))
    return Written(
        actors,
        reward_models,
        {name: answer["losses"] for name, answer in trained.items()},
        {name: answer["scores"] for name, answer in trained.items()},
        dict(zip(ARCHITECTURES, answers[len(actors) :], strict=False)),
        answers[-1],
        answers[-2],
    )


def run(from_: str, path: Path, to: str, out: Path) -> Path:
    convert(ConvertConfig(from_=from_, path=str(path), to=to, out=str(out)), report=lambda line: None)
    return out


def log_probs(checkpoint: Path, row: list[int]) -> torch.Tensor:
    logits_SV = convert_jobs.logits(str(checkpoint), torch.tensor([row]))[0]
    return logits_SV.log_softmax(-1)[:-1].gather(1, torch.tensor(row)[1:, None])[:, 0]


def test_special_tokens_have_its_ids(written: Written, tokenizer: Path, tmp_path: Path) -> None:
    settings = {"library": "sentencepiece", "legacy": True, "special_tokens": SPECIAL}
    (tmp_path / "tokenizer_nemo.json").write_text(json.dumps(settings))
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    ours = build_tokenizer(f"hf:{tmp_path}")
    assert [ours.encode(text) for text in SPECIAL_TEXTS] == written.special["ids"]
    assert (ours.eos_id, ours.vocab_size) == (written.special["eos"], written.special["size"])


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_its_training_takes_our_augmented_pairs(written: Written, name: str) -> None:
    losses = written.losses[name]
    assert len(losses) == STEPS and losses[-1] < losses[0]


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_its_reward_model_scores_equally_here(
    single: Runtime, worlds: Worlds, written: Written, name: str, tmp_path: Path
) -> None:
    out = run("nemo", written.reward_models[name], "megatron", tmp_path / "megatron")
    tokenizer = build_tokenizer(f"hf:{out / 'tokenizer'}")
    rows = [tokenizer.encode_prompt(()) + tokenizer.encode_response(text) for text in TEXTS]
    assert rows == written.ids
    wanted = torch.tensor(written.scores[name])
    assert wanted.std() > 0.02
    torch.testing.assert_close(convert_jobs.scores(str(out), rows), wanted, **TOLERANCE)
    for there in worlds.run(Layout(tensor=2), "convert_jobs", "scores", path=str(out), sequences=rows):
        torch.testing.assert_close(there, wanted, **TOLERANCE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_actor_has_equal_log_probs_here(single: Runtime, written: Written, name: str, tmp_path: Path) -> None:
    out = run("nemo", written.actors[name], "megatron", tmp_path / "megatron")
    for row, wanted in zip(ROWS, written.log_probs[name], strict=True):
        torch.testing.assert_close(log_probs(out, row), torch.tensor(wanted), **TOLERANCE)


def test_what_is_written_here_computes_equally_there(
    aligner: Callable[..., list[Any]], written: Written, tmp_path: Path
) -> None:
    def rewritten(path: Path) -> str:
        middle = run("nemo", path, "megatron", tmp_path / path.stem)
        return str(run("megatron", middle, "nemo", tmp_path / path.name))

    answers = aligner(
        *(("score", {"path": rewritten(path), "texts": TEXTS}) for path in written.reward_models.values()),
        *(("log_probs", {"path": rewritten(path), "rows": ROWS}) for path in written.actors.values()),
    )
    scores, log_probs_there = answers[: len(REWARD_MODELS)], answers[len(REWARD_MODELS) :]
    for found, wanted in zip(scores, written.scores.values(), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), **TOLERANCE)
    for rows, wanted_rows in zip(log_probs_there, written.log_probs.values(), strict=True):
        for row, wanted_row in zip(rows, wanted_rows, strict=True):
            torch.testing.assert_close(torch.tensor(row), torch.tensor(wanted_row), **TOLERANCE)
