"""A real instruct model, SmolLM2-135M-Instruct, computes in Megatron what it computes in transformers."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import convert_jobs
import pytest
import torch
from conftest import run
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_advrm.config import load_config
from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.engine.architecture import first_difference
from nemo_advrm.engine.dimensions import padded_vocab_size
from nemo_advrm.engine.runtime import Runtime

_WEIGHTS = os.environ.get("SMOLLM2_GGUF")
pytestmark = pytest.mark.skipif(
    not _WEIGHTS or importlib.util.find_spec("gguf") is None,
    reason="SMOLLM2_GGUF does not name the weights of docs/convert.md (make test-judges does), or gguf is missing",
)
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea, please.")


@pytest.fixture(scope="module")
def gguf() -> Path:
    assert _WEIGHTS
    return Path(_WEIGHTS)


@pytest.fixture(scope="module")
def loaded() -> list[PreTrainedModel]:
    """The model as transformers reads it from the GGUF file, once :func:`converted` asked for it."""
    return []


@pytest.fixture(scope="module")
def converted(
    single: Runtime, gguf: Path, loaded: list[PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "megatron"
    read = AutoModelForCausalLM.from_pretrained

    def remembered(*args: Any, **kwargs: Any) -> PreTrainedModel:
        loaded.append(read(*args, **kwargs))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:  # undoing the quantisation takes longer than all the rest
        patch.setattr(AutoModelForCausalLM, "from_pretrained", remembered)
        run("hf", gguf, "megatron", out)
    return out


def test_logits_and_greedy_tokens_are_those_of_transformers(converted: Path, loaded: list[PreTrainedModel]) -> None:
    peer = loaded[0].eval()
    tokenizer = HFTokenizer(converted / "tokenizer")
    prompts = [tokenizer.encode_prompt([Message(role="user", content=text)]) for text in QUESTIONS]
    tokens_BS = torch.tensor([prompts[0]])
    with torch.no_grad():
        wanted = peer(tokens_BS).logits
        greedy = [
            peer.generate(
                torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]

    ours = convert_jobs.logits(str(converted), tokens_BS)

    scale = wanted.abs().max()
    assert scale > 10
    assert (ours - wanted).abs().max() < 1e-4 * scale  # the bound: 1e-4 of the largest logit
    assert convert_jobs.greedy(str(converted), prompts, 32) == greedy
    text = tokenizer.decode(greedy[0])
    assert "Paris" in text


def test_its_checkpoint_carries_the_tokenizer(converted: Path, gguf: Path) -> None:
    meta = json.loads((converted / "meta.json").read_text())
    theirs, ours = HFTokenizer(gguf), HFTokenizer(converted / "tokenizer")
    assert meta["tokenizer"] == ours.fingerprint
    conversation = [Message(role="user", content=QUESTIONS[0])]
    assert ours.encode_prompt(conversation) == theirs.encode_prompt(conversation)
    assert ours.encode_response("It is Paris.") == theirs.encode_response("It is Paris.")
    # the configuration group's file of the same model opens it
    wanted = load_config(["model=smollm2_135m"], "train_rm").model
    assert first_difference(meta["model"], asdict(wanted), "lm", "lm") is None
    assert meta["vocab_size"] == padded_vocab_size(wanted, 0)
