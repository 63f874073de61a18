"""Reads and encodes the prompts of a run: those of the attack, of RLHF, and held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import samples_prompts
from nemo_advrm.data import inputs
from nemo_advrm.data.messages import Message, prompt_key, prompt_name
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.seeds import derive_seed


def encode_prompts(prompts: list[tuple[Message, ...]], tokenizer: Tokenizer, cfg: Config) -> list[Prompt]:
    """Encodes prompts and numbers them.

    ``data.on_overlong`` decides about a prompt that leaves no room for the response, ``data.on_bad_row`` about one that
    the chat template refuses. Raises DataError for such a prompt by default, and when no prompt is left.
    """
    limit, needed = cfg.model.encoder_seq_length, cfg.rl.max_new_tokens
    room = limit - needed
    advice = "set data.on_overlong=skip or data.on_overlong=truncate_prompt"
    lengths = RowLengths(cfg.data.on_overlong, cfg.data.on_bad_row, advice)
    encoded: list[Prompt] = []
    for i, messages in enumerate(prompts):
        name = prompt_name(messages, i + 1)
        tokens = lengths.encode(name, partial(tokenizer.encode_prompt, messages))
        if tokens is None:
            continue
        told = (
            f"{name}: the prompt has {len(tokens)} tokens; model.encoder_seq_length={limit} less "
            f"rl.max_new_tokens={needed} leaves {room}"
        )
        cut = lengths.tokens_to_cut(len(tokens), room, len(tokens) - 1, told)
        if cut is not None:
            encoded.append(Prompt(len(encoded), messages, tokens[cut:]))
    counts = lengths.finish(len(encoded), "there are no prompts")
    if lengths.refused and runtime.current().is_writer:
        print(f"prompts: {len(lengths.refused)} of {len(prompts)} left out: {lengths.refused[0]}", flush=True)
    inputs.print_encoding_counts("prompts", {name: counts[name] for name in ("overlong", "truncated")})
    return encoded


# prompts of the embedded language drawn per prompt needed, because some repeat
_DRAWN_FOR_ONE = 4


def held_out_prompts(cfg: Config, count: int, trained: Iterable[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
    """Returns at most ``count`` distinct prompts, none of them in ``trained``; deterministic for a ``seed`` and data.

    They come from ``data.held_out_prompts_path`` in the file's order, or from the embedded language. Raises ConfigError
    when there is neither, DataError when all of them are in ``trained``.
    """
    if cfg.data.held_out_prompts_path:
        offered = inputs.held_out(cfg)
        source = f"data.held_out_prompts_path={cfg.data.held_out_prompts_path}"
    elif samples_prompts(cfg):
        from nemo_advrm.synthetic.corpus import sample_prompts

        offered = sample_prompts(_DRAWN_FOR_ONE * count, derive_seed(cfg.seed, "held-out prompts"), held_out=True)
        source = "the embedded language"
    else:
        raise ConfigError("data.held_out_prompts_path is not set: name a file of prompts that are not trained on")
    known = {prompt_key(prompt) for prompt in trained}
    left = {key: prompt for prompt in offered if (key := prompt_key(prompt)) not in known}
    if not left:
        raise DataError(f"{source}: all of its {len(offered)} prompts are training prompts")
    return list(left.values())[:count]


def attack_prompts(cfg: Config) -> list[tuple[Message, ...]]:
    """Returns the prompts of the attack and its SFT responses, at most ``sft_statistics.num_prompts``.

    Raises ConfigError when no file of prompts is configured.
    """
    count = cfg.sft_statistics.num_prompts
    return _training_prompts(cfg, count, "attack prompts")[:count]


def rlhf_prompts(cfg: Config) -> list[tuple[Message, ...]]:
    """Returns the prompts of RLHF. Raises ConfigError when no file of prompts is configured."""
    return _training_prompts(cfg, cfg.synthetic.prompts, "rlhf prompts")


def _training_prompts(cfg: Config, synthetic_count: int, seed_name: str) -> list[tuple[Message, ...]]:
    """Returns all prompts of the configured file, or ``synthetic_count`` prompts of the embedded language."""
    if cfg.data.prompts_path or cfg.data.train_path:
        return inputs.prompts(cfg)
    if cfg.pipeline.gold == "synthetic":
        from nemo_advrm.synthetic.corpus import sample_prompts

        return sample_prompts(synthetic_count, derive_seed(cfg.seed, seed_name))
    raise ConfigError("data.prompts_path is not set: name a file of prompts")
