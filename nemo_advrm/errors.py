"""Errors a user can act on: each carries one clear message that names the file, line or key."""

EXIT_PREEMPTED = 75  # the command line's status for Preempted
EXIT_WAITING = 76  # the command line's status for WaitingForPeople


class UserError(Exception):
    """Base of every error caused by input or environment; the command line prints it and exits with 2."""

    # True where every process raises it by agreement: the first one's message is then enough
    everywhere = False


class ConfigError(UserError):
    """A configuration key is unknown, misspelt, missing or holds an impossible value."""


class DataError(UserError):
    """A data file or row cannot be used; the message names file and line."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not fit the model."""


class NotWritten(CheckpointError):
    """A checkpoint cannot be written: the disk has no room, its directory is not writable, or the name is taken."""


class LayoutError(UserError):
    """A parallel layout does not divide the model or the number of processes."""


class TrainingDiverged(UserError):
    """The loss or the gradient became NaN or infinite; the message names the step."""


class RewardSourceError(UserError):
    """A reward source failed or returned unusable scores; the message names the source."""


class WaitingForPeople(UserError):
    """A sheet waits for people's answers; the same command goes on when they are there (exit status 76)."""


class Preempted(BaseException):
    """A signal asked the job to stop and its state is saved: the same command resumes from there (exit status 75).

    No Exception: a library that tries one way after another must not take it for the failure of the first.
    """


class ProcessLost(Exception):
    """Another process of the job died or does not answer; the message names its rank and host (exit status 3)."""


class FailedElsewhere(Exception):
    """The first process failed and shows why; raised by the others, which stop with it and with its exit status."""

    # True where the system refused something (exit status 2), else it is a bug (exit status 1)
    by_system = False


def one_line(text: object, limit: int = 300) -> str:
    """``text``, such as a library's error message, on one line of at most ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def list_names(what: str, names: list[str], most: int = 8) -> str:
    """Return "``what`` a, b, c and 12 more", or "" without names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(names[:most])}{more}" if names else ""


def printable(text: object) -> str:
    """``text`` with control characters escaped: names chosen by others may contain line ends or terminal commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
