"""Parses, checks and opens judges: ``openai:URL#MODEL`` and ``human:FILE.csv``."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_judge
from nemo_advrm.endpoints import endpoint_key, parse_endpoint
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
    parse_endpoint(location, text, place, "judge.key_variable")
    return SourceSpec(kind, location, text, place)


def check_judge_source(spec: SourceSpec, cfg: Config) -> None:
    """Raises ConfigError before work starts; neither an endpoint nor people are asked."""
    from nemo_advrm.rewards.judges.questions import read_rubric

    check_judge(cfg.judge)
    read_rubric(cfg.judge.rubric)
    if spec.kind == OPENAI:
        require_extra("serve", "httpx", "tenacity")
        endpoint_key(cfg.judge.key_variable)


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
    from nemo_advrm.engine.replica import once_per_replica
    from nemo_advrm.rewards.judges.chat import ChatJudge
    from nemo_advrm.rewards.judges.scalar import JudgeReward

    judge = ChatJudge(name, spec.location, cfg.judge, home, cfg.trainer.timeout_minutes)

    def connected() -> bool:
        judge.connect()
        return True

    once_per_replica(name, connected)
    return JudgeReward(name, judge)
