"""Jobs of data-parallel ranks for tests of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attack_inputs import TEXTS_PN, InstructedBytes, TableModel, make_inputs, plain, run, second
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.rollouts.megatron_language_model import MegatronLanguageModel

CASES: dict[str, dict[str, Any]] = {
    "probes": {"texts_PN": TEXTS_PN},
    "decoding": {},
    "word_substitution": {},
    "style": {"texts_PN": TEXTS_PN, "lm": TableModel(InstructedBytes(), lambda request: "thou " + request[-30:])},
    "inverted": {"texts_PN": TEXTS_PN},
}


def samples(directory: str) -> dict[str, list[dict[str, Any]]]:
    """The samples of each attack; odd numbers, so that ranks have unequal shares and one of them none in the end."""
    found = {}
    for name, options in CASES.items():
        settings = [f"adversarial.attack={name}", "adversarial.search.candidates=4"]
        scores = [lambda text: plain(text) + text.count("r"), second]
        home = Path(directory) / name
        found[name] = run(make_inputs(home, scores, *settings, **options), steps=3, samples_per_step=5)
    return found


def next_tokens(policy: str, rows: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """The likeliest next tokens of a Megatron policy at the running layout."""
    cfg = tiny_config(layout=runtime.current().layout)
    lm = MegatronLanguageModel("", build_policy(cfg, TOKENIZER, policy, 0, False), TOKENIZER, cfg.rl)
    ids_NK, log_probs_NK = lm.next_tokens(rows, 4)
    return ids_NK.tolist(), log_probs_NK.tolist()
