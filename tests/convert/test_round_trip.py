"""Hugging Face -> Megatron -> Hugging Face: equal logits and scores at every step, equal bits at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import convert_jobs
import pytest
import torch
from conftest import run
from distributed import Worlds
from hf_models import ARCHITECTURES
from safetensors.torch import load_file, save_file
from tiny import TOKENIZER, VOCABULARY, sequences, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LAYOUTS = {"tp2": Layout(tensor=2), "pp2": Layout(pipeline=2)}
TOKENS_BS = torch.randint(3, 67, (3, 17), generator=torch.Generator().manual_seed(0))
# rows of unequal length that end in eos (2)
SEQUENCES = [[*TOKENS_BS[i % 3, : 3 + 2 * i].tolist(), 2] for i in range(7)]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
    assert there.keys() == here.keys() and len(here) > 20
    for name, tensor in here.items():
        assert there[name].dtype == tensor.dtype and torch.equal(there[name], tensor), name


@torch.no_grad()
def hf_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(TOKENS_BS).logits


@torch.no_grad()
def hf_scores(directory: Path, side: str, sequences: list[list[int]] = SEQUENCES) -> torch.Tensor:
    """Scores of one padded batch by the classifier's own forward."""
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    length = max(map(len, sequences))
    pad = model.config.pad_token_id
    rows, masks = [], []
    for row in sequences:
        filler, hidden = [pad] * (length - len(row)), [0] * (length - len(row))
        rows.append([*row, *filler] if side == "right" else [*filler, *row])
        masks.append([*[1] * len(row), *hidden] if side == "right" else [*hidden, *[1] * len(row)])
    return model.eval()(torch.tensor(rows), attention_mask=torch.tensor(masks)).logits[:, 0]


@pytest.mark.platform
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_language_model_keeps_its_logits_and_bits(
    single: Runtime, worlds: Worlds, saved: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    source = saved(name)
    wanted = hf_logits(source)
    assert wanted.std() > 0.05

    run("hf", source, "megatron", tmp_path / "megatron")
    torch.testing.assert_close(convert_jobs.logits(str(tmp_path / "megatron"), TOKENS_BS), wanted, **TOLERANCE)
    for layout in LAYOUTS.values():
        for there in worlds.run(layout, "convert_jobs", "logits", path=str(tmp_path / "megatron"), tokens_BS=TOKENS_BS):
            torch.testing.assert_close(there, wanted, **TOLERANCE)

    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), wanted, **TOLERANCE)
    assert_same_bits(weights(tmp_path / "hf"), weights(source))


@pytest.mark.platform
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reward_model_keeps_its_scores_and_bits_in_padded_batches(
    single: Runtime, worlds: Worlds, saved: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    source = saved(name, reward=True)
    wanted = hf_scores(source, "right")
    assert wanted.std() > 0.05

    run("hf", source, "megatron", tmp_path / "megatron")
    torch.testing.assert_close(convert_jobs.scores(str(tmp_path / "megatron"), SEQUENCES), wanted, **TOLERANCE)
    for layout in LAYOUTS.values():
        for there in worlds.run(layout, "convert_jobs", "scores", path=str(tmp_path / "megatron"), sequences=SEQUENCES):
            torch.testing.assert_close(there, wanted, **TOLERANCE)

    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    for side in ("right", "left"):
        torch.testing.assert_close(hf_scores(tmp_path / "hf", side), wanted, **TOLERANCE)
    assert_same_bits(weights(tmp_path / "hf"), weights(source))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "reward"} and config["problem_type"] == "regression"
    assert config["pad_token_id"] != config["eos_token_id"]


def test_padding_that_is_the_end_token_is_replaced(single: Runtime, saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("llama3", reward=True, pad_token_id=2)
    run("hf", source, "megatron", tmp_path / "megatron")
    wanted = convert_jobs.scores(str(tmp_path / "megatron"), SEQUENCES)
    # as it is, the classifier reads the score before the end token
    assert (hf_scores(source, "right") - wanted).abs().min() > 1e-3

    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    for side in ("right", "left"):
        torch.testing.assert_close(hf_scores(tmp_path / "hf", side), wanted, **TOLERANCE)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["pad_token_id"] == 67 and config["vocab_size"] == 68
    ours, theirs = weights(tmp_path / "hf"), weights(source)
    name = "model.embed_tokens.weight"
    assert torch.equal(ours[name][:67], theirs[name]) and ours[name].shape[0] == 68


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sharded_half_precision_files_keep_their_bits(
    single: Runtime, saved: Callable[..., Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    source = saved("qwen2", dtype=dtype, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    wanted = hf_logits(source)

    run("hf", source, "megatron", tmp_path / "megatron")
    # the fp32 engine opens half-precision weights by casting them
    torch.testing.assert_close(convert_jobs.logits(str(tmp_path / "megatron"), TOKENS_BS), wanted, **TOLERANCE)

    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf", max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert max(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")) < 34_000
    assert_same_bits(weights(tmp_path / "hf"), weights(source))
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), wanted, **TOLERANCE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_dtype_converts(saved: Callable[..., Path], tmp_path: Path) -> None:
    run("hf", saved("llama2"), "hf", tmp_path / "hf", dtype="bf16")
    before, after = weights(saved("llama2")), weights(tmp_path / "hf")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())


def test_a_number_too_large_for_the_format_is_refused_by_name(saved: Callable[..., Path], tmp_path: Path) -> None:
    run("hf", saved("llama2"), "hf", tmp_path / "large")
    tensors = weights(tmp_path / "large")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.final_layernorm\.weight holds 1e\+05.*dtype=float16"):
        run("hf", tmp_path / "large", "hf", tmp_path / "hf", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    run("hf", tmp_path / "large", "hf", tmp_path / "hf", dtype="bf16")


def test_the_card_of_a_round_has_its_reference_scores(saved: Callable[..., Path], tmp_path: Path) -> None:
    home = tmp_path / "run" / "round_2"
    run("hf", saved("llama3", reward=True), "megatron", home / "rm_2" / "model")
    scores = {0: [[9, 1], [9, 3]], 1: [[9, 5], [9, 11]]}  # member 2: mean 5, around 2 and 8 by 1, 1, 3, 3
    rows = [
        {"prompt_id": p, "messages": [{"role": "user", "content": "?"}], "response": "!", "scores": pair}
        for p, pairs in scores.items()
        for pair in pairs
    ]
    (home / "reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("megatron", home / "rm_2" / "model", "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Rounds of adversarial training: 2\n" in card and "Mean score of reference responses: 5\n" in card
    # 20 in squares over 4 - 2 degrees of freedom, and the error of a mean of 2: what a z of the run is in units of
    assert f"a new response's score from the prompt's reference mean: {(20 / 2 * 1.5) ** 0.5:.6g}\n" in card


def test_a_checkpoint_for_many_ranks_is_padded_to_them(
    worlds: Worlds, saved: Callable[..., Path], tmp_path: Path
) -> None:
    source = saved("llama2", num_attention_heads=12, num_key_value_heads=12, intermediate_size=96, hidden_size=96)
    run("hf", source, "megatron", tmp_path / "megatron", tensor_model_parallel_size=12)
    meta = json.loads((tmp_path / "megatron" / "meta.json").read_text())
    assert meta["vocab_size"] == 96 and meta["model"]["vocab_size"] == 67
    for there in worlds.run(
        Layout(tensor=2), "convert_jobs", "logits", path=str(tmp_path / "megatron"), tokens_BS=TOKENS_BS
    ):
        torch.testing.assert_close(there, hf_logits(source), **TOLERANCE)
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    assert_same_bits(weights(tmp_path / "hf"), weights(source))


@pytest.mark.platform
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), Layout(context=2)], ids=[*LAYOUTS, "cp2"])
def test_a_reward_model_saved_at_any_layout_is_exported(
    single: Runtime, worlds: Worlds, layout: Layout, tmp_path: Path
) -> None:
    ours = str(tmp_path / "ours")
    worlds.run(layout, "convert_jobs", "save_reward_model", path=ours)
    run("megatron", tmp_path / "ours", "hf", tmp_path / "hf")
    rows = [[*row, TOKENIZER.eos_id] for row in sequences(6, longest=12)]
    wanted = convert_jobs.scores(ours, rows)
    assert wanted.std() > 0.05
    for side in ("right", "left"):
        torch.testing.assert_close(hf_scores(tmp_path / "hf", side, rows), wanted, **TOLERANCE)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Optimizer steps: 12" in card and "tokenizer `synthetic`" in card

    run("hf", tmp_path / "hf", "megatron", tmp_path / "again")
    torch.testing.assert_close(convert_jobs.scores(str(tmp_path / "again"), rows), wanted)


def test_a_head_bias_is_dropped_only_when_asked(single: Runtime, saved: Callable[..., Path], tmp_path: Path) -> None:
    run("hf", saved("llama3", reward=True), "megatron", tmp_path / "plain")
    convert_jobs.add_head_bias(str(tmp_path / "plain"), str(tmp_path / "biased"), 0.75)
    with pytest.raises(CheckpointError, match=r"bias 0\.75.*drop_head_bias=true"):
        run("megatron", tmp_path / "biased", "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    run("megatron", tmp_path / "biased", "hf", tmp_path / "hf", drop_head_bias=True)
    wanted = convert_jobs.scores(str(tmp_path / "biased"), SEQUENCES)
    torch.testing.assert_close(hf_scores(tmp_path / "hf", "right") + 0.75, wanted, **TOLERANCE)
    assert "bias 0.75 was left out" in (tmp_path / "hf" / "README.md").read_text()


def test_what_hugging_face_has_no_class_for_is_refused(single: Runtime, tmp_path: Path) -> None:
    cfg = tiny_config("llama")
    for head, outputs, word in (("value", 1, "critic"), ("reward", 3, "3 outputs")):
        model = build_model(cfg.model, cfg.precision, head, VOCABULARY, seed=0, trainable=False, head_outputs=outputs)  # type: ignore[arg-type]
        checkpoint.save(tmp_path / head, model)
        with pytest.raises(CheckpointError, match=word):
            run("megatron", tmp_path / head, "hf", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


def test_a_run_with_short_sequences_does_not_shorten_the_exported_model(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    source = saved("llama3", reward=True)
    longest = json.loads((source / "config.json").read_text())["max_position_embeddings"]
    run("hf", source, "megatron", tmp_path / "megatron")
    path = tmp_path / "megatron" / "meta.json"
    meta = json.loads(path.read_text())
    for run_length, wanted in ((longest // 2, longest), (2 * longest, 2 * longest)):
        meta["model"]["encoder_seq_length"] = run_length
        path.write_text(json.dumps(meta))
        out = tmp_path / f"hf{run_length}"
        run("megatron", tmp_path / "megatron", "hf", out)
        assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == wanted
    # the template has written the special tokens, bos too
    assert "padding=True, add_special_tokens=False)" in (out / "README.md").read_text()
