"""Trains on two processes of which the second one misbehaves; prints one JSON line per case. See test_hang.py.

The libraries are imported once: every process of a job is a fork of this one, and the jobs run at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from nemo_advrm.cli import guarded
from nemo_advrm.config import load_config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.quiet import quiet_libraries
from nemo_advrm.stages import train_rm
from nemo_advrm.synthetic.corpus import sample_prompts, sample_response
from nemo_advrm.synthetic.gold import GoldReward
from nemo_advrm.synthetic.preferences import gold_labelled_pairs

HANG_SECONDS = 6.0
STEPS = 12


def at_step(step: int, act: Callable[[], None], every_later_one: bool = False, rank: int = 1) -> None:
    """Let one rank ``act`` when it reads the data of ``step``."""
    steps = RewardModel.steps

    def act_at_step(self: RewardModel, start: int) -> Iterator[Any]:
        for number, batch in enumerate(steps(self, start), start=start + 1):
            if os.environ["RANK"] == str(rank) and (number == step or (every_later_one and number > step)):
                act()
            yield batch

    RewardModel.steps = act_at_step  # type: ignore[method-assign]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stuck_data_loader() -> None:
    time.sleep(600)


def slow_disk() -> None:
    time.sleep(0.3)


def slow_validation() -> None:
    """Three batches of validation take longer than the limit, each of them less."""
    validate = RewardModel.validation_step

    def slowly(self: RewardModel, batch: Any, batch_idx: int) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(0.45 * HANG_SECONDS)
        validate(self, batch, batch_idx)

    RewardModel.validation_step = slowly  # type: ignore[method-assign]


def slow() -> None:
    at_step(2, slow_disk, every_later_one=True)
    slow_validation()


CASES: dict[str, Callable[[], None]] = {
    "stopped": lambda: at_step(5, stop),
    "first_stopped": lambda: at_step(5, stop, rank=0),
    "stuck": lambda: at_step(5, stuck_data_loader),
    "slow": slow,
}


def start(case: str, rank: int, port: int, home: Path) -> int:
    """Process id of one rank; never returns in the child."""
    child = os.fork()
    if child:
        return child
    log = open(home / f"{case}_{rank}.log", "w")  # noqa: SIM115 (lives as long as the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    torch.set_num_threads(1)
    CASES[case]()
    overrides = [
        "experiment=synthetic",
        "exp_manager.create_tensorboard_logger=false",
        f"run_dir={home / case}",
        f"data.train_path={home / 'pairs.jsonl'}",
        "data.validation_fraction=0.3",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=5",
        "model.global_batch_size=8",
        f"trainer.hang_minutes={HANG_SECONDS / 60}",
        "trainer.timeout_minutes=2",
    ]
    sys.exit(guarded(lambda: train_rm.main(load_config(overrides, "train_rm"))))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(home: Path) -> None:
    quiet_libraries()
    rng = Random(1)
    prompts = sample_prompts(80, 1)
    answers = [(sample_response(p, rng), sample_response(p, rng)) for p in prompts]
    write_jsonl_atomic(home / "pairs.jsonl", gold_labelled_pairs(prompts, answers, GoldReward(), 0.1, 1))
    jobs = {}
    for case in CASES:
        port = free_port()
        jobs[case] = [start(case, rank, port, home) for rank in range(2)]
    stopped = {jobs["stopped"][1], jobs["first_stopped"][0]}
    for case, pids in jobs.items():
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids if pid not in stopped]
        logs = [(home / f"{case}_{rank}.log").read_text() for rank in range(2)]
        stacks = sorted(path.name for path in (home / case).glob("hang_rank_*.txt"))
        row = {"case": case, "statuses": statuses, "logs": logs, "stacks": stacks}
        if case == "stuck":
            row["stack_of_rank_1"] = (home / case / "hang_rank_1.txt").read_text()
        print(json.dumps(row), flush=True)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
