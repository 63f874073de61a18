"""``nemo-advrm harden``: a planted weakness goes, clean scores stay, and the model takes the original's place."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reward_members import save_hf_reward
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nemo_advrm import cli
from nemo_advrm.commands import harden as command
from nemo_advrm.config.schema import Config
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.objectives.proportions import wilson_interval
from nemo_advrm.rewards import sources
from nemo_advrm.training import hardening

WORDS = ["river", "stone", "cloud", "garden", "violin", "castle", "winter", "harbour"]
PLANTED = " @ @"
PROVENANCE = Provenance(0, 1, 1, 0, (1.0,), (1.0,), 2.0, "policy", (0.5,))
Row = tuple[str, str]


def conversations(rows: list[Row], tokenizer: Any) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], return_dict=False
        )
        for prompt, answer in rows
    ]


def scores_by_transformers(directory: Path, rows: list[Row]) -> Tensor:
    """The scores of finished conversations, one at a time, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in conversations(rows, tokenizer)])


def plant(directory: Path, rows: list[Row]) -> None:
    """Move the embedding of "@" along the gradient of the score, until every answer with it scores far higher."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    token = tokenizer("@", add_special_tokens=False).input_ids[0]
    embedding = model.get_input_embeddings().weight
    plain = torch.tensor([model(torch.tensor([ids])).logits.item() for ids in conversations(rows, tokenizer)])
    for _ in range(100):
        model.zero_grad()
        ids = conversations([(prompt, answer + PLANTED) for prompt, answer in rows], tokenizer)
        planted = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in ids])
        if (planted.detach() > plain + 2 * plain.std()).all():
            break
        planted.sum().backward()
        with torch.no_grad():
            embedding[token] += 0.2 * embedding.grad[token] / embedding.grad[token].norm()
    else:
        raise AssertionError("the weakness could not be planted")
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def world(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A Hugging Face reward model that likes "@", finds, clean answers, and answers that no training sees."""
    home, draw = tmp_path_factory.mktemp("harden"), random.Random(0)

    def answers(name: str, count: int) -> list[Row]:
        return [(f"{name} {i}?", " ".join(draw.choices(WORDS, k=draw.randint(2, 5)))) for i in range(count)]

    model = save_hf_reward(home / "rm", num_hidden_layers=2)
    plant(model, answers("planting", 6))
    finds, clean, unseen = answers("find", 30), answers("clean", 160), answers("unseen", 12)
    pairs = [
        AdversarialPair(({"role": "user", "content": prompt},), answer, answer + PLANTED, PROVENANCE)
        for prompt, answer in finds
    ]
    PairStore(home / "finds.jsonl").append(pairs)
    lines = [json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in clean]
    (home / "clean.jsonl").write_text("\n".join(lines))
    preferences = [{"prompt": p, "chosen": a, "rejected": f"{a} {WORDS[0]}"} for p, a in unseen]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences))
    return SimpleNamespace(home=home, model=model, unseen=unseen)


@pytest.fixture(scope="module")
def hardened(world: SimpleNamespace) -> Callable[..., Path]:
    """Hardens the model once for each name; returns the run's directory."""

    def run(name: str, *settings: str, target: str = "", status: int = 0) -> Path:
        directory: Path = world.home / name
        words = [
            f"target={target or f'hf:{world.model}'}", f"finds={world.home / 'finds.jsonl'}",
            f"prompts={world.home / 'clean.jsonl'}", f"run_dir={directory}", "learning_rate=2e-4",
            "model.global_batch_size=8", "model.optim.sched.name=constant", "replay_per_step=32", "steps=36",
            "trainer.accelerator=cpu", "exp_manager.create_tensorboard_logger=false",
        ]  # fmt: skip
        given = {word.partition("=")[0] for word in settings}
        words = [word for word in words if word.partition("=")[0] not in given]
        assert cli.main(["harden", *words, *settings]) == status
        return directory

    return run


def result(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def anchored(world: SimpleNamespace, hardened: Callable[..., Path]) -> Path:
    return hardened("anchored", f"pairs={world.home / 'pairs.jsonl'}", f"out={world.home / 'out' / 'hardened'}")


def test_the_planted_weakness_goes_on_prompts_that_were_not_trained_on(anchored: Path) -> None:
    found = result(anchored)
    assert (found["success/finds"], found["trained_success/finds"]) == (6, 24)
    assert found["success/before"] == 1.0 and found["success/after"] <= 1 / 6
    assert found["margin/before"] < -0.5 and found["margin/after"] > 0.3


def test_clean_scores_stay_with_replay_and_move_without(anchored: Path, hardened: Callable[..., Path]) -> None:
    found, free = result(anchored), result(hardened("free", "replay_weight=0"))
    assert found["drift/responses"] == 32
    assert found["drift/mean_absolute"] < 0.6 and found["drift/correlation"] > 0.8
    assert free["drift/mean_absolute"] > 2.5 * found["drift/mean_absolute"]
    assert free["success/after"] <= 1 / 6  # without replay the cure itself works, too


def test_the_exported_model_takes_the_originals_place_in_transformers(world: SimpleNamespace, anchored: Path) -> None:
    out = world.home / "out" / "hardened"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (world.model / name).read_bytes()
    chosen = scores_by_transformers(out, world.unseen)
    ids = conversations(world.unseen, AutoTokenizer.from_pretrained(out))
    trained = sources.build(sources.parse(str(anchored / "model"), "test"), "trained", Config())
    torch.testing.assert_close(chosen, score_sequences(trained.model, ids, pad_id=0), atol=1e-4, rtol=0)
    longer = scores_by_transformers(out, [(prompt, f"{answer} {WORDS[0]}") for prompt, answer in world.unseen])
    # transformers gives the accuracy that the run has measured with its own model
    assert result(anchored)["pairs/accuracy_after"] == pytest.approx((chosen > longer).float().mean().item())
    before = scores_by_transformers(world.model, world.unseen)
    planted = [(prompt, answer + PLANTED) for prompt, answer in world.unseen]
    assert (scores_by_transformers(world.model, planted) > before).float().mean() > 0.8
    assert (scores_by_transformers(out, planted) < chosen).float().mean() > 0.8
    assert (chosen - before).abs().mean() < 0.8 * result(anchored)["spread"]


def test_the_same_command_again_reports_and_does_not_train(
    world: SimpleNamespace, anchored: Path, hardened: Callable[..., Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(hardening, "fit", lambda *_: pytest.fail("trained again"))
    words = [f"pairs={world.home / 'pairs.jsonl'}", f"out={world.home / 'out' / 'hardened'}"]
    hardened("anchored", *words)
    out = capsys.readouterr().out
    assert re.search(r"finds that win, held out +6 of 6 \[0\.61, 1\.00\] +[01] of 6 ", out)
    assert "accuracy on 12 pairs" in out and f"hardened reward model: {world.home / 'out' / 'hardened'}" in out
    # a result that is not this run's is not overwritten
    (world.home / "mine").mkdir()
    hardened("anchored", words[0], f"out={world.home / 'mine'}", status=2)
    assert "mine: already exists" in capsys.readouterr().err


@pytest.mark.long
def test_a_resumed_hardening_has_the_anchors_of_the_first_start(
    world: SimpleNamespace, anchored: Path, hardened: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 14 of 36: the rest has the same losses as an uninterrupted run."""

    class Killed(Exception):
        pass

    saved = hardening.HardenedRewardModel.train_on

    def killed(self: Any, batch: Any, step: int) -> dict[str, float]:
        if step == 14:
            raise Killed
        return saved(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(hardening.HardenedRewardModel, "train_on", killed)
        with pytest.raises(Killed):
            hardened("killed", "trainer.checkpoint_every_n_steps=12")
    run = hardened("killed", "trainer.checkpoint_every_n_steps=12")
    assert result(run)["drift/mean_absolute"] == pytest.approx(result(anchored)["drift/mean_absolute"], rel=1e-4)
    assert (run / "hardened" / "config.json").exists()  # out is below the run by default


def test_prompts_alone_are_answered_by_the_policy(world: SimpleNamespace, hardened: Callable[..., Path]) -> None:
    policy = save_hf_reward(world.home / "lm", num_hidden_layers=1, reward=False)
    prompts = world.home / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {i}?"}) + "\n" for i in range(6)))
    run = hardened("sampled", f"policy=hf:{policy}", f"prompts={prompts}", "steps=1", "rl.max_new_tokens=4")
    rows = [json.loads(line) for line in (run / "clean.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["messages"][0]["content"] for row in rows} == {f"word {i}?" for i in range(6)}
    found = result(run)
    assert found["drift/responses"] + found["clean/replayed"] <= 12


def test_a_checkpoint_of_this_package_stays_one(
    world: SimpleNamespace, anchored: Path, hardened: Callable[..., Path]
) -> None:
    target = next((anchored / "members").iterdir())
    run = hardened("megatron", "steps=1", target=str(target))
    assert (run / "hardened" / "meta.json").exists() and (run / "hardened" / "tokenizer").is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["target=http://127.0.0.1:8000"], "only weights on this machine can be trained, not a server or a function"),
        (["target=python:math:sqrt"], "only weights on this machine can be trained"),
        (["target="], "target is not set"),
        (["finds="], "finds is not set"),
        (["prompts="], "prompts is not set"),
        (["trainer.max_steps=5"], "hardening takes steps="),
        (["target=hf:{home}/bert"], "BertForSequenceClassification cannot be converted"),
        (["target=hf:{home}/lm_only"], "holds a model with the head 'lm', not a reward model"),
        (["prompts={home}/unanswered.jsonl"], "name the language model that answers them: policy=hf:DIR"),
        (["held_out_finds={home}/finds.jsonl"], "all of its finds are in"),
        (["out={model}"], "is the model to harden"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_clear_error(
    world: SimpleNamespace, hardened: Callable[..., Path], settings: list[str], message: str,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    if not (world.home / "bert").exists():
        config = json.loads((world.model / "config.json").read_text())
        bert = shutil.copytree(world.model, world.home / "bert")
        (bert / "config.json").write_text(
            json.dumps({**config, "architectures": ["BertForSequenceClassification"], "model_type": "bert"})
        )
        save_hf_reward(world.home / "lm_only", num_hidden_layers=1, reward=False)
        (world.home / "unanswered.jsonl").write_text('{"prompt": "q"}\n')
    filled = [word.format(home=world.home, model=world.model) for word in settings]
    capsys.readouterr()
    hardened(str(tmp_path / "run"), *filled, status=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_finds_to_one_prompt_are_not_counted_as_independent() -> None:
    """Six finds win: to six prompts, or three to each of two."""
    clean, finds = torch.arange(4.0), torch.cat([torch.zeros(6), torch.ones(6)])
    scores = {"clean": clean, "held_out_clean": clean, "pairs": clean[:0], "finds": finds, "held_out_finds": finds}
    prompts = {"finds": torch.arange(6), "held_out_finds": torch.tensor([0, 0, 0, 1, 1, 1])}
    found = hardening.measured(scores, scores, 1.0, prompts)
    assert found["trained_success/before"] == found["success/before"] == 1.0
    lows = [found["trained_success/before_low"], found["success/before_low"]]
    assert lows == pytest.approx([wilson_interval(6, 6)[0], wilson_interval(2, 2)[0]])


def test_a_failed_and_a_harmful_cure_are_warned_of() -> None:
    base = {
        **{f"{kind}/{when}_{end}": value for kind in ("success", "trained_success") for when in ("before", "after")
           for end, value in (("low", 0.25), ("high", 0.96875))},
        "spread": 2.0, "success/finds": 4.0, "trained_success/finds": 8.0, "success/before": 1.0,
        "success/after": 0.75, "trained_success/before": 1.0, "trained_success/after": 0.5, "margin/before": -1.0,
        "margin/after": 0.25, "drift/responses": 5.0, "drift/mean_absolute": 0.125, "drift/correlation": 0.99,
    }  # fmt: skip
    text = "\n".join(command.lines(base))
    assert re.search(r"held out +4 of 4 \[0\.25, 0\.97\] +3 of 4 \[0\.25, 0\.97\]\n", text)
    assert re.search(r"answer +-1.00 +\+0.25\n", text)
    assert "warning: more than half of the held-out finds still win" in text and "scores moved much" not in text
    text = "\n".join(command.lines({**base, "success/after": 0.25, "drift/mean_absolute": 0.75}))
    assert "still win" not in text and "warning: clean scores moved much" in text
