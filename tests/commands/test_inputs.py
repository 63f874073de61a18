"""What the stages read: the split that is meant, shared prompts told once, conversations that a template refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_advrm.config import load_config
from nemo_advrm.data import inputs
from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.pipeline import run_inputs
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rollouts.run_prompts import attack_prompts, encode_prompts, held_out_prompts, rlhf_prompts
from nemo_advrm.training.sft_training import encode_responses

pytestmark = pytest.mark.usefixtures("single")


def write(path: Path, first: int, count: int, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": f"q {i}", "chosen": f"good {i}", "rejected": "bad", **more} for i in range(first, first + count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbers(rows: list) -> list[int]:
    return [int(row.prompt[-1]["content"].split()[1]) for row in rows]


def config(*settings: str) -> Any:
    return load_config(["model=tiny", *settings], "train_rm")


def test_training_and_validation_take_their_splits_of_one_directory(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 0, 8)
    write(tmp_path / "test.jsonl", 8, 2)
    both = [f"data.train_path={tmp_path}", f"data.validation_path={tmp_path}"]
    for settings in (both, [both[0], "data.validation_split=test"]):
        train, validation = inputs.training_and_validation_pairs(config(*settings))
        assert (numbers(train), numbers(validation)) == (list(range(8)), [8, 9])
    # without either a part of the training split is held out, and the test split is left alone
    train, validation = inputs.training_and_validation_pairs(config(both[0], "data.validation_fraction=0.25"))
    assert sorted(numbers(train) + numbers(validation)) == list(range(8)) and len(validation) == 2
    assert numbers(inputs.evaluation_pairs(config(both[1]))) == [8, 9]
    assert numbers(inputs.evaluation_pairs(config(both[0], "data.train_split=train"))) == list(range(8))


def test_a_worker_keeps_the_pairs_of_one_member_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(["model=tiny", "pipeline.gold=synthetic", "model.tokenizer=synthetic", f"run_dir={tmp_path}"])
    asked: list[str] = []

    def pairs(cfg: Any, tokenizer: Any, train: Any, validation: Any) -> list[str]:
        asked.append(train)
        return [train]

    monkeypatch.setattr(run_inputs, "encode_rows", pairs)
    monkeypatch.setattr(run_inputs, "load_preferences", lambda path: SimpleNamespace(rows=path.stem))
    own = run_inputs.Inputs(cfg)
    first = own.preferences(1)
    assert own.preferences(1) is first and asked == ["train_1"]
    assert (own.preferences(2), own.preferences(2)) == (["train_2"], ["train_2"]) and asked == ["train_1", "train_2"]
    assert own.preferences(1) is not first and asked == ["train_1", "train_2", "train_1"]


def test_a_directory_without_held_out_rows_is_not_its_own_validation(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 0, 8)
    with pytest.raises(DataError, match="training and validation are the same rows"):
        inputs.training_and_validation_pairs(config(f"data.train_path={tmp_path}", f"data.validation_path={tmp_path}"))


def test_prompts_shared_with_the_training_data_are_told_once(tmp_path: Path, capsys: Any) -> None:
    train, held_out = write(tmp_path / "a.jsonl", 0, 8), write(tmp_path / "b.jsonl", 5, 6)
    settings = [f"data.train_path={train}", f"data.validation_path={held_out}"]
    assert len(inputs.training_and_validation_pairs(config(*settings))[1]) == 6
    line = f"{held_out}: the prompts of 3 of 6 pairs are in the training data too"
    assert capsys.readouterr().out.count(line) == 1
    write(held_out, 8, 6)
    inputs.training_and_validation_pairs(config(*settings))
    assert "training data too" not in capsys.readouterr().out


def test_columns_are_left_out_knowingly_in_every_stage(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "a.jsonl", 0, 4, tools=["search"])
    settings = [f"data.train_path={path}", "data.ignore_columns=[tools]", "data.validation_fraction=0.5"]
    for read in (inputs.training_and_validation_pairs, inputs.evaluation_pairs, inputs.prompts, inputs.sft):
        with pytest.raises(DataError, match=r"a\.jsonl:1: `tools` holds content"):
            read(config(settings[0]))
        assert read(config(*settings))
        assert capsys.readouterr().out == f"{path}: 4 rows; not read: tools\n"


class NoSystem(ByteTokenizer):
    """A tokenizer whose chat template refuses system turns, as those of some models do."""

    def encode_prompt(self, messages: Any) -> list[int]:
        if any(message["role"] == "system" for message in messages):
            raise DataError("the chat template refuses this conversation: System role not supported")
        return super().encode_prompt(messages)


def test_conversations_that_a_template_refuses_are_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 0, 3)
    with open(path, "a") as file:
        file.write(json.dumps({"system": "Rhyme.", "prompt": "q 3", "chosen": "good", "rejected": "bad"}) + "\n")
    cfg = config(f"data.train_path={path}")
    skipping = config(f"data.train_path={path}", "data.on_bad_row=skip")
    pairs, tokenizer = inputs.evaluation_pairs(cfg), NoSystem()
    for action in (
        lambda c: encode_pairs(pairs, tokenizer, 64, on_bad_row=c.data.on_bad_row)[0],
        lambda c: encode_responses(c, tokenizer, inputs.sft(c)),
        lambda c: encode_prompts(inputs.prompts(c), tokenizer, c),
    ):
        with pytest.raises(DataError, match=r"a\.jsonl:4: .*refuses this conversation.*\(1 of 4 rows"):
            action(cfg)
        assert len(action(skipping)) == 3
    assert encode_pairs(pairs, tokenizer, 64, on_bad_row="skip")[1]["refused"] == 1
    refused = [SftRow(({"role": "system", "content": "Rhyme."}, {"role": "user", "content": "q"}), "a", "x:1")]
    with pytest.raises(DataError, match=r"x:1: .*refuses"):
        encode_responses(skipping, tokenizer, refused)


def test_prompts_and_answers_that_are_too_long_are_counted(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "a.jsonl", 0, 3)
    with open(path, "a") as file:
        file.write(json.dumps({"prompt": "q 3" + "x" * 99, "chosen": "good 3", "rejected": "bad"}) + "\n")
    tokenizer = ByteTokenizer()
    settings = [f"data.train_path={path}", "model.encoder_seq_length=64", "rl.max_new_tokens=8"]
    for choice, left, word in (("skip", 3, "overlong"), ("truncate_prompt", 4, "truncated")):
        cfg = config(*settings, f"data.on_overlong={choice}")
        rows, prompts = inputs.sft(cfg), inputs.prompts(cfg)
        capsys.readouterr()
        assert len(encode_responses(cfg, tokenizer, rows)) == len(encode_prompts(prompts, tokenizer, cfg)) == left
        said = capsys.readouterr().out
        assert f"rows: 1 {word}" in said and f"1 {word}" in said.splitlines()[1]


def test_a_prompt_that_is_too_long_is_named_by_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 0, 3)
    with open(path, "a") as file:
        file.write(json.dumps({"prompt": "q 3" + "x" * 40}) + "\n")
    tokenizer = ByteTokenizer()
    settings = [f"data.prompts_path={path}", f"data.held_out_prompts_path={path}", "rl.max_new_tokens=8"]
    short = config(*settings, "model.encoder_seq_length=40")
    for read in (rlhf_prompts, attack_prompts, lambda c: held_out_prompts(c, 9, [])):
        with pytest.raises(DataError, match=rf"^{path}:4: the prompt has \d+ tokens; model.encoder_seq_length=40"):
            encode_prompts(read(short), tokenizer, short)
    cfg = config(*settings, "model.encoder_seq_length=64")
    prompts = encode_prompts(rlhf_prompts(cfg), tokenizer, cfg)
    member = SimpleNamespace(name="rm", longest=50, tokenizer=tokenizer)
    with pytest.raises(DataError, match=rf"^{path}:4: the prompt has \d+ tokens, which leaves no room for rl.max_new"):
        prompts_with_room(prompts, tokenizer.fingerprint, [member], cfg)  # type: ignore[list-item]
    assert pickle.loads(pickle.dumps(prompts[3].messages)).source == f"{path}:4"  # ranks gather them
