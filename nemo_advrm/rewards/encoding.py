"""Token sequences of rollouts for the tokenizer of one reward model."""

from __future__ import annotations

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.rewards.base import Rollouts


def token_sequences(rollouts: Rollouts, tokenizer: Tokenizer) -> list[list[int]]:
    """Prompt and response of every rollout as ids of ``tokenizer``.

    Where the policy has the same tokenizer its tokens are taken as they are; else messages are rendered by the
    template of ``tokenizer`` and encoded anew. A response that the length limit cut off gets no end token.

    Raises DataError for text that the tokenizer refuses.
    """
    if rollouts.fingerprint == tokenizer.fingerprint:
        return [p + r for p, r in zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)]
    if rollouts.rendered:
        return [encode_rendered(tokenizer, text) for text in rollouts.responses]
    return [
        tokenizer.encode_prompt(prompt) + (tokenizer.encode_response(text) if ended else tokenizer.encode(text))
        for prompt, text, ended in zip(rollouts.prompts, rollouts.responses, rollouts.ended, strict=True)
    ]


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a whole conversation that some chat template has already written out as text.

    Special tokens that are written out are read as what they are (a tokenizer that cannot takes them as text), what
    the template wrote after the last end token is dropped, and the ids end in one ``eos_id``, where the reward is read
    (not for a tokenizer of a .nemo whose model was trained without).
    """
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
