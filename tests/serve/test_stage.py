"""The stage ``serve`` and the stages that use its servers: parallel models, the adversarial reward, mixed ensembles."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import Served, ServerProcess
from reward_members import one_step_of_rl, rollouts, save_hf_reward
from tiny import TOKENIZER, tiny_config

from nemo_advrm import cli
from nemo_advrm.commands import serve
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import AdversarialConfig
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.locks import release_all
from nemo_advrm.objectives.sft_statistics import fit_members
from nemo_advrm.rank_info import host_name
from nemo_advrm.rewards.ensemble import AdversarialReward, UncertaintyReward
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.run_directory import run_dir
from nemo_advrm.serve.samples import Preparer, Sample
from nemo_advrm.serve.scorer import Scorer

pytestmark = pytest.mark.long


def _fails(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    assert cli.main(["serve", "trainer.accelerator=cpu", *settings]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_what_cannot_be_served_is_refused(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMO_ADVRM_TOKEN", raising=False)
    member, run = f"ensemble.members=[{checkpoints[0]}]", f"run_dir={tmp_path / 'run'}"
    assert "at least one reward model" in _fails(capsys, run)
    assert "bearer token" in _fails(capsys, run, member, "serve.host=0.0.0.0")
    assert "the token file" in _fails(capsys, run, member, f"serve.token_file={tmp_path / 'none'}")
    assert "serve.reference_path" in _fails(capsys, run, member, "serve.reward=adversarial")
    assert "needs serve.reference_path" in _fails(capsys, run, member, "detector.monitors=[laplace]")
    assert "no such checkpoint" in _fails(capsys, run, "ensemble.members=[nowhere/model]")
    monkeypatch.setattr(run_dir, "start", lambda cfg, megatron: SimpleNamespace(world_size=4, dp_size=2))
    assert re.search("4 makes 2 replicas.*tensor.*pipeline.*context_parallel_size", _fails(capsys, run, member))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["serve.triton_port=5555", "serve.triton_python=/opt/aligner/bin/python"])
def test_removed_keys_name_what_replaces_them(capsys: pytest.CaptureFixture[str], setting: str) -> None:
    key = setting.partition("=")[0]
    assert _fails(capsys, setting) == f"error: {key} was removed: NeMo-Aligner's clients connect to serve.port"


def test_an_address_that_is_taken_is_refused(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    port = httpx.URL(served.server.address).port
    assert "in use" in _fails(capsys, f"ensemble.members=[{served.members[0]}]", f"serve.port={port}")


def test_a_second_server_in_one_run_directory_is_refused_by_name(
    served: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = served.server.log.parent
    told = _fails(capsys, f"run_dir={directory}", f"ensemble.members=[{served.members[0]}]", "serve.port=0")
    named = f"{directory / 'server.json'} is being written by process {served.server.pid} on {host_name()} "
    assert named in told and told.endswith("stop it, or choose another run_dir")
    assert json.loads((directory / "server.json").read_text())["address"] == served.server.address
    assert served.client.get("/v2/health/ready").status_code == 200
    (tmp_path / "server.json").write_text('{"address": "http://127.0.0.1:1"}')  # of a server that was killed
    serve._hold_announcement(tmp_path)
    release_all()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "server.json").mkdir()
    assert "server.json" in _fails(
        capsys, f"run_dir={tmp_path}", f"ensemble.members=[{served.members[0]}]", "serve.port=0"
    )


def test_a_directory_that_cannot_be_written_ends_the_server(
    tmp_path: Path, checkpoints: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMO_ADVRM_TOKEN", raising=False)
    (tmp_path / "file").touch()
    run = ["serve", f"run_dir={tmp_path / 'file' / 'run'}", f"ensemble.members=[{checkpoints[0]}]", "serve.port=0"]
    assert cli.main([*run, "trainer.accelerator=cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: run_dir={tmp_path}/file/run/server.json cannot be ") and "\n" not in error
    assert f"{tmp_path}/file/run Not a directory" in error and error.endswith("or choose another run_dir")


def test_models_on_two_processes_give_the_same_scores_and_stop_without_a_hang(served: Served, tmp_path: Path) -> None:
    members = f"ensemble.members=[{','.join(map(str, served.members))}]"
    # so short a limit of waits that an idle server lives by its orders to wait on
    short = "trainer.timeout_minutes=0.4"  # 24 s, which the start of both processes must fit in too
    samples = [{"text": text} for text in served.texts()]
    with contextlib.ExitStack() as running:
        servers = []
        for layout in ("tp2", "pp2"):
            directory = tmp_path / layout
            servers.append(ServerProcess(directory, members, f"parallel={layout}", "trainer.devices=2", short))
            running.callback(servers[-1].kill)
        for pause in (0.0, 26.0):
            time.sleep(pause)
            for server in servers:
                answer = httpx.post(f"{server.address}/v1/score", json={"samples": samples}, timeout=30)
                assert answer.status_code == 200, server.log.read_text()[-2000:]
                assert answer.json()["scores"] == pytest.approx(served.expected, abs=1e-4)
        for server in servers:
            server.terminate()
            assert "Traceback" not in server.log.read_text()


def _write_reference(path: Path, members: list[Path]) -> SFTScores:
    """Two prompts with two responses each, scored by the members."""
    data = rollouts()
    scores = [m.score(data) for m in load_members(tiny_config(), [str(p) for p in members], TOKENIZER)]
    rows = [
        {
            "prompt_id": data.prompt_index[i],
            "messages": list(data.prompts[i]),
            "response": data.responses[i],
            "ended": data.ended[i],
            "scores": [float(s[i]) for s in scores],
        }
        for i in range(4)
    ]
    write_jsonl_atomic(path, rows)
    return SFTScores.read(path)


def test_the_adversarial_reward_is_served_to_prompts_of_its_reference(checkpoints: list[Path], tmp_path: Path) -> None:
    reference = _write_reference(tmp_path / "reference.jsonl", checkpoints)
    members = f"ensemble.members=[{','.join(map(str, checkpoints))}]"
    adversarial = ["serve.reward=adversarial", f"serve.reference_path={tmp_path / 'reference.jsonl'}"]
    server = ServerProcess(tmp_path / "server", members, *adversarial)
    try:
        own = load_members(tiny_config(), [str(p) for p in checkpoints], TOKENIZER)
        data = rollouts()
        expected = AdversarialReward(own, AdversarialConfig(), reference).compute_rewards(data).rewards_N.tolist()
        tokens = [p + r for p, r in zip(data.prompt_tokens, data.response_tokens, strict=True)]
        for samples in (
            [{"tokens": row} for row in tokens],  # the prompt is found as the beginning of the row
            [
                {"messages": list(p), "response": r, "ended": e}
                for p, r, e in zip(data.prompts, data.responses, data.ended, strict=True)
            ],
        ):
            answer = httpx.post(f"{server.address}/v1/score", json={"samples": samples}, timeout=30)
            assert answer.json()["scores"] == pytest.approx(expected, abs=1e-4)
        foreign = {"messages": [{"role": "user", "content": "this garden"}], "response": "birds sing ."}
        answer = httpx.post(f"{server.address}/v1/score", json={"samples": [foreign]})
        assert answer.status_code == 422 and "not one of the reference" in answer.json()["error"]
        assert server.terminate() == 0
    finally:
        server.kill()


def test_an_ensemble_is_served_on_one_scale_where_a_reference_is_given(
    single: Runtime, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = _write_reference(tmp_path / "reference.jsonl", checkpoints)
    own = load_members(tiny_config(), [str(p) for p in checkpoints], TOKENIZER)
    members = f"ensemble.members=[{','.join(map(str, checkpoints))}]"
    paths = [f"{key}={tmp_path / 'reference.jsonl'}" for key in ("serve.reference_path", "ensemble.reference_path")]
    standardised = UncertaintyReward(own, statistics=fit_members(reference.scores_PNK.flatten(0, 1)))
    raw = UncertaintyReward(own)
    for settings, expected, warned in (
        ([paths[0]], standardised, False),
        ([paths[1]], standardised, False),
        ([], raw, True),
        ([paths[0], "ensemble.standardise=false"], raw, False),
    ):
        cfg = load_config([members, *settings, f"run_dir={tmp_path / 'run'}"])
        reward = serve._reward(cfg, own, None, serve._reference_path(cfg))
        out = capsys.readouterr().out
        wanted_N = expected.compute_rewards(rollouts()).rewards_N
        assert reward.compute_rewards(rollouts()).rewards_N.tolist() == wanted_N.tolist(), out
        assert ("raw scores are combined" in out) == warned
        assert ("standardised scores" in out) == (expected is standardised)
        # with a reference, what costs nothing watches
        watching = {"ensemble_disagreement"} if expected is standardised else set()
        prepared = Preparer(own).prepare([Sample("text", response="this river <sep> birds sing . <eos>")])
        (score,) = Scorer(reward, TOKENIZER.fingerprint).score(prepared)
        assert set(score.detectors) == watching and ("monitor: " in out) == bool(watching)
    cfg = load_config([members, paths[0], "serve.reward=adversarial"])
    assert isinstance(serve._reward(cfg, own, reference, ""), AdversarialReward)
    with pytest.raises(ConfigError, match="its scores of member 1 are not those of R_2"):
        serve._reward(cfg, own[::-1], reference, "")


def test_an_attack_on_a_mixed_ensemble(served: Served, single: Runtime, tmp_path: Path) -> None:
    hf = save_hf_reward(tmp_path / "hf")
    members = [f"hf:{hf}", str(served.members[0]), served.server.address, str(served.members[1])]
    run = tmp_path / "run"
    settings = one_step_of_rl(tmp_path, members)
    status = cli.main(["attack", f"run_dir={run}", *settings, "adversarial.target_members=[1,3]"])
    assert status == 0
    rows = [row for _, row in read_jsonl(run / "reference.jsonl")] + [
        row for _, row in read_jsonl(run / "attack" / "samples.jsonl")
    ]
    assert len(rows) >= 6 + 2 * 2 and all(len(row["scores"]) == 4 for row in rows)
    for row in rows:  # the server's reward is the mean of the two checkpoints that are members themselves
        _, first, remote, second = row["scores"]
        assert remote == pytest.approx((first + second) / 2, abs=1e-4)
    assert len({row["scores"][0] for row in rows}) > 3


def test_evaluate_takes_members_of_any_kind(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    texts = (("this river", "birds sing .", "birds rest ."), ("these clouds", "this river sleeps .", "birds dance ."))
    pairs.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in texts))
    member, data = str(served.members[0]), f"data.validation_path={pairs}"
    elsewhere = f"run_dir={tmp_path / 'evaluation'}"
    hf = f"hf:{save_hf_reward(tmp_path / 'hf')}"
    assert cli.main(["evaluate", f"ensemble.members=[{member},{hf},{served.server.address}]", data, elsewhere]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  margin " in line]
    assert [line.split(":")[0] for line in lines] == [f"R_1 ({member})", "R_2 (hf", "R_3 (http"]
    assert cli.main(["evaluate", f"pretrained_checkpoint.restore_from_path={member}", data, elsewhere]) == 0
    (alone,) = [line for line in capsys.readouterr().out.splitlines() if "  margin " in line]
    assert lines[0].endswith(alone)
