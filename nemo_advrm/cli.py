"""The command ``nemo-advrm STAGE [key=value ...]``: finds the stage, loads its configuration, reports errors."""

from __future__ import annotations

import contextlib
import errno
import importlib
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_advrm import __version__, signals
from nemo_advrm.errors import (
    EXIT_PREEMPTED,
    FailedElsewhere,
    Preempted,
    ProcessLost,
    RewardSourceError,
    UserError,
    printable,
)
from nemo_advrm.rank_info import RankInfo, worker

_SINGLE_PROCESS = ("report", "doctor", "select", "stages", "plan")
# stages that stop at a signal where they can go on; the others, of which a half is worth nothing, end at once
_RESUMABLE = ("sft", "train_rm", "attack", "rlhf", "pipeline")
USAGE = "usage: nemo-advrm STAGE [key=value ...] | STAGE --help | --version"
EXIT_BUG, EXIT_USER_ERROR, EXIT_PROCESS_LOST, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_PIPE = 141  # of a program that SIGPIPE ends
# seconds that other processes wait before they report: torchrun has ended them by then if the first one failed too
OTHERS_WAIT = 2.0


@dataclass(frozen=True)
class Stage:
    """One stage: where its ``main(cfg) -> int | None`` is, and what ``--help`` says of it."""

    entry: str  # module:function, imported only when the stage runs
    summary: str
    keys: tuple[str, ...]  # the keys shown by STAGE --help: a name, or a prefix that ends with a full stop
    example: str
    settings: str = ""  # class of the schema that holds all its keys, for a stage that reads no configuration files


_COMMON = ("name", "run_dir", "seed", "trainer.devices", "trainer.num_nodes", "trainer.accelerator")
_PARALLEL = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.sequence_parallel",
    "precision.name",
)
_TRAINING = (
    "pretrained_checkpoint.restore_from_path",
    "model.optim.lr",
    "model.optim.sched.name",
    "model.optim.sched.warmup_steps",
    "model.global_batch_size",
    "model.micro_batch_size",
    "model.micro_batch_tokens",
    "model.encoder_seq_length",
    "model.tokenizer",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.gradient_clip_val",
    "trainer.checkpoint_every_n_steps",
    "trainer.async_checkpoint",
)
_READING = ("data.ignore_columns", "data.on_bad_row", "data.on_overlong")
_ROWS = ("data.train_path", "data.train_split", "data.format", "data.limit_train_rows", *_READING)
_HELD_OUT = ("data.validation_path", "data.validation_split")
_DATA = (*_ROWS, *_HELD_OUT, "data.validation_fraction")
_PROMPTS = ("data.prompts_path", "data.prompts_split")
_START = ("pretrained_checkpoint.restore_from_path", *_READING)
_RL = (
    "rl.algorithm",
    "rl.max_steps",
    "rl.prompts_per_step",
    "rl.group_size",
    "rl.max_new_tokens",
    "rl.kl.coefficient",
    "rl.kl.estimator",
    "rl.unended_penalty",
    "model.optim.lr",
)

STAGES: dict[str, Stage] = {
    "sft": Stage(
        "nemo_advrm.commands.sft:main",
        "train the policy on text",
        (*_COMMON, *_ROWS, *_TRAINING, *_PARALLEL),
        "nemo-advrm sft model=tiny data.train_path=text.jsonl",
    ),
    "train_rm": Stage(
        "nemo_advrm.commands.train_rm:main",
        "train a reward model on preference pairs",
        (*_COMMON, *_DATA, "reward_model.", *_TRAINING, "augmentation.", *_PARALLEL),
        "nemo-advrm train_rm model=tiny data.train_path=preferences.jsonl",
    ),
    "attack": Stage(
        "nemo_advrm.commands.attack:main",
        "train an adversarial policy against the first reward model of an ensemble",
        (
            *_COMMON,
            *_START,
            *_PROMPTS,
            "data.held_out_prompts_path",
            "ensemble.members",
            "sft_statistics.",
            "adversarial.",
            *_RL,
            *_PARALLEL,
        ),
        "nemo-advrm attack run_dir=runs/a 'ensemble.members=[runs/rm_1/model,runs/rm_2/model]' "
        "pretrained_checkpoint.restore_from_path=runs/sft/model data.prompts_path=prompts.jsonl",
    ),
    "select": Stage(
        "nemo_advrm.commands.select:main",
        "turn the adversarial samples of an attack into preference pairs",
        ("run_dir", "seed", "selection."),
        "nemo-advrm select run_dir=runs/a selection.max_pairs=500",
    ),
    "rlhf": Stage(
        "nemo_advrm.commands.rlhf:main",
        "train a policy on a reward: one model or an ensemble",
        (
            *_COMMON,
            *_START,
            *_PROMPTS,
            "ensemble.members",
            "ensemble.aggregate",
            "ensemble.coefficient",
            "ensemble.standardise",
            "ensemble.reference_path",
            "sft_statistics.",
            *_RL,
            "data.held_out_prompts_path",
            "rl.held_out_prompts",
            "rl.held_out_every",
            *_PARALLEL,
        ),
        "nemo-advrm rlhf 'ensemble.members=[runs/rm_1/model,runs/rm_2/model]' ensemble.aggregate=lcb rl=ppo "
        "pretrained_checkpoint.restore_from_path=runs/sft/model data.prompts_path=prompts.jsonl",
    ),
    "best_of_n": Stage(
        "nemo_advrm.commands.best_of_n:main",
        "gold and proxy of the best of n responses by a reward, against KL; trains nothing",
        (
            *_COMMON,
            *_START,
            "data.held_out_prompts_path",
            *_PROMPTS,
            "best_of_n.",
            "ensemble.members",
            "ensemble.aggregate",
            "ensemble.coefficient",
            "ensemble.standardise",
            "ensemble.reference_path",
            "rl.max_new_tokens",
            "rl.temperature",
            "pipeline.gold",
            *_PARALLEL,
        ),
        "nemo-advrm best_of_n 'ensemble.members=[runs/rm_1/model]' best_of_n.samples=64 "
        "pretrained_checkpoint.restore_from_path=runs/sft/model data.prompts_path=prompts.jsonl",
    ),
    "evaluate": Stage(
        "nemo_advrm.commands.evaluate:main",
        "measure a reward model on held-out preference pairs",
        (
            *_COMMON,
            *_START,
            *_HELD_OUT,
            "data.format",
            "ensemble.members",
            "ensemble.aggregate",
            "ensemble.coefficient",
            "ensemble.standardise",
            "ensemble.reference_path",
            "evaluate.mismatch",
        ),
        "nemo-advrm evaluate pretrained_checkpoint.restore_from_path=runs/rm_1/model "
        "data.validation_path=held_out.jsonl",
    ),
    "serve": Stage(
        "nemo_advrm.commands.serve:main",
        "serve a reward model, an ensemble or the adversarial reward over HTTP",
        (
            "run_dir",
            "ensemble.members",
            "ensemble.aggregate",
            "ensemble.coefficient",
            "ensemble.standardise",
            "serve.",
            "remote.",
            *_PARALLEL,
        ),
        "nemo-advrm serve run_dir=runs/server 'ensemble.members=[runs/rm_1/model,hf:models/rm]' serve.port=8000",
    ),
    "report": Stage(
        "nemo_advrm.commands.report:main",
        "write report/index.html of a run, or of several runs together, and print its tables",
        ("run_dir", "report."),
        "nemo-advrm report runs/seed_0 runs/seed_1 runs/seed_2",
    ),
    "pipeline": Stage(
        "nemo_advrm.commands.pipeline:main",
        "all of it: reward models, rounds of attack and retraining, RLHF, report; resumes where it stopped",
        (*_COMMON, "pipeline.", *_DATA, "ensemble.size", "adversarial.", "selection.", "augmentation.", "rl.algorithm"),
        "nemo-advrm pipeline experiment=synthetic",
    ),
    "stages": Stage(
        "nemo_advrm.commands.stages:main",
        "list the pipeline's stages, what each waits for and which are complete (for job schedulers)",
        ("run_dir", "pipeline."),
        "nemo-advrm stages experiment=synthetic run_dir=runs/synthetic",
    ),
    "convert": Stage(
        "nemo_advrm.commands.convert:main",
        "convert a checkpoint between Hugging Face, Megatron and .nemo",
        (),
        "nemo-advrm convert from=hf path=DIR to=megatron out=checkpoints/base",
        settings="ConvertConfig",
    ),
    "export_pairs": Stage(
        "nemo_advrm.commands.export_pairs:main",
        "write adversarial pairs as the jsonl that NeMo-Aligner trains reward models on",
        (),
        "nemo-advrm export_pairs pairs=runs/a/pairs.jsonl with=train.jsonl template=transcript out=augmented.jsonl",
        settings="ExportPairsConfig",
    ),
    "plan": Stage(
        "nemo_advrm.commands.plan:main",
        "say whether a stage fits its GPUs, how long a step takes, and which layout is faster; starts nothing",
        (
            "plan.",
            "trainer.devices",
            "trainer.num_nodes",
            *_PARALLEL,
            "model.virtual_pipeline_model_parallel_size",
            "model.use_distributed_optimizer",
            "model.recompute",
            "model.recompute_num_layers",
            "model.micro_batch_size",
            "model.micro_batch_tokens",
            "model.encoder_seq_length",
            "model.global_batch_size",
        ),
        "nemo-advrm plan model=nemotron4_340b parallel=nemotron4_340b_96xh100_tp8_pp12",
    ),
    "doctor": Stage(
        "nemo_advrm.commands.doctor:main",
        "print what this machine has and what each absence means",
        (),
        "nemo-advrm doctor",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit status: 0, 2 (a user's error), 3 (another process of the job was lost), 75
    (stopped by a signal, saved: the same command goes on) or 130 (interrupted).

    Any other exception is a bug: it leaves with its traceback, and Python exits with 1. Without ``arguments`` this is
    the process's command: once it has ended a signal changes its status no more.
    """
    with signals.owned(to_the_end=arguments is None):
        words = list(sys.argv[1:] if arguments is None else arguments)
        return guarded(lambda: _dispatch(words))


def guarded(call: Callable[[], int | None]) -> int:
    """Exit status of a call; a user's error is printed as one line, by other processes than the first with their place.

    An error that every process meets is so told once; one that only a later process meets is not lost. A bug leaves
    with its traceback, after a line that names the process.
    """
    here = RankInfo.from_environment()
    try:
        status = call() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on, as in nemo-advrm stages | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except UserError as error:
        if isinstance(error, RewardSourceError) and signals.received():  # its server got the signal too
            return _stopped_without_saving(error)
        if here.rank == 0:
            print(f"error: {printable(error)}", file=sys.stderr)
        elif not error.everywhere:
            time.sleep(OTHERS_WAIT)
            print(f"error (rank {here.rank} on {here.node}): {printable(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stop:
        if here.rank == 0:
            print(stop, file=sys.stderr)
        return EXIT_PREEMPTED
    except ProcessLost as error:
        if signals.received():
            return _stopped_without_saving(error)
        print(f"error: {error}", file=sys.stderr)
        return EXIT_PROCESS_LOST
    except FailedElsewhere as error:
        return EXIT_USER_ERROR if error.by_system else EXIT_BUG
    except KeyboardInterrupt:
        if here.rank == 0 and not worker():
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"error: {error}; make room, and the same command goes on", file=sys.stderr)
            return EXIT_USER_ERROR
        if isinstance(error, OSError) and error.errno and error.filename:  # what the system refuses is no bug
            where = "" if here.rank == 0 else f" (rank {here.rank} on {here.node})"
            print(f"error{where}: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
            return EXIT_USER_ERROR
        stopped = signals.received()  # asked first: a launcher soon ends what is left of a job whose process died
        told = _lost_process(error)
        if told is not None and stopped:
            return _stopped_without_saving(told)
        if told is not None:
            print(f"error: {told}", file=sys.stderr)
            return EXIT_PROCESS_LOST
        if here.world_size > 1:
            print(f"rank {here.rank} on {here.node} failed:", file=sys.stderr)
        raise


def _stopped_without_saving(reason: object) -> int:
    """The status after a signal when a step could not be ended for want of another process or of a reward server."""
    goes_on = "the same command goes on from the newest checkpoint"
    print(f"stopped by {signals.received()}, the step under way was given up ({reason}); {goes_on}", file=sys.stderr)
    return EXIT_PREEMPTED


def _lost_process(error: Exception) -> str | None:
    """What to tell when a collective failed because another process is gone; None for any other error."""
    peers = sys.modules.get("nemo_advrm.engine.peers")
    return peers.lost(error) if peers is not None else None


def run_stage(name: str, overrides: Sequence[str]) -> int | None:
    """Load the configuration of a stage and call its main, in as many processes as it asks for."""
    from nemo_advrm.logging_setup import quiet_libraries

    cfg: Any
    if STAGES[name].settings:
        from nemo_advrm.config import schema
        from nemo_advrm.config.settings import parse_settings

        cfg = parse_settings(getattr(schema, STAGES[name].settings), overrides)
    else:
        from nemo_advrm.config import load_config
        from nemo_advrm.launch import relaunch
        from nemo_advrm.pipeline import workers

        cfg = load_config(overrides, name)
        status = workers.supervise(cfg, [name, *overrides]) if name == "pipeline" else None
        if status is None and name not in _SINGLE_PROCESS:
            status = relaunch(cfg, [name, *overrides])
        if status is not None:
            return status
    quiet_libraries()
    module, _, function = STAGES[name].entry.partition(":")
    signals.leave_if_received("before anything began: nothing is lost, the same command starts over")
    with contextlib.nullcontext() if name in _RESUMABLE else signals.at_once():
        stage: Callable[..., int | None] = getattr(importlib.import_module(module), function)
        try:
            return stage(cfg)
        finally:
            held = sys.modules.get("nemo_advrm.writers")
            if held is not None:
                held.release_all()


def _dispatch(words: list[str]) -> int | None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else EXIT_USER_ERROR
    if words[0] in ("-V", "--version"):
        print(f"nemo-advrm {__version__}")
        return 0
    name, overrides = words[0], words[1:]
    if name not in STAGES:
        from nemo_advrm.config.keys import nearest

        known = ", ".join(STAGES)
        raise UserError(f"unknown stage {name}: did you mean {nearest(name, list(STAGES))}? stages: {known}")
    if any(word in ("-h", "--help") for word in overrides):
        print(_stage_help(name))
        return 0
    return run_stage(name, _named_runs(overrides) if name == "report" else overrides)


def _named_runs(words: Sequence[str]) -> list[str]:
    """The words of ``report``: those that are no settings are run directories; ``./a=b`` is one, too."""
    from nemo_advrm.config import quoted

    runs = [word for word in words if _is_place(word) and word[:1] not in ("-", "~", "+")]
    settings = [word for word in words if word not in runs]
    return [*settings, f"report.runs=[{','.join(map(quoted, runs))}]"] if runs else settings


def _is_place(word: str) -> bool:
    name, is_setting, _ = word.partition("=")
    return not is_setting or "/" in name


def _help() -> str:
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items()]
    return "\n".join(
        [
            USAGE,
            "",
            "Adversarial training of reward models (Adv-RM) on NeMo and Megatron-Core.",
            "",
            "stages:",
            *lines,
            "",
            "A setting is key=value or group=option (groups: model, parallel, precision, rl, experiment), as in",
            "  nemo-advrm pipeline experiment=synthetic seed=1",
            "  torchrun --nproc-per-node 2 -m nemo_advrm.cli train_rm model=tiny parallel=tp2 trainer.devices=2 \\",
            "      data.train_path=preferences.jsonl",
        ]
    )


def _stage_help(name: str) -> str:
    """The stage's most useful keys: the value each has when nothing is set, and the schema's own comment."""
    stage = STAGES[name]
    rows = list(_own_key_rows(stage.settings) if stage.settings else _key_rows(name, stage.keys))
    width = max((len(setting) for setting, _ in rows), default=0)
    lines = [f"  {setting:<{width}}  {comment}".rstrip() for setting, comment in rows]
    keys = ["", "keys and their defaults (all of them: nemo_advrm/config/schema.py):", *lines] if lines else []
    return "\n".join(
        [f"usage: nemo-advrm {name} [key=value ...]", "", f"{stage.summary}.", *keys, "", f"example: {stage.example}"]
    )


def _key_rows(name: str, wanted_keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key=value, comment) of the keys of the configuration that a stage shows."""
    from nemo_advrm.config import load_config
    from nemo_advrm.config.keys import ANY_NAME, all_keys

    defaults = load_config((), name)
    for wanted in dict.fromkeys(wanted_keys):
        for key in all_keys().values():
            if key.name == wanted or (wanted.endswith(".") and key.name.startswith(wanted)):
                value = key.default if ANY_NAME in key.name else operator.attrgetter(key.name)(defaults)
                yield f"{key.name.replace(ANY_NAME, 'NAME')}={_shown(value)}", key.comment


def _own_key_rows(settings: str) -> Iterator[tuple[str, str]]:
    """The same of a stage with settings of its own."""
    from nemo_advrm.config import schema
    from nemo_advrm.config.keys import keys_of
    from nemo_advrm.config.settings import key_name

    for key in keys_of(getattr(schema, settings)):
        yield f"{key_name(key.name)}={_shown(key.default)}", key.comment


def _shown(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    sys.exit(main())
