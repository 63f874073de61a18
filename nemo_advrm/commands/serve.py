"""The command ``serve``: a reward model, an ensemble or the adversarial reward as a server for any RLHF framework."""

from __future__ import annotations

import signal
import socket
from dataclasses import replace
from pathlib import Path

from nemo_advrm import locks, signals
from nemo_advrm.config.schema import Config
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.ensemble import AdversarialReward, PolicyReward
from nemo_advrm.rewards.monitor import build_monitor
from nemo_advrm.rewards.monitor import check_members as check_watched
from nemo_advrm.rewards.standardisation import check_members, combined, member_statistics, read_responses
from nemo_advrm.rewards.watch_list import AUTO, monitors_of
from nemo_advrm.run_directory import run_dir

RAW_SCORES = (
    "warning: the members' raw scores are combined, whose offsets and scales are arbitrary: the member with the "
    "largest scale decides. Set serve.reference_path to the reference.jsonl of an attack on these members, or "
    "ensemble.standardise=false when they are on one scale"
)


def main(cfg: Config) -> int:
    """Serve the reward of ``ensemble.members`` until TERM. Rank 0 runs the HTTP server, the others score with it."""
    require_extra("serve", "fastapi", "uvicorn", "httpx", "tenacity", "prometheus_client")
    if not cfg.ensemble.members:
        raise ConfigError("ensemble.members must name at least one reward model")
    sources.refuse_people(cfg, "serve")
    sft_responses = _sft_responses(cfg)
    path = _reference_path(cfg)
    if path:
        check_watched(cfg, _detectors(cfg))
    cfg = sources.for_scoring(cfg, cfg.ensemble.members)
    rt = run_dir.start(cfg, megatron=False)
    if rt.dp_size > 1:
        raise ConfigError(
            f"trainer.devices={rt.world_size} makes {rt.dp_size} replicas of the model, a server has one: set "
            "model.tensor_model_parallel_size, model.pipeline_model_parallel_size or model.context_parallel_size, or "
            "start more servers"
        )
    listening: list[tuple[socket.socket, str]] = []
    run_on_rank_zero(lambda: listening.append(_listen(cfg)))  # before loading: a wrong address fails at once
    members = sources.load_members(cfg, cfg.ensemble.members, build_tokenizer(cfg.model.tokenizer))
    reward = _reward(cfg, members, sft_responses, path)
    if rt.is_writer:
        with signals.at_once(raises=False):  # from here on a signal lets the running requests finish
            return _serve(cfg, members, reward, sft_responses, *listening[0])
    # the launcher sends TERM to every process: rank 0 ends the others when its requests are done
    for number in (*signals.SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    from nemo_advrm.serve.scorer import score_with_rank_zero

    score_with_rank_zero(reward)
    return 0


def _listen(cfg: Config) -> tuple[socket.socket, str]:
    from nemo_advrm.http_client import bearer_token
    from nemo_advrm.serve.server import bind

    token = bearer_token(cfg.serve.token_file)
    sock = bind(cfg.serve, token)
    try:
        _hold_announcement(Path(cfg.run_dir))
    except BaseException:
        sock.close()
        raise
    return sock, token


def _hold_announcement(directory: Path) -> None:
    """Become the only server of the run directory; raises ConfigError that names another one."""
    announced = directory / "server.json"
    locks.acquire(directory, "server", announced)
    try:
        announced.unlink(missing_ok=True)  # left by a killed server
    except OSError as error:
        raise locks.cannot_write(directory, error) from error


def _serve(
    cfg: Config,
    members: list[RewardSource],
    reward: PolicyReward,
    sft_responses: SFTScores | None,
    sock: socket.socket,
    token: str,
) -> int:
    from nemo_advrm.serve import server
    from nemo_advrm.serve.batcher import Batcher
    from nemo_advrm.serve.metrics import Metrics
    from nemo_advrm.serve.samples import Preparer
    from nemo_advrm.serve.scorer import Scorer
    from nemo_advrm.serve.service import ScoringService

    options, metrics = cfg.serve, Metrics()
    preparer = Preparer(members, options.max_sample_tokens, sft_responses)
    batcher = Batcher(
        Scorer(reward, preparer.fingerprint),
        metrics,
        options.batch_tokens,
        options.batch_wait_ms / 1000,
        options.queue_tokens,
        options.timeout_seconds,
        idle_seconds=min(60.0, 15 * cfg.trainer.timeout_minutes),
    )
    if options.reward == "ensemble":
        named = cfg.ensemble.aggregate + (" of standardised scores" if _is_standardised(cfg) else "")
    else:
        named = f"adversarial ({cfg.adversarial.preset})"
    service = ScoringService(options, preparer, batcher, [member.name for member in members], named)
    server.run(service, metrics, token, sock, Path(cfg.run_dir))
    return 0


def _sft_responses(cfg: Config) -> SFTScores | None:
    """Reads the SFT responses that the adversarial reward is relative to; None for the reward of an ensemble."""
    if cfg.serve.reward == "ensemble":
        return None
    path = cfg.serve.reference_path or cfg.ensemble.reference_path
    if not path:
        raise ConfigError("serve.reward=adversarial needs serve.reference_path: the reference.jsonl of an attack")
    sft_responses = SFTScores.read(Path(path))
    if sft_responses.scores_PNK.size(-1) != len(cfg.ensemble.members):
        raise ConfigError(
            f"serve.reference_path={path} has scores of {sft_responses.scores_PNK.size(-1)} members, "
            f"ensemble.members names {len(cfg.ensemble.members)}"
        )
    return sft_responses


def _detectors(cfg: Config) -> list[str]:
    """Returns the detectors that watch the reward of an ensemble; ``auto`` watches only where there is a reference."""
    if not (cfg.serve.reference_path or cfg.ensemble.reference_path):
        cfg = replace(cfg, detector=replace(cfg.detector, monitors=[m for m in cfg.detector.monitors if m != AUTO]))
    return monitors_of(cfg, len(cfg.ensemble.members))


def _reference_path(cfg: Config) -> str:
    """Returns the file of SFT responses that standardise members and to which detectors are fitted; empty: neither.

    Raises ConfigError for detectors that are asked for without a file, or beside the adversarial reward.
    """
    path = cfg.serve.reference_path or cfg.ensemble.reference_path
    named = [name for name in cfg.detector.monitors if name != AUTO]
    if cfg.serve.reward != "ensemble":
        if named:
            raise ConfigError(f"detector.monitors={named}: serve.reward={cfg.serve.reward} has no monitors")
        return ""
    if named and not path:
        raise ConfigError(
            f"detector.monitors={named}: needs serve.reference_path, the reference.jsonl of an attack or an rlhf on "
            "these members, to whose SFT responses detectors are fitted"
        )
    return path if _is_standardised(cfg) or _detectors(cfg) else ""


def _is_standardised(cfg: Config) -> bool:
    several = len(cfg.ensemble.members) > 1 and cfg.ensemble.standardise
    return cfg.serve.reward == "ensemble" and several and bool(cfg.serve.reference_path or cfg.ensemble.reference_path)


def _reward(cfg: Config, members: list[RewardSource], sft_responses: SFTScores | None, path: str) -> PolicyReward:
    if sft_responses is not None:
        given = cfg.serve.reference_path or cfg.ensemble.reference_path
        check_members(sft_responses, members, f"serve.reference_path={given}")
        target_index = cfg.adversarial.target_members[0] - 1
        return AdversarialReward(members, cfg.adversarial, sft_responses, target_index, detect=False)
    if len(members) > 1 and cfg.ensemble.standardise and not path:
        run_on_rank_zero(lambda: print(RAW_SCORES, flush=True))
    statistics = monitor = None
    if path:
        detectors = _detectors(cfg)
        read = read_responses(Path(path), members, "serve.reference_path", detectors)
        statistics = member_statistics(read) if _is_standardised(cfg) else None
        # a penalty is for training: what is served is what the reward models say, and the detectors beside it
        unpenalised = replace(cfg, rl=replace(cfg.rl, detector_penalty=0.0))
        monitor = build_monitor(unpenalised, members, read, detectors)
    aggregate, coefficient = cfg.ensemble.aggregate, cfg.ensemble.coefficient
    return combined(members, aggregate, coefficient, statistics, Path(cfg.run_dir), monitor=monitor)
