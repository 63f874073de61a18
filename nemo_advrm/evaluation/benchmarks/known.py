"""The benchmarks that are recognised, in the order in which a row is tried."""

from __future__ import annotations

from typing import Any

from nemo_advrm.evaluation.benchmarks.base import Benchmark
from nemo_advrm.evaluation.benchmarks.judge_bench import JUDGE_BENCH
from nemo_advrm.evaluation.benchmarks.ppe import PPE_CORRECTNESS, PPE_HUMAN
from nemo_advrm.evaluation.benchmarks.reward_bench import REWARD_BENCH
from nemo_advrm.evaluation.benchmarks.reward_bench_2 import REWARD_BENCH_2
from nemo_advrm.evaluation.benchmarks.rm_bench import RM_BENCH

BENCHMARKS = (REWARD_BENCH_2, RM_BENCH, REWARD_BENCH, JUDGE_BENCH, PPE_HUMAN, PPE_CORRECTNESS)


def benchmark_of(row: Any, wanted: str) -> Benchmark | None:
    """Return the benchmark of that name, or with ``auto`` the first one whose columns ``row`` has; else None."""
    if wanted != "auto":
        return next((each for each in BENCHMARKS if each.name == wanted), None)
    return next((each for each in BENCHMARKS if isinstance(row, dict) and each.matches(row)), None)
