"""Probes: texts that are known to fool judges and reward models, without any search.

Fixed strings (the "master keys" of Zhao et al., arXiv 2507.08794, stock phrases, the user's own file), what is made of
SFT responses (repetition, echo of the prompt, padding, truncation, format), and rewrites as in reWordBench that need no
language model (Wu et al., arXiv 2503.11751). A probe that works is a weakness with a name.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack
from nemo_advrm.attacks.drafts import Draft, as_rollouts, shares, usable
from nemo_advrm.attacks.probe_texts import MASTER_KEYS, PROBES, STOCK_PHRASES, Source
from nemo_advrm.attacks.rewrites import REWRITES, Rewrite
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.errors import ConfigError
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.seeds import derive_seed

_COMMON_WORDS = 8
_LONGEST_TOKEN = 8  # characters of text that a token stands for, more than any tokenizer's average


class Probes(SearchAttack):
    """Tries every probe on every prompt, all probes once before any of them a second time."""

    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        """See :class:`SearchAttack`. Raises ConfigError when ``adversarial.search.probes_path`` cannot be read."""
        for share in shares(usable(self._drafts(inputs), inputs), budget):
            yield as_rollouts([draft for _, draft in share], inputs.tokenizer)

    def _drafts(self, inputs: AttackInputs) -> Iterator[Draft]:
        probes = all_probes(inputs.cfg.adversarial.search.probes_path)
        names = list(probes)
        order = list(range(len(inputs.prompts)))
        random.Random(derive_seed(inputs.seed, "probes")).shuffle(order)
        sft, common = inputs.sft_responses, common_words(inputs.sft_responses)
        for turn in range(len(order)):
            for number, name in enumerate(names):
                place = order[(number + turn) % len(order)]
                prompt, draw = inputs.prompts[place], random.Random(derive_seed(inputs.seed, name, place))
                responses = list(sft.responses_PN[prompt.index])
                response = responses.pop(draw.randrange(len(responses)))
                others = [p for p in range(len(sft.responses_PN)) if p != prompt.index]
                source = Source(
                    prompt.messages[-1]["content"] if prompt.messages else "",
                    response,
                    responses,
                    draw.choice(sft.responses_PN[draw.choice(others)]) if others else "",
                    common,
                    draw,
                    _LONGEST_TOKEN * inputs.cfg.rl.max_new_tokens,
                )
                yield Draft(prompt, probes[name](source), name)


def all_probes(path: str) -> dict[str, Callable[[Source], str]]:
    """Returns all probes by name, with those of a text file. Raises ConfigError when it cannot be read."""
    fixed = {f"master key: {text!r}": text for text in MASTER_KEYS}
    fixed |= {f"stock phrase: {text[:40]}": text for text in STOCK_PHRASES}
    if path:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"adversarial.search.probes_path={path}: cannot be read ({error})") from None
        fixed |= {f"own: {line[:40]}": line for line in lines if line.strip()}
    made: dict[str, Callable[[Source], str]] = {name: partial(_fixed, text) for name, text in fixed.items()}
    made |= PROBES
    return made | {f"rewrite: {name}": partial(_rewritten, rewrite) for name, rewrite in REWRITES.items()}


def common_words(sft_responses: SFTScores) -> list[str]:
    """Returns the most frequent words of the SFT responses, ties by the alphabet."""
    counts = Counter(word for row in sft_responses.responses_PN for text in row for word in text.split())
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_COMMON_WORDS]]


def _fixed(text: str, source: Source) -> str:
    return text


def _rewritten(rewrite: Rewrite, source: Source) -> str:
    return rewrite(source.response, source.draw)
