"""Every wire format gives the scores that are computed in process."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Served
from reward_members import rollouts
from tiny import TOKENIZER

from nemo_advrm.config.schema import Config
from nemo_advrm.rewards.remote import trl_reward
from nemo_advrm.rewards.sources import build, parse

CLOSE = {"abs": 1e-4}


def _token_rows() -> list[list[int]]:
    data = rollouts()
    return [p + TOKENIZER.encode_response(r) for p, r in zip(data.prompt_tokens, data.responses, strict=True)]


def _post(served: Served, path: str, body: object) -> Any:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("form", ["messages", "text", "tokens", "mixed"])
def test_own_interface(served: Served, form: str) -> None:
    data = rollouts()
    forms = {
        "messages": [{"messages": list(p), "response": r} for p, r in zip(data.prompts, data.responses, strict=True)],
        "text": [{"text": text} for text in served.texts()],
        "tokens": [{"tokens": row} for row in _token_rows()],
    }
    samples = [forms[name][i] for i, name in enumerate(("messages", "text", "tokens", "text"))]
    answer = _post(served, "/v1/score", {"samples": forms.get(form, samples), "members": True})
    assert answer["scores"] == pytest.approx(served.expected, **CLOSE)
    assert np.allclose(answer["members"], served.expected_members, atol=1e-4)


def test_a_cut_off_response_gets_no_end_token(served: Served) -> None:
    data = rollouts()
    sample = {"messages": list(data.prompts[1]), "response": data.responses[1], "ended": False}
    cut = _post(served, "/v1/score", {"samples": [sample]})["scores"][0]
    tokens = {"tokens": data.prompt_tokens[1] + TOKENIZER.encode(data.responses[1])}
    assert cut == pytest.approx(_post(served, "/v1/score", {"samples": [tokens]})["scores"][0], **CLOSE)
    assert abs(cut - served.expected[1]) > 1e-3


def test_openrlhf(served: Served) -> None:
    texts = served.texts()
    answer = _post(served, "/get_reward", {"query": texts, "prompts": texts, "labels": [None] * 4})
    assert answer["rewards"] == pytest.approx(served.expected, **CLOSE)
    assert answer["scores"] == answer["rewards"] and answer["extra_logs"] == {}
    # without an end token it is put there, as OpenRLHF's own server does
    assert _post(served, "/get_reward", {"query": [texts[0].removesuffix(" <eos>")]})["rewards"] == pytest.approx(
        served.expected[:1], **CLOSE
    )


def test_slime(served: Served) -> None:
    data = rollouts()
    for prompt, response, expected in zip(data.prompts, data.responses, served.expected, strict=True):
        # slime's prompt is what the policy's chat template wrote, or messages if it applies none
        for form in (f"{prompt[0]['content']} <sep> ", list(prompt)):
            for label in ("", None, {"answer": "5"}):
                reward = _post(served, "/remote_rm", {"prompt": form, "response": response, "label": label})
                assert isinstance(reward, float) and reward == pytest.approx(expected, **CLOSE)


def test_verl_asks_vllm_and_sglang(served: Served) -> None:
    for text, expected in zip(served.texts(), served.expected, strict=True):
        answer = _post(served, "/classify", {"model": "rm", "input": text, "activation": False})
        assert answer["data"][-1]["probs"][-1] == pytest.approx(expected, **CLOSE)
        answer = _post(served, "/v1/embeddings", {"model": "rm", "input": text})
        assert answer["data"][-1]["embedding"][-1] == pytest.approx(expected, **CLOSE)
    answer = _post(served, "/classify", {"input": _token_rows()})
    assert [row["probs"][0] for row in answer["data"]] == pytest.approx(served.expected, **CLOSE)


def test_trl_reward_function(served: Served) -> None:
    data, reward = rollouts(), trl_reward(served.server.address)
    conversations = [list(p) for p in data.prompts]
    answers = [[{"role": "assistant", "content": r}] for r in data.responses]
    assert reward(prompts=conversations, completions=answers, trainer_state=None) == pytest.approx(
        served.expected, **CLOSE
    )
    plain = [p[0]["content"] for p in data.prompts]
    assert reward(plain, data.responses) == pytest.approx(served.expected, **CLOSE)


@pytest.mark.parametrize("scheme", ["", "triton+"])
def test_as_a_member_of_an_ensemble(served: Served, scheme: str) -> None:
    path = "/reward_model?tokenizer=synthetic" if scheme else ""
    source = build(parse(f"{scheme}{served.server.address}{path}", "m"), "remote", Config())
    data = rollouts()
    ended = source.score(data)
    data.fingerprint = "of another tokenizer"
    assert ended.tolist() == pytest.approx(source.score(data).tolist(), **CLOSE)
    assert ended[[0, 2]].tolist() == pytest.approx([served.expected[0], served.expected[2]], **CLOSE)
    assert abs(ended[1] - served.expected[1]) > 1e-3  # cut off: no end token


def test_tritonclient_with_text_and_with_tokens(served: Served) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    client = triton.InferenceServerClient(served.server.address.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("reward_model")
    assert client.get_model_metadata("reward_model")["outputs"][0]["datatype"] == "FP32"
    assert client.get_model_config("reward_model")["max_batch_size"] == 1024
    rows = _token_rows()
    tokens = np.zeros((4, max(map(len, rows)) + 3), np.int64)  # padded as a trainer pads, further than needed
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    arrays = {
        "tokens": tokens,
        "sequence_lengths": np.array([[len(row)] for row in rows], np.int64),
        "sentences": np.array([[text.encode()] for text in served.texts()], np.object_),
    }
    for names in (["tokens", "sequence_lengths"], ["sentences"]):
        for binary in (True, False):
            inputs = []
            for name in names:
                kind = "BYTES" if name == "sentences" else "INT64"
                inputs.append(triton.InferInput(name, list(arrays[name].shape), kind))
                inputs[-1].set_data_from_numpy(arrays[name], binary_data=binary)
            outputs = [triton.InferRequestedOutput("rewards", binary_data=binary)]
            for wanted in (outputs, None):
                result = client.infer("reward_model", inputs, outputs=wanted, request_id="7")
                rewards = result.as_numpy("rewards")
                assert rewards.shape == (4, 1) and rewards.dtype == np.float32
                assert rewards.flatten().tolist() == pytest.approx(served.expected, **CLOSE)
                assert result.get_response()["id"] == "7"
    with (
        pytest.raises(triton.InferenceServerException, match="there is no model other")
        if hasattr(triton, "InferenceServerException")
        else pytest.raises(Exception, match="there is no model other")
    ):
        client.infer("other", inputs)
    client.close()


def test_kserve_with_a_version_in_the_address(served: Served) -> None:
    tensor = {"name": "sentences", "shape": [4, 1], "datatype": "BYTES", "data": [[t] for t in served.texts()]}
    answer = _post(served, "/v2/models/reward_model/versions/1/infer", {"inputs": [tensor]})
    assert answer["outputs"][0]["data"] == pytest.approx(served.expected, **CLOSE)


def test_scores_do_not_depend_on_what_else_is_in_the_batch(served: Served) -> None:
    words = ["river", "birds", "garden", "sing", "slowly", "."]
    fill = [{"text": " ".join(words[i % 6] for i in range(n))} for n in (1, 40, 7, 25)]
    first = {"text": served.texts()[0]}
    for others in (fill, fill[::-1], fill[:1] * 60):
        answer = _post(served, "/v1/score", {"samples": [*others, first]})
        assert answer["scores"][-1] == pytest.approx(served.expected[0], **CLOSE)


def test_info_and_metrics(served: Served) -> None:
    info = served.client.get("/v1/info").json()
    assert info["reward"] == "mean" and len(info["members"]) == 2 and info["tokenizer"] == TOKENIZER.fingerprint
    _post(served, "/v1/score", {"samples": [{"text": served.texts()[0]}]})
    text = served.client.get("/metrics").text
    assert 'advrm_requests_total{route="/v1/score",status="200"}' in text
    assert "advrm_queue_tokens 0.0" in text


def test_the_openapi_document_names_every_json_route(served: Served) -> None:
    document = json.loads(httpx.get(f"{served.server.address}/openapi.json").text)
    assert {"/v1/score", "/get_reward", "/remote_rm", "/classify", "/v1/embeddings"} <= set(document["paths"])
