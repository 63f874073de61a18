"""Parses, checks and opens judges: ``openai:URL#MODEL`` and ``human:FILE.csv``."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_judge
from nemo_advrm.errors import ConfigError
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.checkpoint_members import SourceSpec

OPENAI, HUMAN = "openai", "human"
KINDS = (OPENAI, HUMAN)


def parse_judge(kind: str, location: str, text: str, place: str) -> SourceSpec:
    """Parses what follows ``openai:`` or ``human:``. Raises ConfigError that names ``place``, and shows no key."""
    if kind == HUMAN:
        for path in location.split("|") if location else ():  # empty: a file of the run directory
            if not path.endswith(".csv"):
                raise ConfigError(f"{place}={text}: names sheets, human:FILE.csv or one for each person, A.csv|B.csv")
        return SourceSpec(kind, location, text, place)
    address, _, model = location.partition("#")
    try:
        url = urlsplit(address)
        fault = url.scheme not in ("http", "https") or not url.hostname or url.port == 0
    except ValueError:  # the port is no number, or too large
        fault = True
    # a fault may come from the characters of a password, such as # or a colon
    if "@" in address or "?" in address or (fault and "@" in location):
        raise ConfigError(
            f"{place}: the address of openai:URL#MODEL holds a user or a query, which would be written to files; a key "
            "belongs into the environment variable that judge.key_variable names"
        )
    if fault or not model:
        raise ConfigError(f"{place}={text}: must be openai:URL#MODEL, as in openai:http://127.0.0.1:8000/v1#MODEL")
    return SourceSpec(kind, location, text, place)


def check_judge_source(spec: SourceSpec, cfg: Config) -> None:
    """Raises ConfigError before work starts; neither an endpoint nor people are asked."""
    from nemo_advrm.rewards.judges.questions import read_rubric

    check_judge(cfg.judge)
    read_rubric(cfg.judge.rubric)
    if spec.kind == OPENAI:
        require_extra("serve", "httpx", "tenacity")
        from nemo_advrm.rewards.judges.chat import key_of

        key_of(cfg.judge)


def open_judge(spec: SourceSpec, name: str, cfg: Config) -> RewardSource:
    """Opens a judge; all ranks call, and the first one of each replica waits for an endpoint to answer.

    Raises ConfigError, and RewardSourceError for an endpoint that does not answer.
    """
    check_judge_source(spec, cfg)
    home = Path(cfg.run_dir) / "judge"
    if spec.kind == HUMAN:
        from nemo_advrm.rewards.judges.people import PeopleReward

        paths = [Path(path) for path in spec.location.split("|")] if spec.location else [home / "people.csv"]
        return PeopleReward(name, paths, cfg.judge)
    import torch

    from nemo_advrm.rewards.judges.chat import ChatJudge
    from nemo_advrm.rewards.judges.scalar import JudgeReward
    from nemo_advrm.rewards.replica import once_per_replica

    judge = ChatJudge(name, spec.location, cfg.judge, home, cfg.trainer.timeout_minutes)

    def connected() -> torch.Tensor:
        judge.connect()
        return torch.zeros(0)

    once_per_replica(name, connected)
    return JudgeReward(name, judge)
