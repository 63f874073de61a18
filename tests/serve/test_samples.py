"""Which prompt of the reference a sample answers, by its tokens."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_tokenizers import CHATML, save_hf
from template_traits import TEMPLATES

from nemo_advrm.data.messages import Message
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.serve.samples import InvalidSample, Preparer, Sample

PROMPTS = ("the question", "the question is the answer", "is the answer")


def _preparer(tokenizer: HFTokenizer) -> Preparer:
    prompts = [(Message(role="user", content=text),) for text in PROMPTS]
    reference = SFTScores(prompts, [["x"]] * len(prompts), torch.zeros(len(prompts), 1, 1), None)
    return Preparer([SimpleNamespace(tokenizer=tokenizer)], reference=reference)  # type: ignore[list-item]


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_found_with_and_without_the_template(tmp_path: Path, bos: bool) -> None:
    """NeMo-Aligner's actors send prompts that are plain text, also where the tokenizer has a chat template."""
    tokenizer = HFTokenizer(save_hf(tmp_path, template=CHATML, bos=bos, eos_token="<|endoftext|>"))
    preparer = _preparer(tokenizer)
    for index, text in enumerate(PROMPTS):
        templated = tokenizer.encode_prompt([Message(role="user", content=text)])
        answer = tokenizer.encode_response(" so be it")
        samples = [
            *(Sample("tokens", tokens=tuple(ids + answer)) for ids in (templated, tokenizer.encode(text))),
            Sample("text", response=text + " so be it"),
        ]
        assert [prepared.prompt_index for prepared in preparer.prepare(samples)] == [index] * 3
    with pytest.raises(InvalidSample, match="not one of the reference"):
        preparer.prepare([Sample("text", response="another text")])


def test_a_long_sample_is_looked_up_in_no_time(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf(tmp_path, template=None, eos_token="<|endoftext|>"))
    preparer = _preparer(tokenizer)
    tokens = tuple(tokenizer.encode(PROMPTS[0]) + [5] * 64_000)
    started = time.monotonic()
    assert preparer.prepare([Sample("tokens", tokens=tokens)])[0].prompt_index == 0
    assert time.monotonic() - started < 4  # many times that where every beginning of the row is looked up


@pytest.mark.parametrize("trait", ["opens_think", "two_turns", "trims"])
def test_a_prompt_is_found_in_a_finished_conversation(tmp_path: Path, trait: str) -> None:
    """Its beginning need not be the generation prompt, and a template may write none."""
    tokenizer = HFTokenizer(save_hf(tmp_path, template=TEMPLATES[trait], eos_token="<|endoftext|>"))
    preparer = _preparer(tokenizer)
    for index, text in enumerate(PROMPTS):
        messages = [Message(role="user", content=text)]
        tokens = tokenizer.encode_conversation(messages, "so be it")
        samples = [
            Sample("tokens", tokens=tuple(tokens)),
            Sample("text", response=tokenizer.decode(tokens, skip_special=False)),
            Sample("chat", tuple(messages), "so be it"),
        ]
        prepared = preparer.prepare(samples)
        assert [one.prompt_index for one in prepared] == [index] * 3
        assert [one.tokens for one in prepared] == [tokens] * 3


def test_a_long_conversation_loses_its_start_only_where_the_client_asks(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf(tmp_path, template=CHATML, eos_token="<|endoftext|>"))
    preparer = Preparer([SimpleNamespace(tokenizer=tokenizer)], max_tokens=12)  # type: ignore[list-item]
    messages = (Message(role="user", content="the question is the answer"),)
    whole = tokenizer.encode_conversation(messages, "so")
    with pytest.raises(InvalidSample, match=f"the sample has {len(whole)} tokens, at most 12 are accepted"):
        preparer.prepare([Sample("chat", messages, "so")])
    (cut,) = preparer.prepare([Sample("chat", messages, "so", truncate_prompt=True)])
    assert cut.tokens == whole[-12:]
