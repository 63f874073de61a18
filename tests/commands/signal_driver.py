"""Runs commands that get a signal at a named moment and are started again; prints one JSON line per case.

Each attempt is a forked child (two for a job of two processes), so that the libraries are imported once. Started by
test_signal_matrix.py as a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from ports import free_port
from restart_driver import digest, steps_of
from signal_points import signal_at

from nemo_advrm import cli
from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs

STEPS = 6  # of every training
SETTINGS = [
    "experiment=synthetic",
    "reward_model.reference_features=[]",
    "exp_manager.create_tensorboard_logger=false",
    "data.validation_fraction=0.2",
    f"trainer.max_steps={STEPS}",
    f"rl.max_steps={STEPS}",
    "trainer.checkpoint_every_n_steps=2",
    "trainer.val_check_interval=2",
    "model.global_batch_size=8",
    "model.num_layers=1",
    "model.hidden_dropout=0.1",
]
_POLICY = ["rl.prompts_per_step=4", "rl.max_new_tokens=8", "trainer.val_check_interval=0"]
_ATTACK = [
    "sft_statistics.num_prompts=8",
    "sft_statistics.samples_per_prompt=2",
    "adversarial.target_members=[1]",
    "adversarial.num_adversaries=1",
]
_PIPELINE = ["synthetic.sft_rows=100", "synthetic.preference_pairs=40", "synthetic.validation_pairs=16"]
_PIPELINE += ["pipeline.rounds=0", "pipeline.rlhf={r1:{reward:r1}}", "pipeline.jobs=1"]

STARTING = ("start", "configuration", "joining", "joined", "claim", "model", "first step")
TRAINING = ("step", "end of a step", "begin of a save", "save", "end of a save", "old checkpoint")
ENDING = ("last step", "final save", "final save written", "result", "end")
# (stage, moment, signal, processes, background): of two processes the second one alone gets the signal
CASES: list[tuple[str, str, str, int, bool]] = [
    *(("train_rm", m, "SIGTERM", 1, False) for m in (*STARTING, "data", *TRAINING, "validation", *ENDING)),
    *(("train_rm", m, "SIGUSR1", 1, True) for m in ("step", "begin of a save", "save", "end of a save")),
    *(("train_rm", m, "SIGTERM", 2, True) for m in ("joined", "claim", "step", "end of a step", "save", "validation")),
    *(("train_rm", m, "SIGUSR1", 2, False) for m in ("begin of a save", "save", "last step", "end")),
    *(("sft", m, "SIGUSR1", 1, False) for m in ("configuration", "step", "save", "final save")),
    *(("rlhf", m, "SIGTERM", 1, False) for m in ("model", "rollout", "scoring", "end of a save", "result")),
    *(("rlhf", m, "SIGUSR1", 2, False) for m in ("rollout", "scoring", "save", "final save")),
    *(("attack", m, "SIGTERM", 1, False) for m in ("reference", "rollout", "scoring", "save", "final save")),
    ("attack", "rollout", "SIGUSR1", 2, False),
    *(("pipeline", m, "SIGTERM", 1, False) for m in ("step", "between stages", "end of the last stage")),
    ("pipeline", "between stages", "SIGUSR1", 2, False),
]
# where each stage leaves its weights
MODEL = {"attack": "attack/direction_1_policy_1/model", "pipeline": "rlhf/r1/model"}


def name_of(case: tuple[str, str, str, int, bool]) -> str:
    stage, moment, name, processes, background = case
    return f"{stage}-{moment}-{name}-{processes}{'-background' if background else ''}".replace(" ", "_")


def write_pairs(path: Path) -> Path:
    write_jsonl_atomic(path, annotated_pairs(40, 1, SyntheticConfig()))
    return path


def settings(stage: str, home: Path) -> list[str]:
    data = f"data.train_path={home / 'pairs.jsonl'}"
    start = f"pretrained_checkpoint.restore_from_path={home / 'sft' / '1' / 'model'}"
    members = [str(home / name / "1" / "model") for name in ("train_rm", "train_rm_2")]
    return {
        "sft": [data, "trainer.val_check_interval=0"],
        "train_rm": [data],
        "rlhf": [*_POLICY, start, f"ensemble.members=[{members[0]}]"],
        "attack": [*_POLICY, *_ATTACK, start, f"ensemble.members=[{','.join(members)}]"],
        "pipeline": [*_POLICY, *_ATTACK, *_PIPELINE],
    }[stage]


def attempt(words: list[str], processes: int, moment: str = "", name: str = "") -> tuple[list[int], str]:
    """(exit status of every process of a command, what they said on stderr); the last gets the signal."""
    log = Path(os.environ["DRIVER_LOG"])
    begin = log.stat().st_size if log.exists() else 0
    port = free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _become(rank, processes, port, log)
            status = 1
            try:
                sys.argv = ["nemo-advrm", *words]
                if moment and rank == processes - 1:
                    with signal_at(moment, signal.Signals[name]) as came:
                        status = cli.main()
                    status = status if came else 99
                else:
                    status = cli.main()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    with open(log, "rb") as file:
        file.seek(begin)
        return statuses, file.read().decode(errors="replace")


def _become(rank: int, processes: int, port: int, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({k: str(v) for k, v in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()})


def main(home: Path, wanted: list[str]) -> None:
    from nemo_advrm.engine import cpu

    quiet_libraries()
    cpu.redirect_megatron_to_cpu()
    write_pairs(home / "pairs.jsonl")
    needed = {"rlhf": ["sft", "train_rm"], "attack": ["sft", "train_rm", "train_rm_2"]}
    done: set[tuple[str, int]] = set()

    def unbroken(stage: str, processes: int) -> Path:
        out = home / stage / str(processes)
        if (stage, processes) not in done:
            done.add((stage, processes))
            for other in needed.get(stage, []):
                unbroken(other, 1)
            plain = stage.removesuffix("_2")
            seed = "seed=2" if plain != stage else "seed=1"
            words = [plain, *SETTINGS, *settings(plain, home), seed, f"run_dir={out}"]
            statuses, said = attempt(words, processes)
            assert statuses == [0] * processes, f"{stage}: the unbroken run failed: {said}"
        return out

    for case in CASES:
        if wanted and name_of(case) not in wanted:
            continue
        stage, moment, name, processes, background = case
        expected, out = unbroken(stage, processes), home / "stopped" / name_of(case)
        words = [stage, *SETTINGS, *settings(stage, home), "seed=1", f"run_dir={out}"]
        words.append(f"trainer.async_checkpoint={str(background).lower()}")
        statuses, said = attempt(words, processes, moment, name)
        again, then = attempt(words, processes)
        model = MODEL.get(stage, "model")
        metrics = Path(model).parent / "metrics.jsonl"
        result = {
            "case": name_of(case),
            "statuses": statuses,
            "said": said,
            "then": then,
            "again": again,
            "equal": again == [0] * processes and digest(out / model) == digest(expected / model),
            "steps": [steps_of(directory / metrics) for directory in (out, expected) if again[0] == 0],
            "leftovers": sorted(str(p.relative_to(out)) for p in out.rglob("*.partial")),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
