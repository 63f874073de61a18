"""An exported reward model pads with a token that no answer ends in, so that transformers reads our score."""

from __future__ import annotations

import json
from pathlib import Path

import convert_jobs
import pytest
import torch
from conftest import run
from hf_models import tiny_hf
from hf_tokenizers import CHATML, save_hf
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nemo_advrm.convert.padding_token import NEW_TOKEN
from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.engine.runtime import Runtime

CONVERSATIONS = [("Hi", "Hello."), ("What is two and two?", "It is four, I think."), ("Sing", "La la la"), ("So", "")]
END = 2  # <|im_end|>, with which the template ends a turn


def reward_model(directory: Path, pad: str, vocabulary: int, reserved: bool = False) -> Path:
    """A reward model with its tokenizer, which has 280 tokens at most and pads with ``pad``."""
    save_hf(directory, template=CHATML, eos_token="<|im_end|>", pad_token=pad)
    if reserved:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
        tokenizer.save_pretrained(directory)
    pad_id = AutoTokenizer.from_pretrained(directory).pad_token_id
    model = tiny_hf("llama3", reward=True, vocab_size=vocabulary, pad_token_id=pad_id, eos_token_id=END)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("pad", "reserved", "spare_rows", "token", "new_rows"),
    [
        ("<|endoftext|>", False, 3, "<|endoftext|>", 0),  # no answer ends in it: kept
        ("<|im_end|>", True, 3, "<|reserved_special_token_0|>", 0),
        ("<|im_end|>", False, 3, NEW_TOKEN, 0),  # takes a row that the tokenizer does not use
        ("<|im_end|>", False, 0, NEW_TOKEN, 1),
    ],
    ids=["own", "reserved", "spare_row", "new_row"],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_of_a_padded_batch_are_ours(
    single: Runtime, tmp_path: Path, pad: str, reserved: bool, spare_rows: int, token: str, new_rows: int, side: str
) -> None:
    probe = save_hf(tmp_path / "probe", template=CHATML, eos_token="<|im_end|>")
    vocabulary = len(AutoTokenizer.from_pretrained(probe)) + reserved + spare_rows
    source = reward_model(tmp_path / "source", pad, vocabulary, reserved)
    run("hf", source, "megatron", tmp_path / "megatron")
    run("megatron", tmp_path / "megatron", "hf", tmp_path / "hf")
    ours = HFTokenizer(tmp_path / "megatron" / "tokenizer")
    rows = [
        ours.encode_prompt([Message(role="user", content=question)]) + ours.encode_response(answer)
        for question, answer in CONVERSATIONS
    ]
    assert {row[-1] for row in rows} == {END} and len({len(row) for row in rows}) > 2
    wanted = convert_jobs.scores(str(tmp_path / "megatron"), rows)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    texts = [ours.decode(row, skip_special=False) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]

    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    assert tokenizer.pad_token == token and tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.eos_token_id == END and tokenizer.chat_template == CHATML
    assert model.config.vocab_size == vocabulary + new_rows and len(tokenizer) <= model.config.vocab_size
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("Padding is the token" in card) == (token != pad)


def test_the_card_tells_what_is_known(tmp_path: Path) -> None:
    source = reward_model(tmp_path / "source", "<|endoftext|>", 300)
    facts = {"base_model": "base-7b", "data": "pairs.jsonl", "rounds": 2, "reference_mean": -1.25, "reference_std": 0.5}
    (tmp_path / "card.json").write_text(json.dumps(facts))
    run("hf", source, "hf", tmp_path / "hf", card=str(tmp_path / "card.json"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "LlamaForSequenceClassification" in card and "pipeline_tag: text-classification" in card
    for text in ("base-7b", "pairs.jsonl", "training: 2", "responses: -1.25", "mean: 0.5"):
        assert text in card, text
