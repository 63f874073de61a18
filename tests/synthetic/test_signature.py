"""Signatures see parts of speech only."""

from __future__ import annotations

from nemo_advrm.synthetic.signature import token_class_signature
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer


def test_one_letter_per_token() -> None:
    assert token_class_signature("this red river sleeps slowly . um . these") == "DANVR.F.D"
    assert token_class_signature("") == ""


def test_only_the_part_of_speech_counts() -> None:
    assert token_class_signature("this river sleeps .") == token_class_signature("these garden sing .")
    assert token_class_signature(". . .") != token_class_signature(". .")


def test_ids_and_text_agree() -> None:
    text = "this river sleeps ."
    assert token_class_signature([*SyntheticTokenizer().encode_response(text), 0, 0]) == token_class_signature(text)
