"""Token sequences of rollouts for the tokenizer of one reward model."""

from __future__ import annotations

from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.rollouts.types import Rollouts


def token_sequences(rollouts: Rollouts, tokenizer: Tokenizer, limit: int | None = None) -> list[list[int]]:
    """The conversation of every rollout as ids of ``tokenizer``, each to be read at its last token.

    The reward is that of the text: a policy can write tokens that no text encodes to (broken UTF-8, a word in unusual
    pieces), which no user could send, so that its own tokens are not scored. Only rollouts that came as tokens are.

    Args:
        limit: longest sequence of the model. A row that exceeds it although the policy's own tokens do not (the policy
            saw the end of a long prompt, or its text has more tokens than it wrote) loses tokens at its start. Others
            are left whole, for the model to refuse.

    Raises DataError for text that the tokenizer refuses, and for tokens of another tokenizer.
    """
    own = [p + r for p, r in zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)]
    if rollouts.tokens_only:
        if rollouts.fingerprint != tokenizer.fingerprint:
            raise DataError(f"the rows came as tokens of another tokenizer than {tokenizer.name}, without their text")
        return own
    if rollouts.rendered:
        return [encode_rendered(tokenizer, text) for text in rollouts.responses]
    rows = [
        tokenizer.encode_conversation(prompt, text, ended)
        for prompt, text, ended in zip(rollouts.prompts, rollouts.responses, rollouts.ended, strict=True)
    ]
    if limit is None or rollouts.fingerprint != tokenizer.fingerprint:
        return rows
    return [row[-limit:] if 0 < len(raw) <= limit else row for row, raw in zip(rows, own, strict=True)]


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a whole conversation that some chat template has already written out as text.

    Special tokens that are written out are read as what they are (a tokenizer that cannot takes them as text). Where
    the template writes finished conversations, see :meth:`HFTokenizer.encode_finished_text`. Else what was written
    after the last end token is dropped, and the ids end in one ``eos_id``, where the reward is read (not for a
    tokenizer of a .nemo whose model was trained without).
    """
    if isinstance(tokenizer, HFTokenizer) and tokenizer.reads_conversations:
        return tokenizer.encode_finished_text(text)
    parse = getattr(tokenizer, "parse_rendered", tokenizer.encode)
    after_end = {tokenizer.pad_id, tokenizer.eos_id}
    ids = parse(text.rstrip())
    if not ids or ids[-1] not in after_end:
        ids = parse(text)  # the white space at its end is the answer's own
    while ids and ids[-1] in after_end:
        ids = ids[:-1]
    if ids and not getattr(tokenizer, "append_eod", True):
        return ids
    return [*ids, tokenizer.eos_id]
