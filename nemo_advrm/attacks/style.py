"""Style: SFT responses in another style, written by an instructed language model.

The Adv-RM paper (arXiv 2504.06141, table 1) compares itself with "StyleAdv" and does not say how that was done. Style
transfer as an attack is that of Qi et al. ("Mind the Style of Text!", arXiv 2110.07139), who paraphrase an input in
several styles (Bible, poetry, lyrics, tweets, Shakespeare) and keep the one that fools the model. This is our reading:
every paraphrase is a sample, and the find rule keeps those that fool the target.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack
from nemo_advrm.attacks.drafts import Draft, as_rollouts, shares, turns, usable
from nemo_advrm.attacks.paraphrases import Request, check_instructed, rewritten
from nemo_advrm.errors import ConfigError
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.seeds import derive_seed


class Style(SearchAttack):
    """Rewrites each SFT response in every style of ``adversarial.search.styles``."""

    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        """See :class:`SearchAttack`. Raises ConfigError without styles, and for a model that is not instructed."""
        search, lm = inputs.cfg.adversarial.search, inputs.language_models.helper
        if not search.styles:
            raise ConfigError("adversarial.search.styles=[]: names no style")
        check_instructed(lm, "style")
        responses_PN = inputs.sft_responses.responses_PN
        styles = len(search.styles)
        for share in shares(turns(inputs, styles * len(responses_PN[0])), budget):
            requests, names = [], []
            for place, (prompt, number) in share:
                names.append(search.styles[number % styles])
                instruction = search.style_instruction.replace("{style}", names[-1])
                answer = responses_PN[prompt.index][number // styles]
                requests.append(Request(prompt, answer, instruction, derive_seed(inputs.seed, "style", place)))
            answers = zip(requests, rewritten(requests, lm, inputs.cfg), names, strict=True)
            drafts = [Draft(request.prompt, text, f"style: {name}") for request, text, name in answers if text]
            yield as_rollouts(list(usable(drafts, inputs)), inputs.tokenizer)
