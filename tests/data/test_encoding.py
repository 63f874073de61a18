"""Encoded pairs share their prompt tokens, end in eos, and never exceed the limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hf_tokenizers import save_hf
from template_traits import TEMPLATES

from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preferences import PreferencePair, load_preferences
from nemo_advrm.data.tokenizers import ByteTokenizer, HFTokenizer
from nemo_advrm.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TOKENIZER = ByteTokenizer()


def row(prompt: str, chosen: str, rejected: str, source: str = "f.jsonl:3") -> PreferencePair:
    return PreferencePair((Message(role="user", content=prompt),), chosen, rejected, 2.0, 0.5, source)


def test_a_pair_is_prompt_answer_eos_on_both_sides() -> None:
    (pair,), counts = encode_pairs([row("hi", "yes", "n")], TOKENIZER, 32)
    prompt = [2, 3, 111, 112, 6, 4]
    assert pair.prompt_length == 6
    assert pair.chosen == [*prompt, *TOKENIZER.encode("yes"), 1]
    assert pair.rejected == [*prompt, *TOKENIZER.encode("n"), 1]
    assert (pair.margin, pair.weight, pair.source, pair.length) == (2.0, 0.5, "f.jsonl:3", 10)
    assert counts == {"encoded": 1, "overlong": 0, "truncated": 0, "refused": 0}


def test_a_cut_off_answer_is_encoded_as_it_was_scored_without_an_end(tmp_path: Path) -> None:
    cut = replace(row("hi", "yes", "n"), rejected_ended=False)
    (pair,), _ = encode_pairs([cut], TOKENIZER, 32)
    assert pair.chosen[6:] == [*TOKENIZER.encode("yes"), 1] and pair.rejected[6:] == TOKENIZER.encode("n")
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "hi", "chosen": "yes", "rejected": "n", "rejected_ended": false}\n')
    (read,), _ = encode_pairs(load_preferences(source).rows, TOKENIZER, 32)
    assert (read.chosen, read.rejected) == (pair.chosen, pair.rejected)


def test_raw_text_pairs_have_only_the_start_token_as_prompt() -> None:
    (pair,), _ = encode_pairs([PreferencePair((), "ab", "c")], TOKENIZER, 8)
    assert pair.prompt_length == 1 and pair.chosen == [2, 104, 105, 1]


def test_the_limit_itself_is_allowed() -> None:
    assert len(encode_pairs([row("hi", "yes", "n")], TOKENIZER, 10)[0]) == 1
    message = r"f\.jsonl:3: prompt \+ `chosen` is 10 tokens long, the limit is 9 \(1 of 1 rows are too long\)"
    with pytest.raises(DataError, match=message):
        encode_pairs([row("hi", "yes", "n")], TOKENIZER, 9)


def test_skip_leaves_out_and_counts() -> None:
    rows = [row("hi", "a", "b"), row("hi", "a", "b" * 50), row("hi", "c", "d")]
    pairs, counts = encode_pairs(rows, TOKENIZER, 16, on_overlong="skip")
    assert [pair.chosen[6] for pair in pairs] == TOKENIZER.encode("ac")
    assert counts == {"encoded": 2, "overlong": 1, "truncated": 0, "refused": 0}


def test_truncation_cuts_the_prompt_from_the_left_and_keeps_answers_whole() -> None:
    (pair,), counts = encode_pairs([row("0123456789", "yes", "n")], TOKENIZER, 10, on_overlong="truncate_prompt")
    prompt = [*TOKENIZER.encode("6789"), 6, 4]
    assert pair.chosen == [*prompt, *TOKENIZER.encode("yes"), 1] and len(pair.chosen) == 10
    assert pair.rejected == [*prompt, *TOKENIZER.encode("n"), 1]
    assert pair.prompt_length == 6 and counts["truncated"] == 1


def test_truncation_leaves_out_answers_that_fill_the_context() -> None:
    rows = [row("hi", "a" * 9, "b"), row("hi", "a" * 8, "b")]
    (pair,), counts = encode_pairs(rows, TOKENIZER, 10, on_overlong="truncate_prompt")
    assert pair.chosen == [4, *TOKENIZER.encode("a" * 8), 1]
    assert counts == {"encoded": 1, "overlong": 1, "truncated": 1, "refused": 0}


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="all 1 rows are too long"):
        encode_pairs([row("hi", "yes", "n")], TOKENIZER, 5, on_overlong="skip")
    with pytest.raises(DataError, match="no rows"):
        encode_pairs([], TOKENIZER, 5)
    with pytest.raises(ConfigError, match=r"data\.on_overlong='drop'"):
        encode_pairs([], TOKENIZER, 5, on_overlong="drop")


def test_a_text_the_tokenizer_refuses_names_the_row() -> None:
    class Refusing(ByteTokenizer):
        def encode_prompt(self, messages: object) -> list[int]:
            raise DataError("the template refuses this")

    with pytest.raises(DataError, match=r"f\.jsonl:3: the template refuses this"):
        encode_pairs([row("hi", "a", "b")], Refusing(), 32)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")
def test_real_pairs_end_in_one_eos_within_the_limit() -> None:
    rows = load_preferences(SHARED / "hh_rlhf_harmless_test.jsonl.gz", on_bad_row="skip").rows[:300]
    pairs, counts = encode_pairs(rows, TOKENIZER, 512, on_overlong="truncate_prompt")
    assert counts["encoded"] + counts["overlong"] == 300 and counts["truncated"] > 0
    for pair in pairs:
        assert pair.chosen[: pair.prompt_length] == pair.rejected[: pair.prompt_length]
        for ids in (pair.chosen, pair.rejected):
            assert len(ids) <= 512 and ids[-1] == 1 and ids.count(1) == 1


def test_a_template_shares_what_stands_before_the_answers(tmp_path: Path) -> None:
    """Both sides are finished conversations; the cut is at their start, and no answer loses a token."""
    tokenizer = HFTokenizer(save_hf(tmp_path, template=TEMPLATES["opens_think"], eos_token="<|endoftext|>"))
    pair = row("the question is the answer", "the answer is", "the answer is not")
    whole = [tokenizer.encode_conversation(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
    (encoded,), _ = encode_pairs([pair], tokenizer, 128)
    assert [encoded.chosen, encoded.rejected] == whole and tokenizer.decode(whole[0][-1:]) == "\n"
    assert encoded.chosen[: encoded.prompt_length] == encoded.rejected[: encoded.prompt_length]
    opened = tokenizer.encode_conversation(pair.prompt, "", ended=False)
    shortest = len(whole[1]) - len(opened) + 1  # one token of the prompt is left
    (encoded,), counts = encode_pairs([pair], tokenizer, shortest, "truncate_prompt")
    assert [encoded.chosen, encoded.rejected] == [ids[len(opened) - 1 :] for ids in whole]
    assert counts["truncated"] == 1
    with pytest.raises(DataError, match="all 1 rows are too long"):  # though both answers begin alike
        encode_pairs([pair], tokenizer, shortest - 1, "truncate_prompt")
