"""A drop-in model differs from the original in its weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import run
from hf_tokenizers import save_hf
from reward_members import save_hf_reward
from safetensors.torch import load_file, save_file

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import open_source
from nemo_advrm.convert.drop_in import body_and_head_dtype, write_drop_in
from nemo_advrm.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_and_tensors_are_the_originals_but_for_the_trained_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    original = save_hf_reward(tmp_path / "rm")  # its padding token is its end token, which convert to=hf would change
    weights = {name: tensor.to(dtype) for name, tensor in load_file(original / "model.safetensors").items()}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(3.0)}  # of older versions
    save_file(weights | buffers, original / "model.safetensors", metadata={"format": "pt"})
    (original / "README.md").write_text("Best accuracy: 0.99")
    (original / "LICENSE").write_text("MIT")
    (original / "evil.py").write_text("raise SystemExit")
    trained = tmp_path / "trained"
    run("hf", save_hf_reward(tmp_path / "other", seed=1), "megatron", trained)

    write_drop_in("hf", original, trained, tmp_path / "out", "Hardened.")

    out = tmp_path / "out"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (original / name).read_bytes(), name
    assert not (out / "evil.py").exists()
    assert "0.99" not in (out / "README.md").read_text() and "Hardened." in (out / "README.md").read_text()
    theirs, ours = load_file(tmp_path / "other" / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == weights.keys() | buffers.keys()
    for name in weights:
        torch.testing.assert_close(ours[name], theirs[name].to(dtype), rtol=0, atol=0)
        assert ours[name].dtype == dtype
    with pytest.raises(CheckpointError, match="already exists"):
        write_drop_in("hf", original, trained, out, "")


def test_a_head_in_fp32_of_a_bf16_model_stays_so_in_every_format(tmp_path: Path) -> None:
    original = save_hf_reward(tmp_path / "rm")
    weights = load_file(original / "model.safetensors")
    mixed = {name: tensor if name == "score.weight" else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(mixed, original / "model.safetensors", metadata={"format": "pt"})
    megatron, nemo = tmp_path / "megatron", tmp_path / "rm.nemo"
    run("hf", original, "megatron", megatron)
    run("megatron", megatron, "nemo", nemo)
    trained = tmp_path / "trained"
    run("hf", save_hf_reward(tmp_path / "other", seed=1), "megatron", trained)
    theirs = load_file(tmp_path / "other" / "model.safetensors")["score.weight"]
    assert not torch.equal(theirs, theirs.bfloat16().float())
    for kind, before, name in (("hf", original, "out"), ("megatron", megatron, "ours"), ("nemo", nemo, "ours.nemo")):
        write_drop_in(kind, before, trained, tmp_path / name, "")
        with open_source(ConvertConfig(from_=kind, path=str(tmp_path / name))) as source:
            assert body_and_head_dtype(source) == (torch.bfloat16, torch.float32)
            torch.testing.assert_close(source.read("head.weight"), theirs, rtol=0, atol=0)


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    original, trained = save_hf_reward(tmp_path / "rm"), tmp_path / "trained"
    run("hf", save_hf_reward(tmp_path / "small", num_hidden_layers=2), "megatron", trained)
    with pytest.raises(CheckpointError, match=r"is no training of .*rm: tensors that only one of them has"):
        write_drop_in("hf", original, trained, tmp_path / "out", "")
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_and_a_nemo_file_stay_what_they_are(tmp_path: Path) -> None:
    tokenizer = save_hf(tmp_path / "tokenizer", template=None, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    megatron, nemo = tmp_path / "megatron", tmp_path / "rm.nemo"
    run("hf", save_hf_reward(tmp_path / "rm", template=None), "megatron", megatron, dtype="bf16")
    run("megatron", megatron, "nemo", nemo, tokenizer=str(tokenizer))
    trained = tmp_path / "trained"
    run("megatron", megatron, "megatron", trained, dtype="fp32")
    write_drop_in("megatron", megatron, trained, tmp_path / "out", "")
    write_drop_in("nemo", nemo, trained, tmp_path / "out.nemo", "")
    original = load_file(tmp_path / "rm" / "model.safetensors")
    for kind, path in (("megatron", tmp_path / "out"), ("nemo", tmp_path / "out.nemo")):
        again = tmp_path / f"{kind}_again"
        run(kind, path, "hf", again, drop_head_bias=True)
        weights = load_file(again / "model.safetensors")
        assert weights["score.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(weights["score.weight"], original["score.weight"].bfloat16(), rtol=0, atol=0)
