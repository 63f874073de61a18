"""Rollouts as one reward model reads them: encoded with its tokenizer, or written out as texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.messages import plain_text
from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.rollouts.types import Rollouts


def token_sequences(rollouts: Rollouts, tokenizer: Tokenizer, limit: int | None = None) -> list[list[int]]:
    """Returns the conversation of every rollout as token ids of ``tokenizer``; its score is read at the last token.

    Texts are encoded, not the policy's tokens: a policy can write tokens that no text encodes to (broken UTF-8, unusual
    splits of a word), which no user could send. Only rollouts with ``tokens_only`` keep their tokens.

    Args:
        limit: longest sequence of the model. A row that exceeds it although the policy's tokens do not (the policy saw
            the end of a long prompt, or the text encodes to more tokens than were written) loses tokens at its start.
            Other over-long rows are returned whole, and the model refuses them.

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
    """Returns the token ids of a conversation that a chat template has already rendered as text.

    Special tokens in the text are parsed as such, if the tokenizer can. A tokenizer that reads finished conversations
    uses :meth:`HFTokenizer.encode_finished_text`. Otherwise everything after the last end token is dropped, and the ids
    end in one ``eos_id``, where the reward is read (except for a .nemo tokenizer whose model was trained without it).
    """
    if isinstance(tokenizer, HFTokenizer) and tokenizer.reads_conversations:
        return tokenizer.encode_finished_text(text)
    parse = getattr(tokenizer, "parse_rendered", tokenizer.encode)
    after_end = {tokenizer.pad_id, tokenizer.eos_id}
    ids = parse(text.rstrip())
    if not ids or ids[-1] not in after_end:
        ids = parse(text)  # without an end token the trailing white space belongs to the answer
    while ids and ids[-1] in after_end:
        ids = ids[:-1]
    if ids and not getattr(tokenizer, "append_eod", True):
        return ids
    return [*ids, tokenizer.eos_id]


def written_out(rollouts: Rollouts) -> Rollouts:
    """Returns the rollouts as whole texts, each the concatenation of the prompt's messages and the response."""
    whole = [plain_text(prompt) + text for prompt, text in zip(rollouts.prompts, rollouts.responses, strict=True)]
    return dataclasses.replace(rollouts, prompts=[() for _ in whole], responses=whole, rendered=True)


def rollouts_of(pairs: Sequence[EncodedPair], tokenizer: Tokenizer) -> Rollouts:
    """Returns all chosen responses, then all rejected ones, as tokens of ``tokenizer`` and as texts.

    Raises DataError when the texts of a pair are unknown.
    """
    rows = [pair.row for pair in pairs]
    if any(row is None for row in rows):
        raise DataError("the texts of the pairs are not known")
    texts = [row.chosen for row in rows if row] + [row.rejected for row in rows if row]
    tokens = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return Rollouts(
        prompts=[row.prompt for row in rows if row] * 2,
        responses=texts,
        ended=[row.chosen_ended for row in rows if row] + [row.rejected_ended for row in rows if row],
        prompt_tokens=[[] for _ in texts],
        response_tokens=tokens,
        prompt_index=[0] * len(texts),
        fingerprint=tokenizer.fingerprint,
        tokens_only=True,
    )
