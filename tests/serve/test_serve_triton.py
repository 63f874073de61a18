"""Triton's side of the server as far as it goes without PyTriton; with it: tests/aligner/test_triton.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ServerProcess

from nemo_advrm import cli
from nemo_advrm.commands import serve
from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve import kserve
from nemo_advrm.serve.bounds import Bounds
from nemo_advrm.serve.samples import Sample
from nemo_advrm.serve.triton_bridge import encode

BOUNDS = Bounds.of(ServeConfig())


def test_what_triton_is_asked_reaches_the_queue_as_it_was() -> None:
    tokens = np.array([[8, 9, 0], [10, 11, 12]])
    arrays = {"tokens": tokens, "sequence_lengths": np.array([[2], [3]], np.int32), "add_EOS": np.zeros((2, 1), bool)}
    head, body = encode(arrays, kserve.INPUTS)
    assert kserve.read_request(body, head, BOUNDS).samples == [
        Sample("tokens", tokens=(8, 9)),
        Sample("tokens", tokens=(10, 11, 12)),
    ]
    for texts in (np.array([[b"a"], ["\u00fc ".encode()]], object), np.array([["a"], ["\u00fc "]])):
        head, body = encode({"sentences": texts}, kserve.INPUTS)
        assert [sample.response for sample in kserve.read_request(body, head, BOUNDS).samples] == ["a", "\u00fc "]
    head, body = encode({"sentences": np.array([[b"\xff\xfe"]], object)}, kserve.INPUTS)
    with pytest.raises(kserve.BadTensors, match="not UTF-8"):
        kserve.read_request(body, head, BOUNDS)


@pytest.mark.parametrize(
    ("settings", "token", "words"),
    [
        (["serve.triton_port=1"], "secret", "cannot ask for the bearer token"),
        (["serve.host=0.0.0.0"], "secret", "serve.triton_port needs serve.host=127.0.0.1"),
        (["serve.name=a/b"], "", "serve.name=a/b"),
        (["serve.triton_python=/no/such/python"], "", "serve.triton_python=/no/such/python"),
        (["serve.triton_python=/bin/false"], "", "status 1"),
    ],
)
def test_a_triton_that_cannot_start_is_told_before_a_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: list[Path],
    settings: list[str],
    token: str,
    words: str,
) -> None:
    monkeypatch.setenv("NEMO_ADVRM_TOKEN", token)

    def loads(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(serve.sources, "load_members", loads)
    run = ["serve", f"run_dir={tmp_path / 'run'}", f"ensemble.members=[{checkpoints[0]}]", "serve.port=0"]
    assert cli.main([*run, "serve.triton_port=18555", "trainer.accelerator=cpu", *settings]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and not (tmp_path / "run").exists()


def test_a_python_without_pytriton_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoints: list[Path]
) -> None:
    if importlib.util.find_spec("pytriton") is not None:
        pytest.skip("PyTriton is installed here")
    monkeypatch.delenv("NEMO_ADVRM_TOKEN", raising=False)
    run = ["serve", f"run_dir={tmp_path / 'run'}", f"ensemble.members=[{checkpoints[0]}]", "serve.port=0"]
    assert cli.main([*run, "serve.triton_port=18555", "trainer.accelerator=cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert "cannot import PyTriton" in error and "serve.triton_python" in error and "\n" not in error


def test_a_triton_that_dies_at_its_start_ends_the_server(tmp_path: Path, checkpoints: list[Path]) -> None:
    """The program passes the check and then does nothing that is expected of it."""
    broken = tmp_path / "python"
    broken.write_text(
        '#!/bin/sh\n[ "$2" = --check ] && exit 0\necho "no room, GPUs: ${CUDA_VISIBLE_DEVICES-all}" >&2\nexit 3\n'
    )
    broken.chmod(0o755)
    words = r"error: serve.triton_port=18555: Triton ended at its start; see .*\.log \(no room, GPUs:\)"
    with pytest.raises(AssertionError, match=words):
        ServerProcess(
            tmp_path / "run",
            f"ensemble.members=[{checkpoints[0]}]",
            "serve.triton_port=18555",
            f"serve.triton_python={broken}",
        )
    assert (tmp_path / "run" / "triton.log").read_text() == "no room, GPUs: \n"
    assert not (tmp_path / "run" / "server.json").exists()


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
