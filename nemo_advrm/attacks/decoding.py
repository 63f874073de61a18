"""Decoding guided by the reward, without RL (REFORM, Pathmanathan and Huang, arXiv 2507.06419).

At every token the likeliest next tokens of the SFT policy are tried. The one is kept whose text has the best reward
plus its weighted log-probability: max over the top k of r + alpha log pi. REFORM decodes so from policies that write
good or bad responses, towards falsely low or high scores (min of r - alpha log pi for the former). Here the reward is
that of Adv-RM's adversary, the target's z less lambda times the others', so that what all members like does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack
from nemo_advrm.attacks.drafts import Draft, as_rollouts, on_any_rank, shares, turns, usable
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.rollouts.types import Prompt, Rollouts

_BEGINNINGS = 64  # different first tokens of the responses to one prompt


@dataclass
class _Written:
    """A response that is being written; ``number`` is that of its first token by probability."""

    prompt: Prompt
    number: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class _Candidate:
    row: _Written
    tokens: list[int]
    log_prob: float


class Decoding(SearchAttack):
    """Writes each response token by token, or in pieces of ``adversarial.search.tokens_per_choice``.

    Nothing is random: the responses to one prompt differ by their first token, the likeliest first.
    """

    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        tokenizer = inputs.tokenizer
        beginnings = min(_BEGINNINGS, tokenizer.vocab_size)
        for share in shares(turns(inputs, beginnings), budget):
            rows = [_Written(prompt, number) for _, (prompt, number) in share]
            self._write(inputs, rows)
            texts = [Draft(row.prompt, tokenizer.decode_response(row.tokens)) for row in rows]
            yield as_rollouts(list(usable(texts, inputs)), tokenizer)

    def _write(self, inputs: AttackInputs, rows: list[_Written]) -> None:
        """Completes the rows of this rank; all ranks make the same number of choices."""
        search, longest = inputs.cfg.adversarial.search, inputs.cfg.rl.max_new_tokens - 1
        lm, eos = inputs.language_models.policy, inputs.tokenizer.eos_id
        while True:
            alive = [row for row in rows if not row.ended]
            if not on_any_rank(bool(alive)):
                return
            count = max([search.candidates, *(row.number + 2 for row in alive if not row.tokens)])
            ids_NK, log_probs_NK = lm.next_tokens([row.prompt.tokens + row.tokens for row in alive], count)
            candidates: list[_Candidate] = []
            for row, ids, log_probs in zip(alive, ids_NK.tolist(), log_probs_NK.tolist(), strict=True):
                allowed = [i for i in range(len(ids)) if log_probs[i] > -torch.inf]
                if row.tokens:
                    taken = [i for i in allowed if i < search.candidates]
                else:  # an empty response is none
                    taken = [i for i in allowed if ids[i] != eos][row.number : row.number + 1]
                candidates += [_Candidate(row, [*row.tokens, ids[i]], log_probs[i]) for i in taken]
            candidates = self._continued(inputs, candidates)
            rewards = inputs.search_rewards(_scored([(c.row.prompt, c.tokens) for c in candidates], inputs.tokenizer))
            best: dict[int, tuple[float, _Candidate]] = {}
            for candidate, reward in zip(candidates, rewards.tolist(), strict=True):
                value = reward + search.naturalness * candidate.log_prob
                if id(candidate.row) not in best or value > best[id(candidate.row)][0]:
                    best[id(candidate.row)] = value, candidate
            for row in alive:
                if id(row) in best:
                    row.tokens = best[id(row)][1].tokens
                row.ended = id(row) not in best or eos in row.tokens or len(row.tokens) >= longest

    def _continued(self, inputs: AttackInputs, candidates: list[_Candidate]) -> list[_Candidate]:
        """Appends the likeliest tokens to each candidate, up to ``tokens_per_choice`` new ones in all."""
        lm, eos = inputs.language_models.policy, inputs.tokenizer.eos_id
        longest = inputs.cfg.rl.max_new_tokens - 1
        for _ in range(inputs.cfg.adversarial.search.tokens_per_choice - 1):
            open_ones = [c for c in candidates if c.tokens[-1] != eos and len(c.tokens) < longest]
            ids_N1, log_probs_N1 = lm.next_tokens([c.row.prompt.tokens + c.tokens for c in open_ones], 1)
            more = zip(ids_N1.flatten().tolist(), log_probs_N1.flatten().tolist(), strict=True)
            longer = {
                id(c): _Candidate(c.row, [*c.tokens, token], c.log_prob + log_prob)
                for c, (token, log_prob) in zip(open_ones, more, strict=True)
            }
            candidates = [longer.get(id(c), c) for c in candidates]
        return candidates


def _scored(rows: list[tuple[Prompt, list[int]]], tokenizer: Tokenizer) -> Rollouts:
    """Returns unfinished responses as the members score them: without an end token where none was written."""
    return Rollouts(
        prompts=[prompt.messages for prompt, _ in rows],
        responses=[tokenizer.decode_response(tokens) for _, tokens in rows],
        ended=[tokenizer.eos_id in tokens for _, tokens in rows],
        prompt_tokens=[prompt.tokens for prompt, _ in rows],
        response_tokens=[tokens for _, tokens in rows],
        prompt_index=[prompt.index for prompt, _ in rows],
        fingerprint=tokenizer.fingerprint,
    )
