"""A reward model that NeMo-Aligner 0.7.0 wrote scores here as there; conversion to .nemo and back keeps every bit."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import convert_jobs
import pytest
import torch
import yaml
from conftest import full_disk, run
from distributed import Worlds
from test_nemo_archive import REAL, repacked
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.convert.megatron_checkpoint import MegatronSource
from nemo_advrm.convert.nemo_archive import NemoArchive
from nemo_advrm.convert.nemo_config import read_model, write_config
from nemo_advrm.convert.nemo_file import NemoSource
from nemo_advrm.convert.nemo_tokenizer_files import pack_tokenizer, unpack_tokenizer
from nemo_advrm.data.tokenizers import ByteTokenizer, build_tokenizer
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError, LayoutError
from nemo_advrm.rewards.sources import check, load_members, parse
from nemo_advrm.rewards.token_sequences import encode_rendered
from nemo_advrm.rollouts.types import Rollouts

KNOWN = json.loads(REAL.with_suffix(".json").read_text())
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
CRITIC = "nemo_aligner.models.nlp.gpt.megatron_gpt_critic.MegatronGPTCriticModel"
LAYOUTS = {"tp2": Layout(tensor=2), "pp2": Layout(pipeline=2)}


def ids(checkpoint: Path) -> list[list[int]]:
    tokenizer = build_tokenizer(f"hf:{checkpoint / 'tokenizer'}")
    return [tokenizer.encode_prompt(()) + tokenizer.encode_response(text) for text in KNOWN["texts"]]


def tensors(source: Any) -> dict[str, torch.Tensor]:
    with source:
        return {name: source.read(name) for name in source.specs}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and left
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nemo") / "megatron"
    run("nemo", REAL, "megatron", out)
    return out


def test_the_scores_are_those_of_nemo_aligner_at_every_layout(single: Runtime, worlds: Worlds, imported: Path) -> None:
    wanted = torch.tensor(KNOWN["scores"])
    assert wanted.std() > 0.1
    torch.testing.assert_close(convert_jobs.scores(str(imported), ids(imported)), wanted, **TOLERANCE)
    for layout in LAYOUTS.values():
        for there in worlds.run(layout, "convert_jobs", "scores", path=str(imported), sequences=ids(imported)):
            torch.testing.assert_close(there, wanted, **TOLERANCE)


def test_a_nemo_file_is_a_member_of_an_ensemble_with_its_own_tokenizer(single: Runtime, tmp_path: Path) -> None:
    cfg, texts = Config(run_dir=str(tmp_path / "run")), KNOWN["texts"]
    empty: list[list[int]] = [[] for _ in texts]
    rollouts = Rollouts([() for _ in texts], texts, [True for _ in texts], empty, empty, [0 for _ in texts], "another")
    spec = parse(f"nemo:{REAL}", "ensemble.members[0]")
    check(spec, cfg, 1)
    (member,) = load_members(cfg, [spec.text], ByteTokenizer())
    torch.testing.assert_close(member.score(rollouts), torch.tensor(KNOWN["scores"]), **TOLERANCE)
    (made,) = (tmp_path / "run" / "members").iterdir()
    before = (made / "meta.json").stat().st_mtime_ns
    (again,) = load_members(cfg, [spec.text], ByteTokenizer())
    assert torch.equal(again.score(rollouts), member.score(rollouts))
    assert (made / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(LayoutError, match=r"ensemble\.members\[0\]"):
        check(spec, Config(model=ModelConfig(tensor_model_parallel_size=64)), 64)


def test_nemo_to_megatron_to_nemo_keeps_every_bit_and_the_tokenizer(imported: Path, tmp_path: Path) -> None:
    run("megatron", imported, "nemo", tmp_path / "again.nemo")
    run("nemo", tmp_path / "again.nemo", "megatron", tmp_path / "megatron")
    first, again = tensors(NemoSource(REAL)), tensors(NemoSource(tmp_path / "again.nemo"))
    same_bits(first, again)
    same_bits(first, tensors(MegatronSource(tmp_path / "megatron")))
    assert ids(imported) == ids(tmp_path / "megatron")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["again.nemo", "megatron"]


def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(imported: Path, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(CheckpointError, match="could not be written"):
        run("megatron", imported, "nemo", tmp_path / "out.nemo")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer with the 67 entries of the tiny models."""
    from transformers import PreTrainedTokenizerFast

    entries = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 67)}}
    fast = FastTokenizer(WordLevel(entries, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    out = tmp_path_factory.mktemp("words")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("name", "reward", "options"),
    [
        ("llama2", True, {}),
        ("llama3", False, {}),
        ("llama31", False, {}),
        ("llama_tied", False, {"dtype": torch.bfloat16}),
        ("qwen2", True, {}),
        ("nemotron", False, {}),
    ],
)
def test_megatron_to_nemo_to_megatron_keeps_every_bit(
    saved: Callable[..., Path], words: Path, name: str, reward: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    run("hf", saved(name, reward=reward, **options), "megatron", tmp_path / "there")
    run("megatron", tmp_path / "there", "nemo", tmp_path / "file.nemo", tokenizer=str(words))
    run("nemo", tmp_path / "file.nemo", "megatron", tmp_path / "back", tokenizer=str(words))
    there, back = MegatronSource(tmp_path / "there"), MegatronSource(tmp_path / "back")
    mine, theirs = tensors(back), tensors(there)
    if reward:
        assert not mine.pop("head.bias").any()  # NeMo-Aligner's heads have one
    same_bits(theirs, mine)
    wanted, found = there.description.model, back.description.model
    for key in ("rotary_base", "rotary_percent", "rope_scaling", "activation", "normalization", "qkv_bias", "bias"):
        assert getattr(found, key) == getattr(wanted, key), key
    assert found.head_bias == reward and back.description.head == there.description.head


@pytest.mark.parametrize("name", ["gemma2", "mistral", "qwen3"])
def test_what_nemo_cannot_compute_is_not_written(
    saved: Callable[..., Path], words: Path, name: str, tmp_path: Path
) -> None:
    run("hf", saved(name), "megatron", tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"cannot be written as a \.nemo"):
        run("megatron", tmp_path / "there", "nemo", tmp_path / "file.nemo", tokenizer=str(words))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_nemo_needs_a_tokenizer_and_its_name(saved: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    run("hf", saved("llama2"), "megatron", tmp_path / "there")
    with pytest.raises(CheckpointError, match="set tokenizer=DIR"):
        run("megatron", tmp_path / "there", "nemo", tmp_path / "file.nemo")
    with pytest.raises(CheckpointError, match=r"must end in \.nemo"):
        run("megatron", tmp_path / "there", "nemo", tmp_path / "file", tokenizer=str(words))
    local = shutil.copytree(words, tmp_path / "words")
    run("megatron", tmp_path / "there", "nemo", tmp_path / "file.nemo", tokenizer=str(local))
    # named by its directory: read while that is there
    run("nemo", tmp_path / "file.nemo", "megatron", tmp_path / "out")
    assert build_tokenizer(f"hf:{tmp_path / 'out' / 'tokenizer'}").encode("w5 w66") == [5, 66]
    with pytest.raises(CheckpointError, match="temporary"):
        run("nemo", tmp_path / "file.nemo", "nemo", tmp_path / "again.nemo")
    shutil.rmtree(local)
    with pytest.raises(CheckpointError, match=r"which a \.nemo file does not contain.*tokenizer=DIR"):
        run("nemo", tmp_path / "file.nemo", "megatron", tmp_path / "gone")


def config(**changes: Any) -> dict[str, Any]:
    with tarfile.open(REAL) as archive:
        stream = archive.extractfile("./model_config.yaml")
        assert stream is not None
        return {**yaml.safe_load(stream.read()), **changes}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mcore_gpt", False),
        ("num_moe_experts", 8),
        ("rotary_interleaved", True),
        ("seq_len_interpolation_factor", 4),
        ("window_size", [128, 0]),
        ("activation", "reglu"),
        ("normalization", "batchnorm"),
        ("position_embedding_type", "alibi"),
        ("openai_gelu", True),
        ("qk_layernorm", True),
        ("name", "megatron_falcon_gpt"),
        ("mcore_customization_config", {"final_logit_softcapping": 30.0}),
        ("reset_position_ids", True),
        ("output_sequence", True),
        ("use_avg_pool", True),
        ("hidden_size", "many"),
        ("num_layers", None),
        ("layernorm_epsilon", None),
        ("hidden_dropout", None),
        ("encoder_seq_length", None),
        ("make_vocab_size_divisible_by", None),
    ],
)
def test_settings_that_change_the_result_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key):
        read_model(config(**{key: value}), "file.nemo")


@pytest.mark.parametrize("key", ["scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"])
def test_a_factor_of_the_scaled_positions_that_is_null_or_0_is_not_the_default(key: str) -> None:
    scaled = config(target="x.GPTSFTModel", scale_positional_embedding=True)
    with pytest.raises(CheckpointError, match=f"{key}=null is not a number"):
        read_model({**scaled, key: None}, "file.nemo")
    with pytest.raises(CheckpointError, match=f"{key}=0 is not a number above 0"):
        read_model({**scaled, key: 0}, "file.nemo")


def test_a_size_that_is_null_is_megatrons_default() -> None:
    model, _ = read_model(config(ffn_hidden_size=None, num_query_groups=None, kv_channels=None), "file.nemo")
    assert model.ffn_hidden_size == 4 * model.hidden_size
    assert (model.num_query_groups, model.kv_channels) == (0, 0)


def test_the_architecture_is_read_and_written_back() -> None:
    model, head = read_model(config(), "file.nemo")
    assert head == "reward" and model.head_bias and not model.share_embeddings_and_output_weights
    assert (model.activation, model.normalization, model.rotary_percent) == ("swiglu", "RMSNorm", 0.5)
    assert (model.num_layers, model.ffn_hidden_size, model.num_query_groups) == (2, 24, 2)
    for change in (
        {"normalization": "layernorm1p", "activation": "squared-relu"},
        {
            "normalization": "LayerNorm",
            "activation": "gelu",
            "bias": True,
            "position_embedding_type": "learned_absolute",
        },
        {"layernorm_zero_centered_gamma": True, "qkv_bias": True, "rotary_base": 500000},
        {"activation": "geglu"},
        {"activation": "geglu", "bias_activation_fusion": True},
    ):
        model, head = read_model(config(**change), "file.nemo")
        assert read_model(write_config(model, head, 1, {}), "again") == (replace(model, kv_channels=4), head)
    model, head = read_model(config(target="x.GPTSFTModel", scale_positional_embedding=True), "file.nemo")
    assert (head, model.rope_scaling, model.rope_scaling_factor) == ("lm", "llama3", 8.0)
    assert read_model(write_config(model, head, 1, {}), "again") == (replace(model, kv_channels=4), head)


def test_fused_kernels_make_another_gelu() -> None:
    unset = {key: value for key, value in config().items() if key != "bias_activation_fusion"}
    assert read_model({**unset, "activation": "fast-geglu"}, "file.nemo")[0].activation == "geglu_tanh"
    assert read_model(config(activation="geglu"), "file.nemo")[0].activation == "geglu"
    assert read_model(config(activation="gelu", bias=True), "file.nemo")[0].activation == "gelu"
    with pytest.raises(CheckpointError, match="bias_activation_fusion"):
        read_model({**unset, "activation": "gelu", "bias": True}, "file.nemo")
    assert write_config(ModelConfig(activation="swiglu"), "reward", 1, {})["bias_activation_fusion"] is False


def rewritten(target: Path, /, **changes: Any) -> Path:
    text = yaml.safe_dump(config(**changes)).encode()
    return repacked(target, lambda name, data: text if name == "model_config.yaml" else data)


def test_a_standardised_reward_becomes_part_of_the_head(single: Runtime, imported: Path, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "s.nemo", reward_standardization={"enable": True, "mean": 0.5, "std": 2.0})
    run("nemo", path, "megatron", tmp_path / "out")
    wanted = (torch.tensor(KNOWN["scores"]) - 0.5) / 2
    torch.testing.assert_close(convert_jobs.scores(str(tmp_path / "out"), ids(imported)), wanted, **TOLERANCE)


def test_a_critic_gives_every_token_the_reward_of_the_text_up_to_it(
    single: Runtime, imported: Path, tmp_path: Path
) -> None:
    standard = {"enable": True, "mean": 0.5, "std": 2.0}
    path = rewritten(tmp_path / "c.nemo", target=CRITIC, output_sequence=True, reward_standardization=standard)
    run("nemo", path, "megatron", tmp_path / "critic")
    rows = ids(imported)
    for row, found in zip(rows, convert_jobs.values(str(tmp_path / "critic"), rows), strict=True):
        rewards = convert_jobs.scores(str(imported), [row[:end] for end in range(1, len(row) + 1)])
        torch.testing.assert_close(torch.tensor(found), (rewards - 0.5) / 2, **TOLERANCE)
    with pytest.raises(CheckpointError, match="output_sequence=False"):
        NemoSource(rewritten(tmp_path / "d.nemo", target=CRITIC, output_sequence=False))
    with pytest.raises(CheckpointError, match="a critic cannot be written"):
        run("megatron", tmp_path / "critic", "nemo", tmp_path / "again.nemo")


def test_merged_attributes_become_one_reward() -> None:
    from nemo_advrm.convert.nemo_file import _head_transform

    settings = {"num_attributes": 3, "merge_attributes": True, "attribute_weights": [1.0, 0.0, -2.0]}
    head = _head_transform({"regression": settings}, "reward", "file")
    assert head is not None
    weight, bias = torch.randn(3, 8), torch.randn(3)
    x = torch.randn(5, 8)
    wanted = (x @ weight.T + bias) @ torch.tensor([1.0, 0.0, -2.0])
    found = x @ head.apply("head.weight", weight).T + head.apply("head.bias", bias)
    torch.testing.assert_close(found[:, 0], wanted)
    with pytest.raises(CheckpointError, match="attribute_weights"):
        _head_transform({"regression": {**settings, "attribute_weights": [1.0]}}, "reward", "file")


def test_a_configuration_that_does_not_fit_the_tensors_names_them(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "wrong.nemo", bias=True, ffn_hidden_size=32)
    with pytest.raises(CheckpointError, match=r"linear_qkv\.bias.*linear_fc2\.weight is \[16, 24\] but should be"):
        NemoSource(path)


def test_the_attributes_must_be_those_of_the_head(tmp_path: Path) -> None:
    for number, message in ((4, r"num_attributes=4, but the head has 1"), (0, "must be at least 1")):
        with pytest.raises(CheckpointError, match=message):
            NemoSource(rewritten(tmp_path / "a.nemo", regression={"num_attributes": number}))


def test_append_eod_decides_whether_a_text_ends_in_eos(imported: Path, tmp_path: Path) -> None:
    plain = build_tokenizer(f"hf:{imported / 'tokenizer'}")
    run("nemo", rewritten(tmp_path / "e.nemo", data={"append_eod": True}), "megatron", tmp_path / "out")
    ending = build_tokenizer(f"hf:{tmp_path / 'out' / 'tokenizer'}")
    assert plain.encode_prompt(()) == []
    assert ending.encode_response("the cat") == [*plain.encode_response("the cat"), plain.eos_id]
    assert plain.fingerprint != ending.fingerprint
    assert encode_rendered(plain, "the cat") == plain.encode("the cat")
    assert encode_rendered(ending, "the cat") == [*plain.encode("the cat"), plain.eos_id]
    assert encode_rendered(plain, "") == [plain.eos_id]  # nothing could be scored
    assert plain.decode_response([*plain.encode("the cat"), plain.eos_id, 5]) == "the cat"


def test_tokenizers_pickle_for_worker_processes(imported: Path) -> None:
    tokenizer = build_tokenizer(f"hf:{imported / 'tokenizer'}")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("why is") == tokenizer.encode("why is")


def test_a_hugging_face_export_has_the_ids_and_scores_of_nemo_aligner(single: Runtime, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # Hugging Face has no partial rotary embeddings for Llama
    path = rewritten(tmp_path / "full.nemo", rotary_percentage=1.0)
    run("nemo", path, "megatron", tmp_path / "megatron")
    run("nemo", path, "hf", tmp_path / "hf", drop_head_bias=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = ids(tmp_path / "megatron")
    assert [tokenizer(text).input_ids for text in KNOWN["texts"]] == rows
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    batch = tokenizer(KNOWN["texts"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(found, convert_jobs.scores(str(tmp_path / "megatron"), rows), **TOLERANCE)


def test_a_tokenizer_that_transformers_would_change_is_not_exported(imported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="encodes text differently"):
        run("megatron", copy, "hf", tmp_path / "hf", drop_head_bias=True, tokenizer=str(copy / "tokenizer"))


def test_the_tokenizer_of_gpt2_comes_out_of_the_archive(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ"]
    vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġt", "he", "Ġthe", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    section = {"library": "megatron", "type": "GPT2BPETokenizer", "model": None}
    section |= {"vocab_file": "nemo:v_vocab.json", "merge_file": "nemo:m_merges.txt"}
    path = tmp_path / "gpt2.nemo"
    with tarfile.open(path, "w") as archive:
        for name, member in (("vocab.json", "v_vocab.json"), ("merges.txt", "m_merges.txt")):
            archive.add(tmp_path / name, arcname=f"./{member}")
    out = tmp_path / "out"
    out.mkdir()
    with NemoArchive(path) as opened:
        unpack_tokenizer(opened, {"tokenizer": section, "data": {"append_eod": True}}, out, None)
    tokenizer = build_tokenizer(f"hf:{out}")
    reference = GPT2Tokenizer.from_pretrained(str(out))
    text = "to the end the"
    assert tokenizer.encode_response(text) == [*reference(text).input_ids, vocabulary["<|endoftext|>"]]
    assert vocabulary["Ġthe"] in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (len(vocabulary), vocabulary["<|endoftext|>"])
    again, files, append_eod = pack_tokenizer(out)
    assert (again["library"], again["type"], append_eod) == ("megatron", "GPT2BPETokenizer", True)
    assert {file.name for file in files.values()} == {"vocab.json", "merges.txt"}
