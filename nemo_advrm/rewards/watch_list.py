"""Which detectors watch a reward, by its settings alone; without torch, because the list of steps needs it."""

from __future__ import annotations

from nemo_advrm.config.schema import Config

AUTO = "auto"
DISAGREEMENT = "ensemble_disagreement"


def monitors_of(cfg: Config, members: int) -> list[str]:
    """Returns the detectors of ``detector.monitors`` for a reward of so many members, without repetitions.

    ``auto`` is the disagreement of an ensemble whose members are standardised: the SFT responses are scored for that
    anyway, so it costs nothing.
    """
    free = [DISAGREEMENT] if members > 1 and cfg.ensemble.standardise else []
    named = [name for entry in cfg.detector.monitors for name in (free if entry == AUTO else [entry])]
    return list(dict.fromkeys(named))


def watching_detectors(cfg: Config, members: int) -> list[str]:
    """Returns all detectors that RLHF on so many members needs: the monitors, and that of ``rl.detector_penalty``."""
    penalty = [cfg.rl.penalty_detector] if cfg.rl.detector_penalty else []
    return list(dict.fromkeys([*monitors_of(cfg, members), *penalty]))
