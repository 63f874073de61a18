"""Our actor and reward client under NeMo-Aligner's own RL trainers, by the example scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convert_jobs
import plugin
import pytest
import torch

from nemo_advrm.config import load_config
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.megatron.runtime import Runtime
from nemo_advrm.objectives.adversarial import apply_length_penalty, paper_reward
from nemo_advrm.objectives.reference import z_scores
from nemo_advrm.rewards.reference import Reference

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = 3
UNENDED = -50.0


@pytest.fixture(scope="module")
def files(aligner: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> plugin.Files:
    return plugin.write_files(aligner, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def members(files: plugin.Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Both reward models behind servers of this package, asked by its own protocol and by KServe's."""
    home = tmp_path_factory.mktemp("servers")
    first, second = (f"ensemble.members=[{path}]" for path in files.checkpoints)
    with plugin.serving(home / "one", first) as one, plugin.serving(home / "two", second) as two:
        yield [f"http://{one}", f"triton+http://{two}/reward_model"]


def settings(files: plugin.Files, members: list[str], kind: str, tensor: int = 1, pipeline: int = 1) -> list[str]:
    data = f"{{train: [{files.prompts}], validation: [{files.prompts}], test: [{files.prompts}]}}"
    return [
        f"pretrained_checkpoint.restore_from_path={files.actor}",
        f"ensemble.members=[{','.join(members)}]",
        "reference.samples_per_prompt=3",
        f"model.data.data_prefix={data}",
        "model.encoder_seq_length=64",
        f"++model.tensor_model_parallel_size={tensor}",
        f"++model.make_vocab_size_divisible_by={8 // tensor}",  # the vocabulary is padded alike at every size
        f"++model.pipeline_model_parallel_size={pipeline}",
        f"exp_manager.checkpoint_callback_params.model_parallel_size={tensor * pipeline}",
        "model.micro_batch_size=1",
        "model.global_batch_size=4",
        f"model.{kind}.rollout_micro_batch_size=2",
        f"model.{kind}.num_rollout_samples={2 if kind == 'reinforce' else 4}",
        f"model.{kind}.num_val_samples=2",
        f"model.{kind}.length_params.max_length=24",
        f"model.{kind}.offload_adam_states=False",
        f"model.{kind}.sampling_params.end_strings=[]",
        f"trainer.{kind}.max_steps={STEPS}",
        f"trainer.{kind}.val_check_interval={STEPS}",
        *(["trainer.reinforce.num_rollouts_per_prompt=4"] if kind == "reinforce" else []),
    ]


def in_process(files: plugin.Files, batches: list[dict[str, Any]]) -> torch.Tensor:
    """[N, 2]: scores of what was trained on, computed here."""
    rows = plugin.trained_sequences(batches)
    return torch.stack([convert_jobs.scores(str(path), rows) for path in files.checkpoints], -1)


def check_attack(
    files: plugin.Files, out: Path, batches: list[dict[str, Any]], penalty: float | None = UNENDED
) -> None:
    """What the trainer was rewarded with, what was recorded, and that selection can use it."""
    assert len(batches) == STEPS
    found = torch.tensor([reward for batch in batches for reward in torch.tensor(batch["rewards"]).flatten().tolist()])
    ended = torch.tensor([end for batch in batches for end in batch["is_end"]])
    scores_NK = in_process(files, batches)
    reference = Reference.read(out / "reference.jsonl")
    samples = [json.loads(line) for line in (out / "attack" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == len(found) and {row["step"] for row in samples} == set(range(STEPS))
    recorded = torch.tensor([row["scores"] for row in samples])
    # the trainer may have shuffled a step's responses over the replicas
    places = [int((recorded - scores).abs().sum(-1).argmin()) for scores in scores_NK]
    torch.testing.assert_close(recorded[places], scores_NK, **TOLERANCE)
    prompts = [samples[place]["prompt_id"] for place in places]
    mean_NK = reference.prompt_mean(prompts)
    z_NK = z_scores(scores_NK, mean_NK, reference.statistics().std_K)
    wanted = paper_reward(scores_NK, z_NK, mean_NK, 1.5, -4.0)
    if penalty is not None:
        wanted = apply_length_penalty(wanted, ended, penalty)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert {row["prompt"] for row in samples} <= set(plugin.PROMPTS)


def saved(out: Path) -> Path:
    (path,) = (out / "checkpoints").glob("*.nemo")
    return path


def check_trained(aligner: Callable[..., list[Any]], files: plugin.Files, out: Path) -> None:
    """The file that was saved opens in NeMo-Aligner's own class, and its weights are others."""
    (after,) = aligner(("log_probs", {"path": str(saved(out)), "rows": [[5, 6, 7, 8, 9, 20]]}))
    before, now = torch.tensor(files.log_probs), torch.tensor(after)
    assert torch.isfinite(now).all() and (now - before).abs().max() > 1e-4


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("tensor", "pipeline", "penalty"), [(1, 1, UNENDED), (2, 1, None)])
def test_reinforce_attacks_the_ensemble(
    aligner: Callable[..., list[Any]],
    single: Runtime,
    files: plugin.Files,
    members: list[str],
    tmp_path: Path,
    tensor: int,
    pipeline: int,
    penalty: float | None,
) -> None:
    script = plugin.EXAMPLES / "train_adversarial_actor_reinforce.py"
    overrides = settings(files, members, "reinforce", tensor, pipeline)
    overrides.append(f"unended_penalty={'null' if penalty is None else penalty}")
    batches = plugin.run_script(script, tmp_path, *overrides, processes=tensor * pipeline)
    check_attack(files, tmp_path / "run", batches, penalty)
    check_trained(aligner, files, tmp_path / "run")
    select_pairs_of(tmp_path / "run")


def select_pairs_of(out: Path) -> None:
    """``nemo-advrm select`` reads what the actor recorded."""
    from nemo_advrm.stages import select

    cfg = load_config([f"run_dir={out}", "selection.threshold_z=-100"])
    counts = select.select_round(cfg, out, 0, 0)
    assert counts["selected"] == len(PairStore(out / "pairs.jsonl").load())
