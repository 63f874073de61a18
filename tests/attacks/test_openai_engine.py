"""A policy behind an OpenAI-compatible endpoint: what is asked, what its answers become, and an attack from it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from fake_policy import FakePolicy, completion
from json_server import Answer
from reward_members import one_step_of_rl

from nemo_advrm import cli
from nemo_advrm.audit import settings as settings_of_audit
from nemo_advrm.config.schema import AuditConfig, Config
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError, DataError, RewardSourceError
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.rollouts import openai_engine
from nemo_advrm.rollouts.openai_engine import OpenAIEngine, ServedLanguageModel, served_model
from nemo_advrm.training.callbacks.served_policy import ServedPolicyWatch

TOKENIZER = ByteTokenizer()
Serve = Callable[..., FakePolicy]


def _words(body: dict) -> str:
    return "e" * (body["seed"] % 7) + " words of an answer"


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[FakePolicy] = []

    def start(answer: Callable[[dict], Answer], *listed: Answer) -> FakePolicy:
        servers.append(FakePolicy(answer, *listed))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _beside_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # answers are kept in run_dir


def _config(**limits: float) -> Config:
    cfg = Config()
    for name, value in {"timeout_seconds": 0.5, "deadline_seconds": 0.6, "connect_seconds": 0.5, **limits}.items():
        setattr(cfg.policy_server, name, value)
    return cfg


def _opened(endpoint: FakePolicy) -> ServedLanguageModel:
    return OpenAIEngine(_config(), TOKENIZER).open_policy(endpoint.policy)


def test_prompts_go_as_tokens_with_a_seed_of_ours_and_answers_become_tokens(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_ADVRM_POLICY_KEY", "key-1")
    monkeypatch.setenv("OPENAI_API_KEY", "of another program")

    def answer(body: dict) -> Answer:
        first = body["prompt"][0]
        return completion(f"answer {first}", "length" if first == 12 else "stop")

    endpoint = serve(answer)
    uniforms_NT = torch.tensor([[0.25, 0.1], [0.5, 0.1], [0.75, 0.1]])
    found = _opened(endpoint).generate(
        [[11, 20], [12], [13]], Sampling(16, (TOKENIZER.eos_id,), 0.7, 0, 0.9), uniforms_NT
    )
    plain = [TOKENIZER.encode(f"answer {first}") for first in (11, 12, 13)]
    assert found.responses == [[*plain[0], TOKENIZER.eos_id], plain[1], [*plain[2], TOKENIZER.eos_id]]
    assert found.ended == [True, False, True]
    by_prompt = sorted(endpoint.bodies, key=lambda body: body["prompt"])
    assert by_prompt[0] == {
        "model": "some/model",
        "prompt": [11, 20],
        "max_tokens": 16,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 2**29,
    }, "log-probabilities are not asked for where they would be those of another temperature"
    assert [body["seed"] for body in by_prompt] == [2**29, 2**30, 2**29 * 3]
    assert set(endpoint.keys) == {"Bearer key-1"}


def test_a_turn_begins_no_request_after_its_end_and_the_next_goes_on(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = 400, {}, b"maximum context length is 4096"
    endpoint = serve(lambda body: too_long if body["prompt"] == [1] else completion(f"{body['prompt'][0]}"))
    cfg = _config(connections=1)
    model = OpenAIEngine(cfg, TOKENIZER).open_policy(endpoint.policy)
    monkeypatch.setattr(openai_engine, "turn_seconds", lambda *_: 2.5)
    ticks, turns = itertools.count(), []
    model.clock = lambda: float(next(ticks))  # type: ignore[assignment]
    generated = model._generated
    model._generated = lambda *args: (turns.append(len(endpoint.bodies)), generated(*args))[1]  # type: ignore
    found = model.generate([[n] for n in range(5)], Sampling(8, (TOKENIZER.eos_id,)), torch.zeros(5, 8))
    assert turns == [0, 2, 4]
    assert found.responses == [[*TOKENIZER.encode(f"{n}"), TOKENIZER.eos_id] if n != 1 else [] for n in range(5)]
    assert len(endpoint.bodies) == 5


def test_what_was_answered_is_kept_when_a_request_fails_for_good_and_no_other_is_begun(serve: Serve) -> None:
    broken = True

    def answer(body: dict) -> Answer:
        return (400, {}, b"no such thing") if broken and body["prompt"][0] == 3 else completion(f"{body['prompt'][0]}")

    endpoint = serve(answer)

    def generated() -> Generation:
        model = OpenAIEngine(_config(connections=1), TOKENIZER).open_policy(endpoint.policy)
        return model.generate([[n] for n in range(8)], Sampling(8, (TOKENIZER.eos_id,)), torch.zeros(8, 8))

    with pytest.raises(RewardSourceError, match=r"no such thing.*3 of 8 answers are kept in .*jsonl: the same command"):
        generated()
    assert [body["prompt"][0] for body in endpoint.bodies] == [0, 1, 2, 3]
    broken = False
    found = generated()
    assert found.responses == [[*TOKENIZER.encode(f"{n}"), TOKENIZER.eos_id] for n in range(8)]
    assert [body["prompt"][0] for body in endpoint.bodies] == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert generated() == found and len(endpoint.bodies) == 9


def test_a_request_that_is_refused_for_what_it_asks_is_an_empty_answer(serve: Serve) -> None:
    def answer(body: dict) -> Answer:
        faults = {1: b"maximum context length is 4096", 2: b'{"error": {"code": "content_filter"}}'}
        content = faults.get(body["prompt"][0])
        return completion("fine") if content is None else (400, {}, content)

    endpoint = serve(answer)
    for asked in (3, 3 + 2):  # another setting of the server may lift a refusal, so that none is kept
        found = _opened(endpoint).generate([[0], [1], [2]], Sampling(8, (TOKENIZER.eos_id,)), torch.zeros(3, 8))
        assert found.responses == [[*TOKENIZER.encode("fine"), TOKENIZER.eos_id], [], []]
        assert found.ended == [True, False, False] and len(endpoint.bodies) == asked


def test_an_endpoint_that_refuses_every_answer_ends_the_run_and_names_the_setting(serve: Serve) -> None:
    faults = [b"maximum context length is 4096"]
    model = _opened(serve(lambda _: (400, {}, faults[0])))

    def generated(prompts: int) -> Generation:
        return model.generate([[n] for n in range(prompts)], Sampling(8, (TOKENIZER.eos_id,)), torch.zeros(prompts, 8))

    with pytest.raises(RewardSourceError, match=r"refused every one of 2 answers.* too long.*rl\.max_new_tokens"):
        generated(2)
    faults[0] = b'{"error": {"code": "content_filter"}}'
    with pytest.raises(RewardSourceError, match="refused every one of 5 answers, by its filter"):
        generated(5)
    assert generated(4).responses == [[]] * 4, "a few prompts may be refused by chance"


def test_log_probabilities_are_asked_for_and_told(serve: Serve) -> None:
    told = {"logprobs": {"tokens": ["h", "i"], "token_logprobs": [-1.5, -0.5]}}
    endpoint = serve(lambda _: completion("hi", **told))
    found = _opened(endpoint).generate([[11]], Sampling(4, (TOKENIZER.eos_id,)), torch.zeros(1, 4))
    assert endpoint.bodies[0]["logprobs"] == 1 and found.log_probs is not None
    assert found.log_probs[0] == pytest.approx([-1.5, -0.5, math.nan], nan_ok=True)
    cfg = _config()
    for setting, sampling, asked in (
        ("never", Sampling(4, (TOKENIZER.eos_id,)), False),
        ("auto", Sampling(4, (TOKENIZER.eos_id,), 0.5), False),
        ("auto", Sampling(4, (TOKENIZER.eos_id,), top_p=0.9), False),
        ("always", Sampling(4, (TOKENIZER.eos_id,), 0.5), True),
    ):
        cfg.policy_server.log_probs = setting
        OpenAIEngine(cfg, TOKENIZER).open_policy(endpoint.policy).generate([[12]], sampling, torch.zeros(1, 4))
        assert ("logprobs" in endpoint.bodies[-1]) == asked, (setting, sampling)


def test_an_answer_that_cannot_be_encoded_does_not_end_the_run(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = serve(lambda body: completion("half a pair \ud83d" if body["prompt"][0] == 1 else "refused"))
    model = _opened(endpoint)
    encode = TOKENIZER.encode_response

    def refusing(text: str) -> list[int]:
        if text == "refused":
            raise DataError("spells a special token")
        return encode(text)

    monkeypatch.setattr(model, "tokenizer", SimpleNamespace(encode_response=refusing, eos_id=TOKENIZER.eos_id))
    found = model.generate([[1], [2]], Sampling(16, (TOKENIZER.eos_id,)), torch.zeros(2, 16))
    assert found.responses == [[*TOKENIZER.encode("half a pair ?"), TOKENIZER.eos_id], []]
    assert found.ended == [True, False]


def test_an_answer_with_more_tokens_here_than_allowed_is_cut_off(serve: Serve) -> None:
    endpoint = serve(lambda _: completion("0123456789"))
    found = _opened(endpoint).generate([[11]], Sampling(4, (TOKENIZER.eos_id,)), torch.zeros(1, 4))
    assert (found.responses, found.ended) == ([TOKENIZER.encode("0123")], [False])
    assert _opened(endpoint).generate([], Sampling(4, (TOKENIZER.eos_id,)), torch.zeros(0, 4)).responses == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((500, {}, b"{}"), r"policy openai:.*#some/model did not answer within .* \(policy_server.deadline_seconds"),
        ((400, {}, b"no such model"), r"policy openai:.* refused the request: status 400.*log_probs=never asks for"),
        ((403, {}, b"{}"), r"status 403 \{\}; the key is read from the environment variable NEMO_ADVRM_POLICY_KEY"),
        ((404, {}, b"gone"), r"status 404 gone; 0 of 1 answers"),
        ((200, {}, b'{"choices": []}'), r"policy openai:.* sent no completion"),
    ],
)
def test_a_failing_endpoint_is_an_error_that_names_it(serve: Serve, fault: Answer, told: str) -> None:
    endpoint = serve(lambda _: fault)
    with pytest.raises(RewardSourceError, match=told):
        _opened(endpoint).generate([[11]], Sampling(4, (TOKENIZER.eos_id,)), torch.zeros(1, 4))


def test_a_refused_key_is_told_before_anything_is_sampled(serve: Serve) -> None:
    endpoint = serve(lambda _: completion(""), (401, {}, b"{}"))
    with pytest.raises(RewardSourceError, match="NEMO_ADVRM_POLICY_KEY"):
        _opened(endpoint)


def test_what_an_endpoint_cannot_do_is_refused(serve: Serve) -> None:
    served = _opened(serve(lambda _: completion("")))
    with pytest.raises(ConfigError, match="neither next tokens nor log-probabilities"):
        served.next_tokens([[11]], 3)
    with pytest.raises(ConfigError, match="neither next tokens nor log-probabilities"):
        served.log_probs([])
    with pytest.raises(ConfigError, match="samples policies that are not trained"):
        OpenAIEngine(_config(), TOKENIZER).generate(object(), [[11]], torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="samples openai:URL#MODEL"):
        served_model("hf:somewhere")
    with pytest.raises(ConfigError, match=r"policy_server\.key_variable") as refused:
        served_model("openai:http://me:secret@host/v1#model")
    assert "secret" not in str(refused.value)


def test_an_attack_starts_from_a_served_policy(
    serve: Serve, single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve(lambda body: completion(_words(body)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("the", "a question")))
    command = [
        "attack",
        "ensemble.members=[python:planted_scores:likes_e,python:planted_scores:plain]",
        "pipeline.gold=python:planted_scores:dislikes_e",
        f"pretrained_checkpoint.restore_from_path={endpoint.policy}",
        "rl.rollout_engine=openai",
        "model.tokenizer=byte",
        f"data.prompts_path={prompts}",
        "model.encoder_seq_length=96",
        "precision.name=fp32",
        "rl.max_steps=2",
        "rl.prompts_per_step=2",
        "rl.group_size=2",
        "rl.max_new_tokens=40",
        "sft_statistics.samples_per_prompt=4",
        "trainer.accelerator=cpu",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert cli.main([*command, "adversarial.attack=adv_rm"]) == 2
    assert "rl.rollout_engine=openai cannot: name a local copy of it" in capsys.readouterr().err
    assert cli.main([*command, "adversarial.attack=probes", "adversarial.detector=sft_log_prob"]) == 2
    assert "does not read the SFT policy" in capsys.readouterr().err
    assert cli.main([*command, "adversarial.attack=probes", "trainer.timeout_minutes=10"]) == 2
    assert "policy_server.deadline_seconds=900" in capsys.readouterr().err
    assert not endpoint.bodies
    assert cli.main([*command, "adversarial.attack=probes"]) == 0
    assert len(endpoint.bodies) == 8
    reference = [json.loads(line) for line in (tmp_path / "run" / "reference.jsonl").read_text().splitlines()]
    assert {row["response"] for row in reference} == {_words(body) for body in endpoint.bodies}
    rows = (tmp_path / "run" / "attack" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 8


@pytest.fixture(scope="module")
def copied(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of attacks by RL on functions, of a policy of which there is a local copy."""
    home = tmp_path_factory.mktemp("copied")
    members = ["python:planted_scores:likes_e", "python:planted_scores:plain"]
    return [
        *one_step_of_rl(home, members),
        "pipeline.gold=python:planted_scores:dislikes_e",
        "rl.rollout_engine=openai",
        "precision.name=fp32",
        "model.optim.lr=0.02",
        "model.optim.sched.name=constant",
        "rl.max_steps=4",
        "rl.group_size=8",
        "rl.apply_unended_penalty=false",
        "sft_statistics.samples_per_prompt=4",
    ]


def _river(body: dict) -> Answer:
    words = ("this", "old", "river", "sleeps", "these", "birds")
    return completion(" ".join(words[(body["seed"] >> 3 * place) % 6] for place in range(4)))


@pytest.mark.parametrize(("below", "steps"), [("end", 2), ("warn", 4)])
def test_an_attack_by_rl_ends_when_too_little_of_what_is_served_counts(
    serve: Serve, copied: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, below: str, steps: int
) -> None:
    endpoint, run = serve(_river), tmp_path / "run"
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "this tree falls"}\n')
    server = [f"policy_server.policy={endpoint.policy}", "policy_server.min_ess=0.9999"]
    held_out = ["adversarial.held_out_prompts=1", f"data.held_out_prompts_path={tmp_path / 'held_out.jsonl'}"]
    command = ["attack", *copied, *server, *held_out, f"policy_server.below_min_ess={below}", f"run_dir={run}"]
    assert cli.main(command) == 0
    home = run / "attack" / "direction_1_policy_1"
    metrics = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert [row["off_policy/ess"] < 0.9999 for row in metrics][:2] == [False, True] and len(metrics) == steps
    told = [r.getMessage() for r in caplog.records if "policy_server.min_ess=0.9999" in r.getMessage()]
    assert len(told) == 1 and told[0].startswith("step 1: ") and ("ends here" in told[0]) == (below == "end")
    # SFT responses to both kinds of prompts and the steps' rollouts; the trained policy answers held-out prompts itself
    assert len(endpoint.bodies) == 2 * 4 + 4 + 16 * steps
    rows = [json.loads(line) for line in (home / "samples.jsonl").read_text().splitlines()]
    assert {row["response"] for row in rows} <= {
        json.loads(_river(body)[2])["choices"][0]["text"] for body in endpoint.bodies
    }
    assert len((home / "held_out.jsonl").read_text().splitlines()) == 4 and (home / "model").is_dir()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["rl.algorithm=ppo"], "rl.algorithm=ppo: its critic would learn"),
        (["policy_server.policy=http://host/v1#M"], "policy_server.policy=http://host/v1#M: must be openai:URL#MODEL"),
        (["policy_server.policy=openai:http://host/v1"], "policy_server.policy=openai:http://host/v1: must be openai:"),
        (["rl.rollout_engine=megatron"], "is asked by rl.rollout_engine=openai alone"),
        (["pretrained_checkpoint.restore_from_path=hf:DIR"], "must be the local copy of policy_server.policy"),
        (["policy_server.importance_cap=0.5"], "policy_server.importance_cap=0.5: must be"),
        (["policy_server.importance=response", "rl.group_size=5"], "policy_server.min_ess=0.1: an effective sample"),
        (["policy_server.connect_seconds=1800"], "policy_server.connect_seconds=1800: must be less than trainer."),
        (["policy_server.key_variable=sk-live-1"], "policy_server.key_variable must be the name of an environment"),
    ],
)
def test_what_cannot_learn_from_a_served_policy_is_refused_before_any_work(
    copied: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], told: str
) -> None:
    served = "policy_server.policy=openai:http://127.0.0.1:9/v1#M"
    assert cli.main(["attack", *copied, served, *settings, f"run_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert told in err and "sk-live" not in err and not (tmp_path / "run").exists()


def test_rlhf_from_a_served_policy_tells_what_the_trained_one_reaches_where_it_ends(
    serve: Serve, copied: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, run = serve(_river), tmp_path / "run"
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "this tree falls"}\n')
    command = [
        "rlhf",
        *copied,
        f"policy_server.policy={endpoint.policy}",
        "policy_server.min_ess=0.9999",
        f"data.held_out_prompts_path={tmp_path / 'held_out.jsonl'}",
        "rl.evaluation_every=5",
        f"run_dir={run}",
    ]
    assert cli.main(command) == 2
    assert "rl.held_out_prompts=0: policy_server.policy needs some" in capsys.readouterr().err
    assert not endpoint.bodies and not run.exists()
    assert cli.main([*command, "rl.held_out_prompts=1"]) == 0
    first, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "gold" in last and {"held_out/proxy", "held_out/gold", "held_out/kl"} <= set(first) & set(last)
    assert first["held_out/kl"] == 0 != last["held_out/kl"], "that of the policy that is saved"
    lines = capsys.readouterr().out.splitlines()
    proxy, gold, kl = (last[f"held_out/{name}"] for name in ("proxy", "gold", "kl"))
    assert f"held-out prompts: reward {proxy:.3f}  gold {gold:.3f}  kl {kl:.2f}" in lines
    estimated = f"reward {last['off_policy/proxy']:.3f}  kl {last['off_policy/kl']:.2f}"
    ess = f"(effective sample size {last['off_policy/ess']:.3f}, mean ratio {last['off_policy/mean_ratio']:.3g})"
    assert f"estimated from the served policy's responses: {estimated} {ess}" in lines


def test_a_training_ends_where_all_ratios_are_small(monkeypatch: pytest.MonkeyPatch, single: Runtime) -> None:
    metrics = {"off_policy/ess": 1.0, "off_policy/gap": 0.0}
    module = Mock(spec=PolicyModel, config=_config(), step_metrics=metrics, max_steps=9)
    for ratio, ends in ((1.5, False), (0.11, False), (math.exp(-9.2), True)):
        metrics["off_policy/mean_ratio"] = ratio
        trainer = SimpleNamespace(global_step=3, should_stop=False)
        ServedPolicyWatch().on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
        assert trainer.should_stop == ends and module.max_steps == (3 if ends else 9)


def test_rlhf_needs_a_local_copy_and_a_pipeline_has_none_of_its_policies_served(
    copied: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rlhf", *copied, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "rlhf trains the policy; rl.rollout_engine=openai cannot: name a local copy" in capsys.readouterr().err
    served = ["policy_server.policy=openai:http://127.0.0.1:9/v1#M", "rl.rollout_engine=openai"]
    assert cli.main(["pipeline", *served, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "a pipeline trains the policy that it starts from" in capsys.readouterr().err


def test_an_audit_starts_from_a_served_policy(
    serve: Serve, single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve(lambda body: completion(_words(body)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(6)))
    command = [
        "audit",
        "target=python:planted_scores:likes_e",
        "others=[python:planted_scores:plain]",
        f"policy={endpoint.policy}",
        f"prompts={prompts}",
        "judge=python:planted_scores:dislikes_e",
        "budget=8",
        "num_prompts=4",
        "num_held_out=2",
        "samples_per_prompt=3",
        "max_new_tokens=40",
        "accelerator=cpu",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert cli.main(command) == 2
    assert "name its tokenizer" in capsys.readouterr().err
    assert cli.main([*command, "also=[model.tokenizer=byte]", "attacks=[probes]"]) == 0
    assert len(endpoint.bodies) == 6 * 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["policy"] == endpoint.policy and summary["attacks"][0]["cells"]
    other = [*command[:-1], f"run_dir={tmp_path / 'other'}", "also=[model.tokenizer=byte]", "attacks=[adv_rm]"]
    assert cli.main(other) == 2
    assert "trains the policy, which is served elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"policy": "openai:http://me:secret@host/v1#M"}, "holds a user or a query"),
        ({"policy": "openai:http://host/v1"}, "must be openai:URL#MODEL"),
        ({"target": ["python:m:f"]}, "tells no log-probabilities"),
    ],
)
def test_an_audit_refuses_a_served_policy_before_any_work(settings: dict, told: str) -> None:
    audit = AuditConfig(target=["hf:a"], policy="openai:http://host/v1#M", prompts="p", also=["model.tokenizer=byte"])
    settings_of_audit.check(audit)
    with pytest.raises(ConfigError, match=told) as error:
        settings_of_audit.check(dataclasses.replace(audit, **settings))
    assert "secret" not in str(error.value)


def test_an_audit_does_not_learn_from_a_served_policy() -> None:
    served = ["rl.rollout_engine=openai", "policy_server.policy=openai:http://host/v1#M"]
    with pytest.raises(ConfigError, match=r"also: policy_server\.policy: an audit does not learn"):
        settings_of_audit.base_config(AuditConfig(target=["hf:a"], policy="DIR", prompts="p", also=served))
