"""Share of a GPU's peak that matrix products reach, by the model's width and number format, as measured.

Measured on one H200 on 2026-11-27 by an earlier state (commit cbcff36), with megatron-core 0.16.1 and Transformer
Engine 2.11: training of reward models on rows of full length. docs/scale.md sets the plan beside these measurements.
"""

from __future__ import annotations

import itertools
import math

# format -> ((hidden size, share of the format's peak), ...) by rising width. Attention, which stays in bf16, runs at
# bf16's share, so an FP8 share is that of the layers' matrices with which the step takes the measured time:
#   hidden 2,048 (16 layers): bf16 76,655 tokens/s; FP8 current and delayed 0.93 and 0.94 of that
#   hidden 4,096 (4 layers): bf16 107,782 tokens/s; current 1.51, delayed 1.66, blockwise 1.31 times that
_MEASURED: dict[str, tuple[tuple[int, float], ...]] = {
    "bf16": ((2048, 0.468), (4096, 0.592)),
    "fp8_delayed": ((2048, 0.219), (4096, 0.504)),
    "fp8_current": ((2048, 0.217), (4096, 0.456)),
    # at 2,048 not measured: as little as current scaling
    "fp8_blockwise": ((2048, 0.217), (4096, 0.393)),
}
# not measured: the nearest that was
_LIKE = {"fp32": "bf16", "mxfp8": "fp8_blockwise"}


def measured_share(precision: str, hidden_size: int) -> float:
    """Share of the peak in ``precision.name`` at this width.

    Between measured widths it is interpolated by the logarithm of the width; outside it is that of the nearest one.
    """
    points = _MEASURED[_LIKE.get(precision, precision)]
    if hidden_size <= points[0][0]:
        return points[0][1]
    for (low, share), (high, higher) in itertools.pairwise(points):
        if hidden_size <= high:
            return share + (higher - share) * math.log(hidden_size / low) / math.log(high / low)
    return points[-1][1]
