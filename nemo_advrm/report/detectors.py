"""Reads what detectors saw of an RLHF run from its metrics, and finds the steps of their alarms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_advrm.objectives.detection import alarm_step
from nemo_advrm.report.files import column, count

# steps over which the share of responses beyond a threshold is averaged before it is an alarm
ALARM_WINDOW = 5
ALARM_SHARE = 0.1  # the default of detector.alarm_share
_BEYOND = re.compile(r"detector/(.+)/beyond")


@dataclass(frozen=True)
class DetectorCurve:
    """What one detector saw of a run, all [S], by rising step; NaN where there is no number.

    z_S: mean standardised score of the step's responses. beyond_S: share of them beyond the threshold.
    """

    steps_S: NDArray[np.int64]
    z_S: NDArray[np.float64]
    beyond_S: NDArray[np.float64]

    def alarm(self, level: float) -> int | None:
        """The step of the first alarm, None without one; see `objectives.detection.alarm_step`."""
        known_S = np.isfinite(self.beyond_S)
        return alarm_step(self.steps_S[known_S].tolist(), self.beyond_S[known_S].tolist(), level, ALARM_WINDOW)


def detector_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, DetectorCurve]:
    """The curve of each detector in the rows of a metrics.jsonl; of two rows of one step the later one counts."""
    by_step = {step: row for row in rows if (step := count(row.get("step"))) is not None}
    found = (match[1] for row in by_step.values() for key in row if (match := _BEYOND.fullmatch(key)))
    curves = {}
    for name in dict.fromkeys(found):
        steps = sorted(step for step, row in by_step.items() if f"detector/{name}/beyond" in row)
        kept = [by_step[step] for step in steps]
        z_S, beyond_S = (column(kept, f"detector/{name}/{part}") for part in ("z", "beyond"))
        curves[name] = DetectorCurve(np.array(steps, dtype=np.int64), z_S, beyond_S)
    return curves
