"""The program ``nemo-advrm COMMAND [key=value ...]``: loads the command's configuration, calls it, reports errors."""

from __future__ import annotations

import errno
import gc
import importlib
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemo_advrm import __version__, parent_process, signals
from nemo_advrm.command_table import COMMANDS
from nemo_advrm.errors import (
    EXIT_PREEMPTED,
    EXIT_WAITING,
    FailedElsewhere,
    Preempted,
    ProcessLost,
    RewardSourceError,
    UserError,
    WaitingForPeople,
    printable,
)
from nemo_advrm.rank_info import RankInfo, worker

USAGE = "usage: nemo-advrm COMMAND [key=value ...] | COMMAND --help | --version"
EXIT_BUG, EXIT_USER_ERROR, EXIT_PROCESS_LOST, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_PIPE = 141  # as for a program ended by SIGPIPE
# seconds that ranks other than 0 wait before they report an error: if rank 0 failed too, torchrun ends them meanwhile
OTHERS_WAIT = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: success; 2: a user's error; 3: another process of the job was lost; 75: stopped by a signal, and the same command
    resumes; 76: people must fill in a sheet, and then the same command goes on; 130: interrupted. Any other exception
    is a bug: it propagates, and Python exits with 1.

    ``arguments`` default to those of the process; its signals are then ignored after the command, so that a late one
    does not change the exit status.
    """
    with signals.owned(to_the_end=arguments is None):
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            return guarded(lambda: _dispatch(words))
        finally:
            if arguments is None:
                # At exit Python looks for cycles among the half a million objects of torch and transformers, which the
                # system frees anyway: 2.5 s of CPU, of 2.9 s that a server needs to end. os._exit is the alternative,
                # but it calls no exit handlers.
                gc.freeze()


def guarded(call: Callable[[], int | None]) -> int:
    """Calls ``call``, prints a user's error as one line and returns the exit status.

    An error that occurs on all ranks is printed once, by rank 0. One that occurs on another rank only is printed by
    that rank, with its number and host. A bug propagates, after a line that names the rank.
    """
    rank_info = RankInfo.from_environment()
    try:
        status = call() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe, as in nemo-advrm stages | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except WaitingForPeople as stop:
        if rank_info.rank == 0:
            print(f"waiting for people: {printable(stop)}", file=sys.stderr)
        return EXIT_WAITING
    except UserError as error:
        if isinstance(error, RewardSourceError) and signals.received():  # the reward server got the signal too
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
            print(f"error: {error}; make room, and the same command resumes", file=sys.stderr)
            return EXIT_USER_ERROR
        if isinstance(error, OSError) and error.errno and error.filename:  # a file that cannot be used is no bug
            where = "" if rank_info.rank == 0 else f" (rank {rank_info.rank} on {rank_info.node})"
            print(f"error{where}: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
            return EXIT_USER_ERROR
        stopped = signals.received()  # read first: a launcher soon signals the other processes of a failed job
        lost = _lost_process(error)
        if lost is not None and stopped:
            return _stopped_without_saving(lost)
        if lost is not None:
            print(f"error: {lost}", file=sys.stderr)
            return EXIT_PROCESS_LOST
        if rank_info.world_size > 1:
            print(f"rank {rank_info.rank} on {rank_info.node} failed:", file=sys.stderr)
        raise


def _stopped_without_saving(reason: object) -> int:
    """Reports a step abandoned after a signal because another process or a reward server ended; returns the status."""
    resume = "the same command resumes from the newest checkpoint"
    print(f"stopped by {signals.received()}, the step under way was given up ({reason}); {resume}", file=sys.stderr)
    return EXIT_PREEMPTED


def _lost_process(error: Exception) -> str | None:
    """Returns the message for a collective that failed because another process ended; None for any other error."""
    peers = sys.modules.get("nemo_advrm.engine.peers")
    return peers.lost(error) if peers is not None else None


def run_command(name: str, words: Sequence[str]) -> int | None:
    """Loads the configuration of a command and calls its ``main``, in as many processes as are configured."""
    from nemo_advrm.logging_setup import quiet_libraries

    command = COMMANDS[name]
    cfg: Any
    if command.schema:
        from nemo_advrm.config import load_flat, schema

        cfg = load_flat(getattr(schema, command.schema), words)
    else:
        from nemo_advrm.config import load_config
        from nemo_advrm.config.overrides import within_section

        cfg = load_config(within_section(words, command.section), name)
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
    with signals.at_once(raises=not command.resumes):
        call: Callable[..., int | None] = importlib.import_module(f"nemo_advrm.commands.{name}").main
        try:
            return call(cfg)
        finally:
            locks = sys.modules.get("nemo_advrm.locks")
            if locks is not None:
                locks.release_all()


def _dispatch(words: list[str]) -> int | None:
    parent_process.end_with_parent()
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
    if name == "audit":
        settings = _fail_above(settings)
    return run_command(name, _named_runs(settings) if name == "report" else settings)


def _fail_above(words: Sequence[str]) -> list[str]:
    """Turns the option ``--fail-above X`` of ``audit`` into a setting: it is how such limits are written elsewhere."""
    option, found = "--fail-above", list(words)
    for place, word in enumerate(found):
        if word == option and place + 1 < len(found):
            found[place : place + 2] = [f"fail_above={found[place + 1]}"]
        elif word.startswith(f"{option}="):
            found[place] = f"fail_above={word.removeprefix(f'{option}=')}"
    return found


def _named_runs(words: Sequence[str]) -> list[str]:
    """Turns the run directories among the arguments of ``report`` into a setting; ``./a=b`` is a directory, too."""
    from nemo_advrm.config.overrides import quoted

    runs = [word for word in words if _is_path(word) and word[:1] not in ("-", "~", "+")]
    settings = [word for word in words if word not in runs]
    return [*settings, f"report.runs=[{','.join(map(quoted, runs))}]"] if runs else settings


def _is_path(word: str) -> bool:
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
    """Returns the help of a command: its most useful keys with their defaults, choices and help lines."""
    command = COMMANDS[name]
    rows = list(_key_rows(name))
    width = max((len(setting) for setting, _ in rows), default=0)
    lines = [f"  {setting:<{width}}  {line}".rstrip() for setting, line in rows]
    more = "" if command.schema else " (all of them: docs/configuration.md)"
    keys = ["", f"keys and their defaults{more}:", *lines] if lines else []
    usage = f"usage: nemo-advrm {name} [key=value ...]"
    return "\n".join([usage, "", f"{command.summary}.", *keys, "", f"example: {command.example}"])


def _key_rows(name: str) -> Iterator[tuple[str, str]]:
    """Yields (key=default, choices and help line) of the keys that a command's help shows."""
    from nemo_advrm.config import load_config, schema
    from nemo_advrm.config.keys import ANY_NAME, all_keys, shown
    from nemo_advrm.config.overrides import key_name

    command = COMMANDS[name]
    if command.schema:
        for key in all_keys(getattr(schema, command.schema)).values():
            yield f"{key_name(key.name)}={shown(key.default)}", key.about.line
        return
    defaults = load_config((), name)
    for wanted in dict.fromkeys(command.keys.split()):
        for key in all_keys().values():
            if key.name == wanted or (wanted.endswith(".") and key.name.startswith(wanted)):
                value = key.default if ANY_NAME in key.name else operator.attrgetter(key.name)(defaults)
                typed = key.name.removeprefix(f"{command.section}.") if command.section else key.name
                yield f"{typed.replace(ANY_NAME, 'NAME')}={shown(value)}", key.about.line


if __name__ == "__main__":
    sys.exit(main())
