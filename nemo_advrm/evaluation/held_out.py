"""Prompts that training never sees, the same for every stage, reward and seed of RLHF of a run."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import samples_prompts
from nemo_advrm.data import inputs
from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.seeds import derive_seed

# prompts of the embedded language that are drawn for one that is wanted: some repeat
_DRAWN_FOR_ONE = 4


def held_out_prompts(cfg: Config, count: int, trained: Iterable[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
    """At most ``count`` different prompts, none of them in ``trained``; the same for the same ``seed`` and data.

    They are those of ``data.held_out_prompts_path`` in the order of the file, or of the embedded language. Raises
    ConfigError where there is neither, DataError where all of them are trained on.
    """
    if cfg.data.held_out_prompts_path:
        offered = inputs.held_out(cfg)
        source = f"data.held_out_prompts_path={cfg.data.held_out_prompts_path}"
    elif samples_prompts(cfg):
        from nemo_advrm.synthetic.corpus import sample_prompts

        offered = sample_prompts(_DRAWN_FOR_ONE * count, derive_seed(cfg.seed, "held-out prompts"), held_out=True)
        source = "the embedded language"
    else:
        raise ConfigError("data.held_out_prompts_path is not set: name a file of prompts that training does not have")
    known = {prompt_key(prompt) for prompt in trained}
    left = {key: prompt for prompt in offered if (key := prompt_key(prompt)) not in known}
    if not left:
        raise DataError(f"{source}: each of its {len(offered)} prompts is one that training has")
    return list(left.values())[:count]
