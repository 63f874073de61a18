"""Word substitution in SFT responses, as TextFooler does it (Jin et al., arXiv 1907.11932).

TextFooler orders the words of a text by how much the classifier's confidence falls without each, and replaces them in
this order by words that fit, until the class flips. Substitutes come from a language model, as in BERT-Attack (Li et
al., arXiv 2004.09984), and not from a table of synonyms. A reward model has no class to flip: a substitution is kept
where it raises the adversary's reward (the target's z less lambda times the others'). How the Adv-RM paper applied
TextFooler to reward models is not published, so this is our reading of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack
from nemo_advrm.attacks.drafts import Draft, as_rollouts, on_any_rank, shares, turns, usable
from nemo_advrm.attacks.substitutes import Gap, Substitutes
from nemo_advrm.rollouts.types import Prompt, Rollouts

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# words that are tried for each that may be changed: later ones matter little, and each costs a score per substitute
_TRIED = 2


@dataclass
class _Text:
    """A response that is being changed.

    Attributes:
        words: its words, by place.
        between: what stands before each word, and at last after all.
        left: places that are still to be tried, the last one first.
        edits: how many words were changed.
    """

    prompt: Prompt
    words: list[str]
    between: list[str]
    reward: float = 0.0
    left: list[int] = field(default_factory=list)
    edits: int = 0
    limit: int = 0

    @classmethod
    def of(cls, prompt: Prompt, text: str) -> _Text:
        found = list(_WORD.finditer(text))
        ends = [0, *(match.end() for match in found)]
        starts = [*(match.start() for match in found), len(text)]
        between = [text[end:start] for end, start in zip(ends, starts, strict=True)]
        return cls(prompt, [match[0] for match in found], between)

    def joined(self, place: int = -1, word: str = "") -> str:
        """Returns the text with ``word`` in one place."""
        words = [word if i == place else own for i, own in enumerate(self.words)]
        return "".join(part for pair in zip(self.between, [*words, ""], strict=True) for part in pair)

    def without(self, place: int) -> str:
        """Returns the text without one word and the white space before it."""
        between = list(self.between)
        between[place] = between[place].rstrip()
        kept = _Text(self.prompt, [*self.words[:place], "", *self.words[place + 1 :]], between)
        return kept.joined().strip()

    @property
    def is_open(self) -> bool:
        return bool(self.left) and self.edits < self.limit


class WordSubstitution(SearchAttack):
    """Changes at most ``adversarial.search.edit_share`` of the words of each SFT response."""

    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        per_prompt = len(inputs.sft_responses.responses_PN[0])
        substitutes = Substitutes(inputs.language_models.helper, inputs.cfg.adversarial.search.candidates)
        for share in shares(turns(inputs, per_prompt), budget):
            responses = inputs.sft_responses.responses_PN
            texts = [_Text.of(prompt, responses[prompt.index][number]) for _, (prompt, number) in share]
            self._order(inputs, texts)
            while on_any_rank(any(text.is_open for text in texts)):
                self._change_one_word(inputs, substitutes, [text for text in texts if text.is_open])
            drafts = [
                Draft(text.prompt, text.joined(), f"{text.edits} of {len(text.words)} words")
                for text in texts
                if text.edits
            ]
            yield as_rollouts(list(usable(drafts, inputs)), inputs.tokenizer)

    def _order(self, inputs: AttackInputs, texts: list[_Text]) -> None:
        """Sets the places to try of each text: those first without which the reward rises most, or falls least.

        TextFooler takes the words first that hold up the class. Here these are the words that hold down the reward.
        """
        whole = [Draft(text.prompt, text.joined()) for text in texts]
        shorter = [Draft(text.prompt, text.without(i)) for text in texts for i in range(len(text.words))]
        rewards = _rewards(inputs, [*whole, *shorter])
        place = len(whole)
        for text, reward in zip(texts, rewards, strict=False):
            count = len(text.words)
            gains = [rewards[place + i] - reward for i in range(count)]
            place += count
            text.reward = reward
            text.limit = int(inputs.cfg.adversarial.search.edit_share * count) or min(1, count)
            order = sorted(range(count), key=lambda i: (-gains[i], i))[: _TRIED * text.limit]
            text.left = order[::-1]

    def _change_one_word(self, inputs: AttackInputs, substitutes: Substitutes, texts: list[_Text]) -> None:
        """Tries the next place of every text; all ranks call."""
        places = [text.left.pop() for text in texts]
        gaps = [
            Gap(text.prompt, text.joined()[: _start(text, i)], text.words[i], text.joined()[_end(text, i) :])
            for text, i in zip(texts, places, strict=True)
        ]
        words = substitutes.of(gaps)
        tried = [(n, word) for n, proposed in enumerate(words) for word in proposed]
        drafts = [Draft(texts[n].prompt, texts[n].joined(places[n], word)) for n, word in tried]
        allowed = [bool(list(usable([draft], inputs))) for draft in drafts]
        rewards = _rewards(inputs, [draft for draft, ok in zip(drafts, allowed, strict=True) if ok])
        left = iter(rewards)
        best: dict[int, tuple[float, str]] = {}
        for (n, word), ok in zip(tried, allowed, strict=True):
            reward = next(left) if ok else texts[n].reward
            if reward > best.get(n, (texts[n].reward, ""))[0]:
                best[n] = reward, word
        for n, (reward, word) in best.items():
            texts[n].words[places[n]] = word
            texts[n].reward = reward
            texts[n].edits += 1


def _start(text: _Text, place: int) -> int:
    return sum(map(len, text.between[: place + 1])) + sum(map(len, text.words[:place]))


def _end(text: _Text, place: int) -> int:
    return _start(text, place) + len(text.words[place])


def _rewards(inputs: AttackInputs, drafts: list[Draft]) -> list[float]:
    rewards: list[float] = inputs.search_rewards(as_rollouts(drafts, inputs.tokenizer)).tolist()
    return rewards
