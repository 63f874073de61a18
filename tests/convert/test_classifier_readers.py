"""What vLLM, SGLang and NeMo-RL ask of a classifier is what an exported reward model has.

The facts below were read in the source of vLLM 0.33.0 (config/model.py, model_executor/models/{registry,adapters}.py,
layers/pooler/activations.py and the model files), of SGLang 0.5.23 (srt/configs/model_config.py, srt/models/*) and of
NeMo-RL at commit 7ea279a (nemo_rl/models/automodel/setup.py, nemo_rl/environments/reward_model_environment.py). None of
them runs without a GPU. docs/serving_exports.md shows them as a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import run
from hf_models import ARCHITECTURES, tiny_hf
from hf_tokenizers import CHATML, save_hf
from test_round_trip import SEQUENCES, TOLERANCE, hf_scores, weights
from transformers import AutoConfig, AutoTokenizer

from nemo_advrm.convert.architecture_tables import ARCHITECTURES as TABLES
from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.engine.runtime import Runtime

SHARED = "hidden_size intermediate_size num_attention_heads num_hidden_layers vocab_size max_position_embeddings "


@dataclass(frozen=True)
class Reader:
    """What one family's implementation reads of config.json without a default."""

    vllm: str
    sglang: str = ""  # empty: SGLang has no classifier of the family
    sglang_bias: bool = False  # its score head has a bias that no export holds


READERS = {
    "Llama": Reader("hidden_act rms_norm_eps tie_word_embeddings", "hidden_act rms_norm_eps pad_token_id eos_token_id"),
    "Mistral": Reader("hidden_act rms_norm_eps tie_word_embeddings num_key_value_heads"),
    "Qwen2": Reader(
        "hidden_act rms_norm_eps tie_word_embeddings num_key_value_heads rope_parameters max_window_layers",
        "hidden_act rms_norm_eps num_key_value_heads eos_token_id",
        sglang_bias=True,
    ),
    "Qwen3": Reader(
        "hidden_act rms_norm_eps tie_word_embeddings num_key_value_heads rope_parameters",
        "hidden_act rms_norm_eps num_key_value_heads attention_bias rope_parameters eos_token_id",
        sglang_bias=True,
    ),
    # these two at vLLM's commits 005df92 and 002456d; SGLang's were not looked up
    "Mixtral": Reader("hidden_act rms_norm_eps tie_word_embeddings num_local_experts num_experts_per_tok"),
    "Qwen3Moe": Reader(
        "hidden_act rms_norm_eps tie_word_embeddings num_experts num_experts_per_tok norm_topk_prob "
        "moe_intermediate_size decoder_sparse_step mlp_only_layers"
    ),
    "Gemma2": Reader(
        "attention_bias attn_logit_softcapping final_logit_softcapping head_dim hidden_activation layer_types "
        "num_key_value_heads query_pre_attn_scalar rms_norm_eps rope_parameters sliding_window",
        "attention_bias attn_logit_softcapping head_dim hidden_activation num_key_value_heads query_pre_attn_scalar "
        "rms_norm_eps rope_parameters sliding_window eos_token_id",
    ),
    "Nemotron": Reader("hidden_act norm_eps rope_parameters tie_word_embeddings"),
}
# keys that make vLLM take another activation, head or conversion than that of a plain classifier
VLLM_SWITCHES = (
    "classifier_from_token",
    "method",
    "sentence_transformers",
    "sbert_ce_default_activation_function",
    "is_original_qwen3_reranker",
    "head_dtype",
    "is_causal",
)


def test_every_family_that_is_exported_was_looked_up() -> None:
    assert READERS.keys() == {table.family for table in TABLES}
    assert READERS.keys() == {family for family, _ in ARCHITECTURES.values()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_export_is_what_vllm_and_sglang_read(
    single: Runtime, saved: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    run("hf", saved(name, reward=True), "megatron", tmp_path / "megatron")
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    config, raw = AutoConfig.from_pretrained(tmp_path / "hf"), json.loads((tmp_path / "hf" / "config.json").read_text())
    family = ARCHITECTURES[name][0]

    # both choose by this name: vLLM takes its <family>ForCausalLM with a head of num_labels outputs named score
    assert config.architectures == [f"{family}ForSequenceClassification"]
    assert config.num_labels == 1 and config.id2label is not None  # without id2label SGLang normalises Qwen3's output
    tensors = weights(tmp_path / "hf")
    assert tensors["score.weight"].shape == (1, config.hidden_size)
    assert all(key.startswith("model.") for key in tensors if key != "score.weight")
    # else vLLM answers with the sigmoid of the score to whoever does not ask for use_activation=false
    assert config.problem_type == "regression"
    assert not any(hasattr(config, key) for key in VLLM_SWITCHES)
    # the pooled token is the last one in both; a key would change that, or normalise (SGLang's generic classes)
    assert not {"pooling_type", "normalize", "pooler_config"} & raw.keys()
    for key in (SHARED + READERS[family].vllm + " " + READERS[family].sglang).split():
        assert hasattr(config, key), key
    if len(set(getattr(config, "layer_types", None) or ())) > 1 and family in ("Qwen2", "Qwen3"):
        assert config.max_window_layers != config.num_hidden_layers  # vLLM refuses; it has no windows for some layers


def test_a_mistral_without_window_is_also_a_llama_which_sglang_has(
    single: Runtime, saved: Callable[..., Path], tmp_path: Path
) -> None:
    source = saved("mistral", reward=True, sliding_window=None)
    run("hf", source, "megatron", tmp_path / "megatron")
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf", architecture="Llama")
    assert AutoConfig.from_pretrained(tmp_path / "hf").architectures == ["LlamaForSequenceClassification"]
    torch.testing.assert_close(hf_scores(tmp_path / "hf", "right"), hf_scores(source, "right"), **TOLERANCE)
    assert len(SEQUENCES) == len(hf_scores(source, "right"))


def test_nemo_rls_reward_model_environment_reads_the_score_where_we_do(single: Runtime, tmp_path: Path) -> None:
    """It pads with the tokenizer's token, which the classifier must skip, and adds an end token where it finds none."""
    save_hf(tmp_path / "source", template=CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    model = tiny_hf("qwen2", reward=True, vocab_size=280, pad_token_id=2, eos_token_id=2)
    model.save_pretrained(tmp_path / "source")
    run("hf", tmp_path / "source", "megatron", tmp_path / "megatron")
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    config, tokenizer = AutoConfig.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert config.architectures and config.num_labels == 1
    assert tokenizer.pad_token_id == config.pad_token_id != tokenizer.eos_token_id

    prompt, response = Message(role="user", content="Why?"), "So."
    chat = [prompt, Message(role="assistant", content=response)]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.rstrip("\n").endswith(tokenizer.eos_token)  # nothing is added
    ours = HFTokenizer(tmp_path / "megatron" / "tokenizer").encode_conversation([prompt], response, True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours
