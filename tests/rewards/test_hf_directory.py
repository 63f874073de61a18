"""What a directory of transformers holds is used or refused by name, alike by hf: members and by convert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hf_tokenizers import save_hf
from reward_members import rollouts, save_hf_reward
from safetensors.torch import load_file, save_file
from tiny import TOKENIZER, tiny_config

from nemo_advrm.convert.hf_source import HFSource
from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import HFTokenizer, check_vocabulary
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.evaluation.pair_accuracy import kept_rollouts
from nemo_advrm.rewards.hf import HFReward, check_directory
from nemo_advrm.rewards.limits import longest_row, prompts_with_room
from nemo_advrm.rewards.sources import check, load_members, parse
from nemo_advrm.rollouts.types import Prompt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_reward(tmp_path_factory.mktemp("rm"), num_hidden_layers=1)


def _adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "modules_to_save": ["score"]}))
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}
    save_file(lora, path / "adapter_model.safetensors")


def _adapter_alone(path: Path) -> None:
    _adapter(path)
    (path / "config.json").unlink()
    (path / "model.safetensors").unlink()


def _tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        save_file(weights | {name: torch.ones(shape).to(dtype)}, path / "model.safetensors", metadata={"format": "pt"})

    return change


def _key(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | values
        (path / "config.json").write_text(json.dumps(config))

    return change


def _file(name: str) -> Callable[[Path], None]:
    return lambda path: save_file({"score.weight": torch.ones(1, 48)}, path / name)


def _index(path: Path) -> None:
    _file("model-00001-of-00001.safetensors")(path)
    index = {"weight_map": {"score.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_adapter, ["adapter_config.json", "adapter_model.safetensors", "merge"]),
        (_adapter_alone, ["adapter_config.json", "merge"]),
        (_tensor("score.bias", 1), ["score.bias", "a bias of the head"]),
        (_tensor("mean", 1), ["mean", "normalisation"]),
        (_tensor("std", 1), ["std", "normalisation"]),
        (_tensor("v_head.summary.weight", 1, 48), ["v_head.summary.weight", "another head"]),
        (_tensor("value_head.weight", 1, 48), ["value_head.weight", "another head"]),
        (_tensor("model.layers.7.mlp.up_proj.weight", 80, 48), ["model.layers.7", "layer that config.json does not"]),
        (_tensor("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 48), ["lora_A", "merge"]),
        (_tensor("model.layers.0.self_attn.q_proj.bias", 48), ["q_proj.bias"]),
        (_tensor("model.layers.0.mlp.up_proj.weight_scale", 1), ["weight_scale", "quantised"]),
        (_tensor("model.layers.0.mlp.up_proj.weight", 80, 48, dtype=torch.float8_e4m3fn), ["up_proj.weight", "8"]),
        (_tensor("model.layers.0.mlp.up_proj.weight", 80, 48, dtype=torch.int8), ["up_proj.weight", "8"]),
        (_tensor("score.weight", 2, 48), ["score.weight"]),
        (_key(normalize_reward=True), ["normalize_reward=True"]),
        (_key(mean=0.3, std=1.5), ["mean=0.3", "std=1.5"]),
        (_key(reward_scale=2.0), ["reward_scale=2.0"]),
        (_key(value_head_prefix="value_head"), ["value_head_prefix='value_head'"]),
        (_key(score_bias=0.5), ["score_bias=0.5"]),
        (_key(pooling_type="mean"), ["pooling_type='mean'"]),
        (_key(sentence_transformers={"activation_fn": "torch.nn.Sigmoid"}), ["sentence_transformers", "Sigmoid"]),
        (_key(lora_rank=8), ["lora_rank=8"]),
        (_key(auto_map={"AutoModelForSequenceClassification": "own.Model"}), ["auto_map", "own.Model"]),
        (_key(quantization_config={"quant_method": "gptq"}), ["quantization_config"]),
        (_key(num_labels=2), ["num_labels=2 contradicts id2label"]),
        (_key(problem_type="single_label_classification"), ["problem_type"]),
        (_file("value_head.safetensors"), ["value_head.safetensors", "would not be read"]),
        (_file("model-00002-of-00002.safetensors"), ["model-00002-of-00002.safetensors"]),
        (lambda path: (path / "reward_head.pt").write_bytes(b""), ["reward_head.pt"]),
        (_index, ["model.safetensors.index.json", "two models"]),
    ],
)
def test_what_would_change_the_reward_is_refused_by_name_alike(
    whole: Path, tmp_path: Path, change: Callable[[Path], None], words: list[str]
) -> None:
    path = shutil.copytree(whole, tmp_path / "rm")
    change(path)
    for opened in (lambda: check_directory(path), lambda: HFSource(path)):
        with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
            opened()
        for word in words:
            assert word in str(caught.value), word


@pytest.mark.parametrize(
    "change",
    [
        _key(mean=0.0, std=1.0, normalize_reward=False, value_head_prefix="score", reward_scale=1.0),
        _key(problem_type="regression", pooling_type=None, unsloth_version="2026.1", temperature=0.7),
        _key(sentence_transformers={"version": "5.0", "activation_fn": "torch.nn.modules.linear.Identity"}),
        lambda path: (path / "pytorch_model.bin").write_bytes(b""),
        lambda path: (path / "training_args.bin").write_bytes(b""),
        _file("consolidated.safetensors"),
    ],
)
def test_what_changes_nothing_is_let_be(whole: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = shutil.copytree(whole, tmp_path / "rm")
    change(path)
    found, _ = check_directory(path)
    assert (found.vocabulary, found.longest) == (280, 128)
    HFSource(path)


def test_buffers_of_old_files_that_transformers_ignores_are_let_be(tmp_path: Path) -> None:
    path = _roberta(tmp_path / "rm")
    _tensor("roberta.embeddings.position_ids", 1, 66, dtype=torch.int64)(path)
    check_directory(path)


# several outputs


def test_several_outputs_are_combined_by_their_weights(single: Runtime, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import hf_models

    own = hf_models.tiny_hf

    def three(name: str, seed: int = 0, reward: bool = False, **keys: object) -> object:
        model = own(name, seed, reward, **keys)
        torch.manual_seed(7)
        model.score = torch.nn.Linear(48, 3, bias=False)
        model.config.num_labels = 3
        return model

    monkeypatch.setattr("reward_members.tiny_hf", three)
    path = save_hf_reward(tmp_path / "rm", num_hidden_layers=1)
    spec = f"hf:{path}?attributes=0.5,-1,2"
    check(parse(spec, "ensemble.members[0]"), tiny_config(), 1)
    (member,) = load_members(tiny_config(), [spec])
    model = member.model  # type: ignore[attr-defined]
    rows = [[5, 6, 7], [9, 8]]
    with torch.no_grad():
        hidden = torch.stack([model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
        expected = model.score(hidden) @ torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(member.score_tokens(rows), expected, atol=1e-5, rtol=0)  # type: ignore[attr-defined]
    assert member.score(rollouts()).shape == (4,)
    for text, words in ((f"hf:{path}", "attributes=1,1,1"), (f"hf:{path}?attributes=1,2", "2 weights.*3 outputs")):
        with pytest.raises(CheckpointError, match=rf"ensemble\.members\[1\].*{words}"):
            check(parse(text, "ensemble.members[1]"), tiny_config(), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rm?attributes=", "must be comma-separated numbers"),
        ("hf:rm?attributes=1,x", "must be comma-separated numbers"),
        ("rm?attributes=1,nan", "must be comma-separated numbers"),
        ("rm?attributes=0,0", "not all of them 0"),
        ("nemo:rm.nemo?weights=1", "only .attributes="),
        ("hf:?attributes=1", "a path is missing"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"ensemble\.members\[2\].*{words}"):
        parse(text, "ensemble.members[2]")


def test_a_question_mark_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a?b").mkdir()
    assert parse(f"hf:{tmp_path}/a?b", "x").location == f"{tmp_path}/a?b"
    spec = parse("megatron:runs/rm?attributes=1,-0.5", "x")
    assert (spec.location, spec.attributes) == ("runs/rm", (1.0, -0.5))


# ids and the embedding


def test_a_token_beyond_the_embedding_is_named(single: Runtime, tmp_path: Path) -> None:
    path = save_hf_reward(tmp_path / "rm", num_hidden_layers=1, vocab_size=278)  # ids 0 to 277, exactly
    check_directory(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "<|added_pad|>"})
    tokenizer.save_pretrained(path)
    check_directory(save_hf_reward(tmp_path / "padded", num_hidden_layers=1, vocab_size=320))
    with pytest.raises(CheckpointError, match=r"m: hf:.*<\|added_pad\|>.* id 278, the embedding has 278 rows"):
        check(parse(f"hf:{path}", "m"), tiny_config(), 1)
    with pytest.raises(CheckpointError, match=r"added_pad.*278"):
        from nemo_advrm.config.schema import ConvertConfig
        from nemo_advrm.convert.conversion import convert

        convert(ConvertConfig(from_="hf", path=str(path), to="megatron", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_ids_with_a_gap_count_to_the_largest(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf(tmp_path / "t", template=None, eos_token="<|endoftext|>"))
    assert tokenizer.vocab_size == 278
    check_vocabulary(tokenizer, 278, "rm")
    with pytest.raises(CheckpointError, match=r"rm: the tokenizer hf:t has the token .* with id 277.*277 rows"):
        check_vocabulary(tokenizer, 277, "rm")


def test_training_and_members_refuse_a_tokenizer_that_is_larger_than_the_checkpoint(
    single: Runtime, tmp_path: Path
) -> None:
    from reward_members import save_megatron

    from nemo_advrm.data.tokenizers import ByteTokenizer
    from nemo_advrm.engine.builders import build_policy, build_reward_model

    base = str(save_megatron(tmp_path / "lm", head="lm", num_layers=1))  # 104 rows
    rm = save_megatron(tmp_path / "rm", num_layers=1, meta={})
    cfg = tiny_config(num_layers=1)
    for build in (
        lambda tokenizer: build_policy(cfg, tokenizer, base, 0, trainable=False),
        lambda tokenizer: build_reward_model(cfg, tokenizer, base, 0, trainable=True),
        lambda tokenizer: load_members(cfg, [str(rm)], tokenizer),
    ):
        with pytest.raises(CheckpointError, match=r"the token .* with id 262, the embedding has 104 rows"):
            build(ByteTokenizer())
        build(TOKENIZER)
    small = tiny_config(num_layers=1, vocab_size=64)
    with pytest.raises(CheckpointError, match=r"model\.vocab_size=64.* id 262"):
        build_policy(small, ByteTokenizer(), "", 0, trainable=False)


# the longest row


def _roberta(directory: Path, **keys: object) -> Path:
    save_hf(directory, template=None, eos_token="<|endoftext|>", pad_token="<|im_start|>")
    settings = {"vocab_size": 278, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "max_position_embeddings": 66, "pad_token_id": 1, "num_labels": 1}
    config = transformers.RobertaConfig(**(settings | keys))
    transformers.RobertaForSequenceClassification(config).eval().save_pretrained(directory)
    return directory


def test_roberta_takes_as_many_tokens_as_it_has_positions_after_its_padding(single: Runtime, tmp_path: Path) -> None:
    member = HFReward.load("judge", _roberta(tmp_path / "rm"), tiny_config())
    assert longest_row(member) == 66 - 1 - 1
    assert member.score_tokens([[5] * 64]).isfinite().all()
    with pytest.raises(Exception, match="judge: a response has 65 tokens with its prompt, the model takes 64"):
        member.score_tokens([[5] * 65])


@pytest.mark.parametrize(
    ("name", "keys", "longest"),
    [
        ("GPT2", {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, 40),
        ("OPT", {"max_position_embeddings": 48, "ffn_dim": 16, "word_embed_proj_dim": 16}, 48),  # its table has 2 more
        ("Bert", {"max_position_embeddings": 50, "intermediate_size": 16}, 50),
        ("Mistral", {"max_position_embeddings": 90, "sliding_window": 8, "num_key_value_heads": 2}, 90),
        ("Llama", {"max_position_embeddings": 96, "num_key_value_heads": 2}, 96),
    ],
)
def test_positions_limit_a_row_and_windows_do_not(
    tmp_path: Path, name: str, keys: dict[str, object], longest: int
) -> None:
    save_hf(tmp_path, template=None, eos_token="<|endoftext|>")
    settings = {"vocab_size": 278, "num_labels": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} if name != "GPT2" else {}
    config = getattr(transformers, f"{name}Config")(**(settings | keys))
    getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(tmp_path)
    assert check_directory(tmp_path)[0].longest == longest


def test_a_tokenizer_that_says_less_is_believed(single: Runtime, tmp_path: Path) -> None:
    path = _roberta(tmp_path / "rm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(path)
    assert longest_row(HFReward.load("judge", path, tiny_config())) == 20


def test_the_members_limit_is_that_of_evaluation_and_of_prompts(single: Runtime, tmp_path: Path) -> None:
    from nemo_advrm.data.preferences import PreferencePair

    member = HFReward.load("judge", _roberta(tmp_path / "rm"), tiny_config())
    user = (Message(role="user", content="a"),)
    short = PreferencePair(prompt=user, chosen="b", rejected="c", source="p.jsonl:1")
    long = PreferencePair(prompt=user, chosen="b" * 100, rejected="c", source="p.jsonl:2")
    cfg = tiny_config(encoder_seq_length=1024)
    with pytest.raises(DataError, match=r"judge, which takes 64 tokens: p\.jsonl:2"):
        kept_rollouts(member, [short, long], cfg)
    cfg.data.on_overlong = "skip"
    kept, _ = kept_rollouts(member, [short, long], cfg)
    assert len(kept) == 2 and member.score(kept).isfinite().all()

    prompts = [Prompt(i, (Message(role="user", content=text),), [1]) for i, text in enumerate(("a" * 90, "a"))]
    assert [p.messages[0]["content"] for p in prompts_with_room(prompts, "another", [member], cfg)] == ["a"]
    assert prompts_with_room(prompts, "another", [member], cfg)[0].index == 0
    cfg.data.on_overlong = "error"
    with pytest.raises(DataError, match=r"prompt 1: the prompt has .* judge takes 64 tokens"):
        prompts_with_room(prompts, "another", [member], cfg)
    own = [Prompt(0, user, [1] * 10)]
    cfg.rl.max_new_tokens = 55
    with pytest.raises(DataError, match=r"rl\.max_new_tokens=55.*judge takes 64"):
        prompts_with_room(own, member.tokenizer.fingerprint, [member], cfg)
    cfg.rl.max_new_tokens = 54
    assert prompts_with_room(own, member.tokenizer.fingerprint, [member], cfg) == own
