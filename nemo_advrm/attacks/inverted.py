"""Inverted: good responses that the target scores low.

A2RM ("Adversarial-Augmented Reward Model", OpenReview 79wzDmy6nc) trains a generator by RL. It rewrites the preferred
answer of a pair, with the same meaning, so that the reward model scores it below the rejected one. Here a greedy search
over rewrites takes the place of the generator: those of :mod:`nemo_advrm.attacks.rewrites`, which keep the meaning by
construction, and a paraphrase by the language model where that follows instructions. A find is the chosen side of its
pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack
from nemo_advrm.attacks.drafts import Draft, as_rollouts, shares, turns, usable
from nemo_advrm.attacks.paraphrases import Request, is_instructed, rewritten
from nemo_advrm.attacks.rewrites import REWRITES
from nemo_advrm.objectives.uncertainty import others_mean
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.seeds import derive_seed

_ROUNDS = 3  # rewrites of one answer, one upon the other


@dataclass
class _Answer:
    """A good answer that is rewritten; ``place`` identifies it, ``made_by`` lists the rewrites."""

    prompt: Prompt
    place: int
    text: str
    reward: float = 0.0
    made_by: list[str] = field(default_factory=list)


class Inverted(SearchAttack):
    """Rewrites the best SFT responses to each prompt, three times at most, towards a low score of the target.

    The best are those that the other members like most; where there are none, those that the target itself likes most.
    """

    underrates: ClassVar[bool] = True

    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        ranked_PN = good_first(inputs)
        per_prompt = max(1, len(ranked_PN[0]) // 2)  # the other half are not good answers
        for share in shares(turns(inputs, per_prompt), budget):
            answers = []
            for place, (prompt, number) in share:
                best = ranked_PN[prompt.index][number]
                if best in inputs.sft_responses.finished(prompt.index):  # an answer that was cut off is not a good one
                    answers.append(_Answer(prompt, place, inputs.sft_responses.responses_PN[prompt.index][best]))
            rewards = inputs.search_rewards(as_rollouts([Draft(a.prompt, a.text) for a in answers], inputs.tokenizer))
            for answer, reward in zip(answers, rewards.tolist(), strict=True):
                answer.reward = reward
            self._paraphrase(inputs, answers)
            for number in range(_ROUNDS):
                self._rewrite(inputs, answers, number)
            changed = [answer for answer in answers if answer.made_by]
            drafts = [Draft(answer.prompt, answer.text, ", ".join(answer.made_by)) for answer in changed]
            yield as_rollouts(list(usable(drafts, inputs)), inputs.tokenizer)

    def _paraphrase(self, inputs: AttackInputs, answers: list[_Answer]) -> None:
        """Takes a paraphrase of each answer by the language model where the target scores it lower; all ranks call."""
        instruction = inputs.cfg.adversarial.search.inverted_instruction
        if not instruction or not is_instructed(inputs.language_models.helper):
            return
        requests = [
            Request(a.prompt, a.text, instruction, derive_seed(inputs.seed, "paraphrase", a.place)) for a in answers
        ]
        texts = rewritten(requests, inputs.language_models.helper, inputs.cfg)
        self._take_best(inputs, answers, [[("paraphrase", text)] if text else [] for text in texts])

    def _rewrite(self, inputs: AttackInputs, answers: list[_Answer], number: int) -> None:
        """Takes the rewrite of each answer that lowers the target's score most, if one does; all ranks call."""
        offered = []
        for answer in answers:
            options = []
            for name, rewrite in REWRITES.items():
                draw = random.Random(derive_seed(inputs.seed, name, answer.place, number))
                text = rewrite(answer.text, draw)
                if name not in answer.made_by and text != answer.text:
                    options.append((name, text))
            offered.append(options)
        self._take_best(inputs, answers, offered)

    def _take_best(self, inputs: AttackInputs, answers: list[_Answer], offered: list[list[tuple[str, str]]]) -> None:
        drafts, owners = [], []
        for answer, options in zip(answers, offered, strict=True):
            whole = {text for _, text in options}  # a rewrite that is cut to the longest response loses its meaning
            offers = [Draft(answer.prompt, text, name) for name, text in options]
            kept = [draft for draft in usable(offers, inputs) if draft.text in whole]
            drafts += kept
            owners += [answer] * len(kept)
        rewards = inputs.search_rewards(as_rollouts(drafts, inputs.tokenizer)).tolist()
        best: dict[int, tuple[float, Draft]] = {}
        for answer, draft, reward in zip(owners, drafts, rewards, strict=True):
            if reward > best.get(answer.place, (answer.reward, draft))[0]:
                best[answer.place] = reward, draft
        for answer in answers:
            if answer.place in best:
                answer.reward, draft = best[answer.place]
                answer.text = draft.text
                answer.made_by.append(draft.origin)


def good_first(inputs: AttackInputs) -> list[list[int]]:
    """Returns the indices of the SFT responses to each prompt, the best first, ties by index."""
    z_PNK = inputs.rule.own_z_PNK
    if z_PNK.size(-1) > 1:
        quality_PN = others_mean(z_PNK.flatten(0, 1), inputs.target - 1).reshape(z_PNK.shape[:2])
    else:
        quality_PN = z_PNK[..., 0]
    order_PN = torch.sort(quality_PN, dim=1, descending=True, stable=True).indices
    order: list[list[int]] = order_PN.tolist()
    return order
