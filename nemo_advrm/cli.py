"""The program ``nemo-advrm COMMAND [key=value ...]``: loads the command's configuration, calls it, reports errors."""

from __future__ import annotations

import contextlib
import errno
import importlib
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemo_advrm import __version__, signals
from nemo_advrm.command_table import COMMANDS
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

USAGE = "usage: nemo-advrm COMMAND [key=value ...] | COMMAND --help | --version"
EXIT_BUG, EXIT_USER_ERROR, EXIT_PROCESS_LOST, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_PIPE = 141  # of a program that SIGPIPE ends
# seconds that other processes wait before they report: torchrun has ended them by then if the first one failed too
OTHERS_WAIT = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 (a user's error), 3 (another process of the job was lost), 75
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
    rank_info = RankInfo.from_environment()
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
        if rank_info.rank == 0:
            print(f"error: {printable(error)}", file=sys.stderr)
        elif not error.everywhere:
            time.sleep(OTHERS_WAIT)
            print(f"error (rank {rank_info.rank} on {rank_info.node}): {printable(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stop:
        if rank_info.rank == 0:
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
        if rank_info.rank == 0 and not worker():
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"error: {error}; make room, and the same command goes on", file=sys.stderr)
            return EXIT_USER_ERROR
        if isinstance(error, OSError) and error.errno and error.filename:  # what the system refuses is no bug
            where = "" if rank_info.rank == 0 else f" (rank {rank_info.rank} on {rank_info.node})"
            print(f"error{where}: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
            return EXIT_USER_ERROR
        stopped = signals.received()  # asked first: a launcher soon ends what is left of a job whose process died
        told = _lost_process(error)
        if told is not None and stopped:
            return _stopped_without_saving(told)
        if told is not None:
            print(f"error: {told}", file=sys.stderr)
            return EXIT_PROCESS_LOST
        if rank_info.world_size > 1:
            print(f"rank {rank_info.rank} on {rank_info.node} failed:", file=sys.stderr)
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


def run_command(name: str, words: Sequence[str]) -> int | None:
    """Load the configuration of a command and call its ``main``, in as many processes as it asks for."""
    from nemo_advrm.logging_setup import quiet_libraries

    command = COMMANDS[name]
    cfg: Any
    if command.schema:
        from nemo_advrm.config import load_flat, schema

        cfg = load_flat(getattr(schema, command.schema), words)
    else:
        from nemo_advrm.config import load_config

        cfg = load_config(words, name)
        status = None
        if name == "pipeline":
            from nemo_advrm.pipeline import workers

            status = workers.supervise(cfg, [name, *words])
        if status is None and command.processes:
            from nemo_advrm.launch import relaunch

            status = relaunch(cfg, [name, *words])
        if status is not None:
            return status
    quiet_libraries()
    signals.leave_if_received("before anything began: nothing is lost, the same command starts over")
    with contextlib.nullcontext() if command.resumes else signals.at_once():
        call: Callable[..., int | None] = importlib.import_module(f"nemo_advrm.commands.{name}").main
        try:
            return call(cfg)
        finally:
            locks = sys.modules.get("nemo_advrm.locks")
            if locks is not None:
                locks.release_all()


def _dispatch(words: list[str]) -> int | None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else EXIT_USER_ERROR
    if words[0] in ("-V", "--version"):
        print(f"nemo-advrm {__version__}")
        return 0
    name, settings = words[0], words[1:]
    if name not in COMMANDS:
        from nemo_advrm.nearest_name import nearest_name

        known = ", ".join(COMMANDS)
        raise UserError(f"unknown command {name}: did you mean {nearest_name(name, list(COMMANDS))}? commands: {known}")
    if any(word in ("-h", "--help") for word in settings):
        print(_command_help(name))
        return 0
    return run_command(name, _named_runs(settings) if name == "report" else settings)


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
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            USAGE,
            "",
            "Adversarial training of reward models (Adv-RM) on NeMo and Megatron-Core.",
            "",
            "commands:",
            *lines,
            "",
            "A setting is key=value or group=option (groups: model, parallel, precision, rl, experiment), as in",
            "  nemo-advrm pipeline experiment=synthetic seed=1",
            "  torchrun --nproc-per-node 2 -m nemo_advrm.cli train_rm model=tiny parallel=tp2 trainer.devices=2 \\",
            "      data.train_path=preferences.jsonl",
        ]
    )


def _command_help(name: str) -> str:
    """The command's most useful keys: the value each has when nothing is set, its choices and its help line."""
    command = COMMANDS[name]
    rows = list(_key_rows(name))
    width = max((len(setting) for setting, _ in rows), default=0)
    lines = [f"  {setting:<{width}}  {line}".rstrip() for setting, line in rows]
    more = "" if command.schema else " (all of them: docs/configuration.md)"
    keys = ["", f"keys and their defaults{more}:", *lines] if lines else []
    usage = f"usage: nemo-advrm {name} [key=value ...]"
    return "\n".join([usage, "", f"{command.summary}.", *keys, "", f"example: {command.example}"])


def _key_rows(name: str) -> Iterator[tuple[str, str]]:
    """(key=value, choices and help line) of the keys that a command shows."""
    from nemo_advrm.config import key_name, load_config, schema
    from nemo_advrm.config.keys import ANY_NAME, all_keys

    command = COMMANDS[name]
    if command.schema:
        for key in all_keys(getattr(schema, command.schema)).values():
            yield f"{key_name(key.name)}={_shown(key.default)}", key.about.line
        return
    defaults = load_config((), name)
    for wanted in dict.fromkeys(command.keys):
        for key in all_keys().values():
            if key.name == wanted or (wanted.endswith(".") and key.name.startswith(wanted)):
                value = key.default if ANY_NAME in key.name else operator.attrgetter(key.name)(defaults)
                yield f"{key.name.replace(ANY_NAME, 'NAME')}={_shown(value)}", key.about.line


def _shown(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    sys.exit(main())
