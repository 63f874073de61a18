"""Runs trainings that kill themselves with SIGKILL and restart; prints one JSON line per case.

A case is run twice: unbroken, and killed at some moments. Each attempt is a forked child, so that the
libraries are imported once. Started by test_restart.py as a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from nemo_advrm.commands import rlhf, sft, train_rm
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.file_writers import FileWriters
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs
from nemo_advrm.synthetic.corpus import sample_prompts, sample_tokens, text_of
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer
from nemo_advrm.training.callbacks.metrics_writer import MetricsWriter

KILLED = -signal.SIGKILL


def kill_after(step: int) -> None:
    """Die at the end of training step ``step`` (counted from 1), after its metrics are written."""
    write = MetricsWriter.on_train_batch_end

    def write_and_die(self, trainer, *args):  # type: ignore[no-untyped-def]
        write(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsWriter.on_train_batch_end = write_and_die  # type: ignore[method-assign]


def kill_while_saving(number: int) -> None:
    """Die inside the ``number``-th checkpoint, when its weights are written but it is not complete."""
    finish = checkpoint.Saving.finish
    count = [0]

    def finish_and_die(self, limit_minutes):  # type: ignore[no-untyped-def]
        finish(self, limit_minutes)
        if ".partial" in str(self.path):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Saving.finish = finish_and_die  # type: ignore[method-assign]


def kill_while_writing(number: int, step: int) -> None:
    """Die at the end of ``step`` while threads write the files of the ``number``-th checkpoint, a tensor of each."""
    each = FileWriters._each
    seen: list[Path] = []

    def stop_at_second(self, tensors):  # type: ignore[no-untyped-def]
        if self.directory not in seen:
            seen.append(self.directory)
        items = each(self, tensors)
        yield next(items)
        if seen.index(self.directory) == number - 1:
            time.sleep(600)
        yield from items

    FileWriters._each = stop_at_second  # type: ignore[method-assign]
    kill_after(step)


def kill_between_renames(number: int) -> None:
    """Die when the ``number``-th checkpoint is complete but does not bear its name yet."""
    rename = Path.rename
    count = [0]

    def rename_and_die(self, target):  # type: ignore[no-untyped-def]
        renamed = rename(self, target)
        if Path(target).name.startswith("step_") and Path(target).suffix == ".new":
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.rename = rename_and_die  # type: ignore[method-assign]


def attempt(work: Callable[[], int], sabotage: Callable[[], None] | None = None) -> int:
    """Exit status of ``work`` in a child; negative is the signal that ended it."""
    child = os.fork()
    if child == 0:
        log = open(os.environ["DRIVER_LOG"], "a")  # noqa: SIM115 (lives as long as the process)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        status = 1
        try:
            torch.set_num_threads(1)
            if sabotage is not None:
                sabotage()
            status = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(directory: Path) -> str:
    """Hash of the trained weights (Megatron's files hold tensors only, in a fixed order)."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(directory / "weights"))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
    load(tensors, storage_reader=reader, no_dist=True)
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if "val/loss" not in line]


def compare(name: str, run: Callable[[Path], int], home: Path, sabotages: list[Callable[[], None]]) -> None:
    """Unbroken against killed at each sabotage and restarted; prints what came of it."""
    assert attempt(lambda: run(home / "unbroken")) == 0, f"{name}: unbroken run failed, see {os.environ['DRIVER_LOG']}"
    statuses = [attempt(lambda: run(home / "killed"), s) for s in sabotages]
    statuses.append(attempt(lambda: run(home / "killed")))
    result = {
        "case": name,
        "statuses": statuses,
        "unbroken": digest(home / "unbroken" / "model"),
        "restarted": digest(home / "killed" / "model") if statuses[-1] == 0 else "",
        "steps": steps_of(home / "killed" / "metrics.jsonl"),
        "unbroken_steps": steps_of(home / "unbroken" / "metrics.jsonl"),
        "leftovers": sorted(p.name for p in (home / "killed").glob("checkpoints/*")),
    }
    print(json.dumps(result), flush=True)


def main(home: Path) -> None:
    quiet_libraries()
    tiny = [
        *("experiment=synthetic", "reward_model.reference_features=[]"),
        *("trainer.checkpoint_every_n_steps=3", "exp_manager.create_tensorboard_logger=false"),
    ]
    rng = Random(1)
    prompts = sample_prompts(8, 1)
    write_jsonl_atomic(home / "pairs.jsonl", annotated_pairs(80, 1, SyntheticConfig()))
    provenance = Provenance(0, 0, 1, 0, (0.0, 0.0), (0.0, 0.0), 2.0, "", (0.0, 0.0))
    topics = [SyntheticTokenizer().encode(prompt[0]["content"]) for prompt in prompts]
    chosen = [text_of(sample_tokens(nouns, rng)) for nouns in topics]
    PairStore(home / "store.jsonl").append(
        [AdversarialPair(tuple(p), text, ". . .", provenance) for p, text in zip(prompts, chosen, strict=True)]
    )

    def train(out: Path) -> int:
        return sft.main(load_config([*tiny, f"run_dir={out}", "trainer.max_steps=7", "synthetic.sft_rows=200"], "sft"))

    def reward(out: Path, *extra: str) -> int:
        overrides = [
            *tiny,
            f"run_dir={out}",
            f"data.train_path={home / 'pairs.jsonl'}",
            "data.validation_fraction=0.2",
            "trainer.max_steps=8",
            "model.global_batch_size=8",
            "model.attention_dropout=0.1",
            "model.hidden_dropout=0.1",
            *extra,
        ]
        return train_rm.main(load_config(overrides, "train_rm"))

    def policy(out: Path, *extra: str) -> int:
        overrides = [
            *tiny,
            f"run_dir={out}",
            f"ensemble.members=[{home / 'reward_model' / 'unbroken' / 'model'}]",
            f"pretrained_checkpoint.restore_from_path={home / 'sft' / 'unbroken' / 'model'}",
            "rl.max_steps=7",
            "rl.prompts_per_step=4",
            "rl.max_new_tokens=12",
            *extra,
        ]
        return rlhf.main(load_config(overrides, "rlhf"))

    compare("sft", train, home / "sft", [lambda: kill_between_renames(1), lambda: kill_after(5)])
    mixed = ("augmentation.mode=mix", f"augmentation.pairs_path={home / 'store.jsonl'}")
    compare(
        "reward_model",
        lambda out: reward(out, *mixed),
        home / "reward_model",
        [lambda: kill_after(1), lambda: kill_after(4), lambda: kill_while_saving(1), lambda: kill_after(7)],
    )
    # the unbroken run writes while training waits, the others in the background
    compare(
        "reward_model_async",
        lambda out: reward(out, *mixed, f"trainer.async_checkpoint={str(out.name != 'unbroken').lower()}"),
        home / "reward_model_async",
        [lambda: kill_while_writing(1, 5), lambda: kill_while_saving(1), lambda: kill_while_writing(2, 7)],
    )
    compare("rloo", policy, home / "rloo", [lambda: kill_after(2), lambda: kill_after(5)])
    ppo = ("rl.algorithm=ppo", "rl.updates_per_rollout=2", "rl.kl.coefficient=0.05")
    compare("ppo", lambda out: policy(out, *ppo), home / "ppo", [lambda: kill_after(4), lambda: kill_while_saving(2)])
    compare(
        "ppo_async",
        lambda out: policy(out, *ppo, f"trainer.async_checkpoint={str(out.name != 'unbroken').lower()}"),
        home / "ppo_async",
        [lambda: kill_while_saving(2), lambda: kill_while_writing(3, 7)],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
