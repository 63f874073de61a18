"""``nemo-advrm convert`` reads its own flat settings and reports in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_advrm import cli
from nemo_advrm.config import load_flat
from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.errors import ConfigError


def test_words_become_typed_settings() -> None:
    words = ["from=hf", "path=a=b/007", "to=megatron", "tensor_model_parallel_size=8", "dry_run=true"]
    assert load_flat(ConvertConfig, words) == ConvertConfig(
        from_="hf", path="a=b/007", to="megatron", tensor_model_parallel_size=8, dry_run=True
    )
    assert load_flat(ConvertConfig, ["drop_head_bias=True", "dtype="]) == ConvertConfig(drop_head_bias=True)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("form=hf", "unknown key form: did you mean from?"),
        ("tensor_model_paralel_size=2", "did you mean tensor_model_parallel_size?"),
        ("--dry-run", "unknown option --dry-run: settings are written key=value, as in dry_run=true"),
        ("hf", "cannot read the setting 'hf'"),
        ("=hf", "cannot read the setting '=hf'"),
        ("tensor_model_parallel_size=two", "expected int"),
        ("dry_run=maybe", "expected bool"),
        ("to=hf", "to is given twice"),
    ],
)
def test_a_wrong_word_is_explained(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_flat(ConvertConfig, ["to=megatron", word])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("word", "ending"),
    [
        ("--out", "key=value, as in out=VALUE"),
        ("--from", "key=value, as in from=VALUE"),
        ("--out=place", "key=value, as in out=place"),
        ("--dry-run=false", "key=value, as in dry_run=false"),
        *((word, f"unknown option {word}: settings are written key=value") for word in ("-", "--", "-x", "--=")),
    ],
)
def test_an_option_is_explained_by_a_setting_that_exists(word: str, ending: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_flat(ConvertConfig, ["to=megatron", word])
    assert str(caught.value).endswith(ending)


def test_the_command_converts(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "from=hf", f"path={saved('llama2')}", "to=megatron", f"out={tmp_path / 'out'}"]
    assert cli.main([*words, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "model.embed_tokens.weight -> model.embedding.word_embeddings.weight [67, 48]" in printed
    assert not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    assert "language model, 27 tensors" in capsys.readouterr().out
    assert (tmp_path / "out" / "meta.json").exists()
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "from is not set: from=hf | megatron | nemo"),
        (["from=hf"], "to is not set"),
        (["from=hf", "to=megatorn", "path=a", "out=b"], "did you mean megatron?"),
        (["from=hf", "to=megatron", "out=b"], "path is not set"),
        (["from=hf", "to=megatron", "path=/no/such/place", "out=b"], "/no/such/place: there is no such"),
        (["from=megatron", "to=hf", "path=/no/such/place", "out=b"], "/no/such/place: there is no such"),
    ],
)
def test_what_is_missing_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_written_model_file_makes_stages_use_the_checkpoint(saved: Callable[..., Path], tmp_path: Path) -> None:
    from nemo_advrm.config import load_config

    cli.main(["convert", "from=hf", f"path={saved('gemma2')}", "to=megatron", f"out={tmp_path / 'out'}"])
    cfg = load_config([f"hydra.searchpath=[{tmp_path / 'out' / 'conf'}]", "model=imported"], "train_rm")
    model = cfg.model
    assert (model.normalization, model.post_norms, model.sliding_window, model.vocab_size) == ("rmsnorm1p", True, 5, 67)


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert 'from=""' in out and "hf | megatron | nemo" in out and "drop_head_bias=false" in out
