"""Checkpoints: exact, complete or absent, loadable at any layout, and refused with the reason when they do not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_jobs
import pytest
import torch
from distributed import Worlds
from tiny import VOCABULARY, optimizer_state, tiny_config

from nemo_advrm import files
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError

pytestmark = pytest.mark.platform


def _build(head: str = "reward", seed: int = 1, **model: Any) -> MegatronModel:
    cfg = tiny_config("gpt", **model)
    return build_model(cfg.model, cfg.precision, head, VOCABULARY, seed=seed, trainable=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model after two steps, with its optimizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "two_steps"
    checkpoint_jobs.train_and_save(str(path), 2)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_model_and_its_optimizer_come_back_bit_for_bit(saved: Path) -> None:
    first, second = checkpoint_jobs.reward_model(), checkpoint_jobs.reward_model(seed=9)
    checkpoint_jobs.train(first, 0, 2)
    checkpoint.load(saved, second.model, second.optimizer)
    mine, theirs = checkpoint_jobs.weights(first), checkpoint_jobs.weights(second)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    states = optimizer_state(first.optimizer), optimizer_state(second.optimizer)
    assert len(states[0]) == len(states[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    # and the next step is the same step
    second.seed = 0
    assert checkpoint_jobs.train(first, 2, 3) == checkpoint_jobs.train(second, 2, 3)
    mine, theirs = checkpoint_jobs.weights(first), checkpoint_jobs.weights(second)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(2, 2)], ids=["tp2", "pp2", "tp2_pp2"])
def test_training_continues_at_another_layout_as_it_would_have_on_one_process(
    worlds: Worlds, saved: Path, tmp_path: Path, layout: Layout
) -> None:
    there = str(tmp_path / "there")
    alone = checkpoint_jobs.load_and_continue(str(saved), 2, 5, str(tmp_path / "alone"))
    job = ("checkpoint_jobs", "load_and_continue")
    metrics = worlds.run(layout, *job, path=str(saved), first=2, last=4, out=there)[0]
    # the last step on one process again: the optimizer's state survived both ways
    metrics += checkpoint_jobs.load_and_continue(there, 4, 5, str(tmp_path / "back"))
    for step, expected in enumerate(alone):
        for key in ("train/loss", "grad_norm"):
            assert metrics[step][key] == pytest.approx(expected[key], rel=1e-4), (step, key)


def test_training_goes_over_three_layouts_and_other_microbatches_with_the_losses_of_the_unbroken_run(
    worlds: Worlds, saved: Path, tmp_path: Path
) -> None:
    unbroken = checkpoint_jobs.load_and_continue(str(saved), 2, 8, str(tmp_path / "unbroken"))
    metrics: list[dict[str, float]] = []
    path, at = saved, 2
    for layout, rows in ((Layout(tensor=2), 3), (Layout(pipeline=2), 1), (Layout(), 2)):  # the last is DP 2
        out = tmp_path / f"from_{at}"
        job = {"path": str(path), "first": at, "last": at + 2, "out": str(out), "micro_batch_size": rows}
        metrics += worlds.run(layout, "checkpoint_jobs", "load_and_continue", world_size=2, **job)[0]
        path, at = out, at + 2
    for step, (mine, expected) in enumerate(zip(metrics, unbroken, strict=True)):
        for key in ("train/loss", "grad_norm"):
            assert mine[key] == pytest.approx(expected[key], rel=1e-4), (step, key)


def test_an_optimizer_that_made_no_step_is_saved_and_starts_afresh(saved: Path, tmp_path: Path) -> None:
    module = checkpoint_jobs.reward_model()
    checkpoint.save(tmp_path / "fresh", module.model, module.optimizer)
    expected = checkpoint_jobs.train(module, 0, 2)
    used = checkpoint_jobs.reward_model(seed=4)
    used.seed = 0
    checkpoint_jobs.train(used, 0, 1)
    checkpoint.load(tmp_path / "fresh", used.model, used.optimizer)
    assert not used.optimizer.started
    assert checkpoint_jobs.train(used, 0, 2) == expected


def test_an_older_checkpoint_is_replaced_and_leftovers_of_a_killed_save_do_no_harm(saved: Path, copy: Path) -> None:
    leftover = copy.with_name("copy.partial")
    (leftover / "weights").mkdir(parents=True)
    (leftover / "weights" / "__0_0.distcp").write_bytes(b"half of a file")
    model = _build()
    checkpoint.load(copy, model)  # ignored when reading
    checkpoint.save(copy, model)  # and cleared away when writing
    assert not checkpoint.read_meta(copy)["has_optimizer"]
    assert sorted(p.name for p in copy.parent.iterdir()) == ["copy"]


def _kill_in_child(work: Callable[[], None], before: int) -> bool:
    """Do ``work`` in a child that dies by SIGKILL before its ``before``-th renaming or removal; whether it did."""
    child = os.fork()
    if child == 0:
        left = [before]

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **kwargs)

            return wrapped

        Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
        shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_kill_at_any_moment_of_a_replacement_leaves_the_old_or_the_new_checkpoint(
    single: Runtime, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "old", _build(), meta={"which": "old"})
    checkpoint.save(tmp_path / "new", _build(), meta={"which": "new"})
    found = []
    for moment in range(20):
        home = tmp_path / f"killed_{moment}"
        path, partial = home / "model", home / "model.partial"
        shutil.copytree(tmp_path / "old", path)
        shutil.copytree(tmp_path / "new", partial)
        killed = _kill_in_child(lambda path=path, partial=partial: files.atomic_replace(partial, path), moment)
        found.append(checkpoint.load(path, _build())["which"])
        checkpoint.save(path, _build(), meta={"which": "next"})  # and what was left is in nobody's way
        assert checkpoint.load(path, _build())["which"] == "next"
        assert [p.name for p in home.iterdir()] == ["model"]
        if not killed:
            break
    changed = found.index("new")
    assert changed >= 2 and len(found) > changed + 2
    assert found == ["old"] * changed + ["new"] * (len(found) - changed)


def test_a_missing_checkpoint_is_named(single: Runtime, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere", _build())


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 1}'])
def test_a_checkpoint_without_a_readable_description_is_refused(copy: Path, content: str | None) -> None:
    (copy / "meta.json").unlink()
    if content is not None:
        (copy / "meta.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"copy: not a (complete )?checkpoint"):
        checkpoint.load(copy, _build())


def test_a_checkpoint_of_a_newer_version_is_refused(copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(CheckpointError, match="newer version"):
        checkpoint.load(copy, _build())


@pytest.mark.parametrize("damage", ["truncated", "missing", "no_weights"])
def test_a_damaged_weight_file_is_refused_by_the_name_of_the_checkpoint(copy: Path, damage: str) -> None:
    files = sorted((copy / "weights").glob("*.distcp"))
    assert files
    if damage == "no_weights":
        shutil.rmtree(copy / "weights")
    for file in files if damage != "no_weights" else []:
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="copy: could not be read"):
        checkpoint.load(copy, _build())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 2),
        ("ffn_hidden_size", 64),
        ("num_query_groups", 2),
        ("normalization", "RMSNorm"),
        ("query_scale", 20.0),
    ],
)
def test_another_architecture_is_refused_by_key_and_both_values(saved: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.{key} is .* in the checkpoint and {value!r} in the conf"):
        checkpoint.load(saved, _build(**{key: value}))


@pytest.mark.parametrize(
    "same",
    [
        {"ffn_hidden_size": 128, "num_query_groups": 4, "kv_channels": 8, "query_scale": 8.0, "qkv_bias": True},
        {"rotary_base": 5e5, "rope_scaling_factor": 2.0, "sliding_window_every": 2},  # without effect here
        {"share_embeddings_and_output_weights": True, "logit_softcap": 5.0},  # of a head it has not
    ],
)
def test_the_same_architecture_in_other_words_is_the_same(saved: Path, same: dict[str, Any]) -> None:
    checkpoint.load(saved, _build(**same))


def test_keys_that_an_older_checkpoint_lacks_count_as_their_defaults(copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    for key in ("post_norms", "attention_softcap", "sliding_window", "embedding_scale", "head_bias"):
        del meta["model"][key]
    (copy / "meta.json").write_text(json.dumps(meta))
    checkpoint.load(copy, _build())
    for key, value in (("post_norms", True), ("attention_softcap", 50.0), ("sliding_window", 8), ("head_bias", True)):
        with pytest.raises(CheckpointError, match=rf"model\.{key} is (False|0\.0|0) .* and {value!r} in the conf"):
            checkpoint.load(copy, _build(**{key: value}))


def test_a_new_head_may_have_a_bias_that_the_language_model_had_no_use_for(single: Runtime, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "lm", _build("lm"))
    reward = _build(head_bias=True)
    checkpoint.load(tmp_path / "lm", reward, new_head=True)
    checkpoint.save(tmp_path / "reward", reward)
    with torch.no_grad():
        reward.parts[0].head.bias.fill_(3)
    checkpoint.load(tmp_path / "reward", reward)
    assert reward.parts[0].head.bias.tolist() == [0]


def test_another_vocabulary_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="vocabulary has 104 entries in the checkpoint and 72"):
        checkpoint.load(saved, _build(vocab_size=70))


def test_another_head_is_refused_unless_a_new_one_is_asked_for(saved: Path) -> None:
    model = _build("lm")
    with pytest.raises(CheckpointError, match="head 'reward', but one with 'lm' is wanted"):
        checkpoint.load(saved, model)
    value = _build("value", seed=4)
    head = value.parts[0].head.weight.clone()
    checkpoint.load(saved, value, new_head=True)
    assert torch.equal(value.parts[0].head.weight, head)
    reward = _build()
    checkpoint.load(saved, reward)
    layer = "decoder.layers.2.mlp.linear_fc1.weight"
    assert torch.equal(value.state_dict()[layer], reward.state_dict()[layer])


def test_a_language_model_gives_its_trunk_to_a_reward_model(single: Runtime, tmp_path: Path) -> None:
    language_model, reward = _build("lm"), _build("reward", seed=8)
    head = reward.parts[0].head.weight.clone()
    checkpoint.save(tmp_path / "lm", language_model)
    checkpoint.load(tmp_path / "lm", reward, new_head=True)
    trunk = {k: v for k, v in reward.state_dict().items() if torch.is_tensor(v) and k != "head.weight"}
    assert len(trunk) > 20 and all(torch.equal(v, language_model.state_dict()[k]) for k, v in trunk.items())
    assert torch.equal(reward.parts[0].head.weight, head)


def test_training_does_not_continue_from_a_checkpoint_without_an_optimizer(single: Runtime, tmp_path: Path) -> None:
    module = checkpoint_jobs.reward_model()
    checkpoint.save(tmp_path / "weights_only", module.model)
    with pytest.raises(CheckpointError, match="has no optimizer state"):
        checkpoint.load(tmp_path / "weights_only", module.model, module.optimizer)


def test_a_full_disk_is_an_error_and_leaves_the_older_checkpoint_usable(
    worlds: Worlds, copy: Path, saved: Path
) -> None:
    kwargs = {"path": str(copy), "size": 40_000}
    message = worlds.run(Layout(), "checkpoint_jobs", "save_with_files_limited_to", **kwargs)[0]
    assert str(copy) in message and "could not be written" in message
    first, second = _build(), _build(seed=2)
    checkpoint.load(copy, first)
    checkpoint.load(saved, second)
    state = second.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items() if torch.is_tensor(v))


def test_a_rank_that_cannot_write_is_named_and_all_ranks_end(worlds: Worlds, copy: Path) -> None:
    before = checkpoint.read_meta(copy)
    kwargs = {"path": str(copy), "size": 10_000, "rank": 1}
    told = worlds.run(Layout(tensor=2), "checkpoint_jobs", "save_with_one_rank_limited_to", **kwargs)
    assert "rank 1" in told[0] and all(f"{copy}: could not be written" in message for message in told)
    assert checkpoint.load(copy, _build()) == before
    assert not copy.with_name("copy.partial").exists()
