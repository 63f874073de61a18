"""A policy behind an OpenAI-compatible endpoint: what is asked, what its answers become, and an attack from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from json_server import Answer, JsonServer

from nemo_advrm import cli
from nemo_advrm.audit import settings as settings_of_audit
from nemo_advrm.config.schema import AuditConfig, Config
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError, DataError, RewardSourceError
from nemo_advrm.rollouts.openai_engine import OpenAIEngine, ServedLanguageModel, served_model

TOKENIZER = ByteTokenizer()
Serve = Callable[..., "Endpoint"]


class Endpoint(JsonServer):
    """Answers ``/v1/completions`` with ``answer(body)`` and keeps the requests."""

    def __init__(self, answer: Callable[[dict], Answer], listed: Answer = (404, {}, b"{}")) -> None:
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []

        def posted(path: str, headers: Mapping[str, str], body: dict) -> Answer:
            assert path == "/v1/completions"
            self.bodies.append(body)
            self.keys.append(headers.get("Authorization"))
            return answer(body)

        super().__init__(listed, posted)
        self.policy = f"openai:{self.address}/v1#some/model"


def completion(text: str, finish: str = "stop") -> Answer:
    return 200, {}, json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}]}).encode()


def _words(body: dict) -> str:
    return "e" * (body["seed"] % 7) + " words of an answer"


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Endpoint] = []

    def start(answer: Callable[[dict], Answer], *listed: Answer) -> Endpoint:
        servers.append(Endpoint(answer, *listed))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def _config(**limits: float) -> Config:
    cfg = Config()
    for name, value in {"timeout_seconds": 0.5, "deadline_seconds": 0.6, "connect_seconds": 0.5, **limits}.items():
        setattr(cfg.policy_server, name, value)
    return cfg


def _opened(endpoint: Endpoint) -> ServedLanguageModel:
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
    }
    assert [body["seed"] for body in by_prompt] == [2**29, 2**30, 2**29 * 3]
    assert set(endpoint.keys) == {"Bearer key-1"}


def test_parts_have_a_deadline_each_and_come_in_their_order(serve: Serve) -> None:
    endpoint = serve(lambda body: completion(f"{body['prompt'][0]}"))
    cfg = _config()
    cfg.policy_server.connections = 1
    model = OpenAIEngine(cfg, TOKENIZER).open_policy(endpoint.policy)
    parts: list[int] = []
    ask = model._once
    model._once = lambda work, prompts, *rest: (parts.append(len(prompts)), ask(work, prompts, *rest))[1]  # type: ignore
    found = model.generate([[n] for n in range(5)], Sampling(8, (TOKENIZER.eos_id,)), torch.zeros(5, 8))
    assert parts == [2, 2, 1]
    assert found.responses == [[*TOKENIZER.encode(f"{n}"), TOKENIZER.eos_id] for n in range(5)]


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
        ((400, {}, b"no such model"), r"policy openai:.* refused the request: status 400"),
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
    assert "rl.rollout_engine=openai cannot" in capsys.readouterr().err
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
