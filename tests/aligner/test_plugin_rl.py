"""Our actor and reward client under NeMo-Aligner's own RL trainers, by the example scripts."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convert_jobs
import plugin
import pytest
import torch

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.objectives.adversarial import apply_length_penalty, paper_reward
from nemo_advrm.objectives.sft_statistics import z_scores

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = 3
UNENDED = -6.0  # of conf/adversarial_actor_*.yaml


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
        "sft_statistics.samples_per_prompt=3",
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
    reference = SFTScores.read(out / "reference.jsonl")
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


def check_trained(files: plugin.Files, out: Path) -> list[float]:
    """The weights that were saved are others than before; the log-probabilities they give ``plugin.ROW``."""
    path = converted(saved(out))
    logits_SV = convert_jobs.logits(str(path), torch.tensor([plugin.ROW]))[0]
    now = logits_SV.log_softmax(-1)[:-1].gather(1, torch.tensor(plugin.ROW)[1:, None])[:, 0]
    assert torch.isfinite(now).all() and (now - torch.tensor(files.log_probs[0])).abs().max() > 1e-4
    return now.tolist()


def converted(nemo: Path) -> Path:
    """A .nemo, read by this package."""
    out = nemo.with_suffix("")
    convert(ConvertConfig(from_="nemo", path=str(nemo), to="megatron", out=str(out)), report=lambda line: None)
    return out


@pytest.mark.parametrize(("tensor", "pipeline", "penalty"), [(1, 1, UNENDED), (2, 1, None), (1, 2, None)])
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
    here = check_trained(files, tmp_path / "run")
    if (tensor, pipeline) == (1, 1):  # it opens in NeMo-Aligner's own class, and computes the same there
        (there,) = aligner(("log_probs", {"path": str(saved(tmp_path / "run")), "rows": [plugin.ROW]}))
        torch.testing.assert_close(torch.tensor(here), torch.tensor(there[0]), **TOLERANCE)
        select_pairs_of(tmp_path / "run")


@pytest.mark.parametrize(("actor", "critic"), [((1, 1), (1, 1)), ((2, 1), (1, 2))], ids=["one", "tp2_and_pp2"])
def test_ppo_attacks_the_ensemble(
    single: Runtime,
    files: plugin.Files,
    members: list[str],
    tmp_path: Path,
    actor: tuple[int, int],
    critic: tuple[int, int],
) -> None:
    layout = zip(("tensor", "pipeline"), critic, strict=True)
    sizes = [f"++model.{name}_model_parallel_size={size}" for name, size in layout]
    with plugin.critic(
        tmp_path / "critic",
        files.reward_models[0],
        *sizes,
        f"exp_manager.checkpoint_callback_params.model_parallel_size={critic[0] * critic[1]}",
        processes=critic[0] * critic[1],
    ) as server:
        batches = plugin.run_script(
            plugin.EXAMPLES / "train_adversarial_actor_ppo.py",
            tmp_path,
            *settings(files, members, "ppo", *actor),
            f"remote_critic_rm.critic.port={server.port}",
            processes=actor[0] * actor[1],
        )
        trained = server.values(batches[0]["response_tokens"])
    check_attack(files, tmp_path / "run", batches)
    check_trained(files, tmp_path / "run")
    check_critic(files, converted(saved(tmp_path / "critic" / "run")), batches[0], trained)


def check_critic(files: plugin.Files, now: Path, batch: dict[str, Any], served: list[list[float]]) -> None:
    """The values of the first step are those of the reward model from which the critic started; the critic that was
    saved gives the values that its server gave after the training, and they are others."""
    sequences = plugin.trained_sequences([batch])
    saved_values = convert_jobs.values(str(now), batch["response_tokens"])
    for row, found, there, here in zip(sequences, batch["values"], served, saved_values, strict=True):
        before = convert_jobs.scores(str(files.checkpoints[0]), [row[:end] for end in range(1, len(row))])
        torch.testing.assert_close(torch.tensor(found[: len(row) - 1]), before, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(there), torch.tensor(here), **TOLERANCE)
        assert (torch.tensor(there[: len(row) - 1]) - before).abs().max() > 1e-2


def test_a_critic_that_dies_ends_the_training_with_its_name(
    files: plugin.Files, members: list[str], tmp_path: Path
) -> None:
    with plugin.critic(tmp_path / "critic", files.reward_models[0]) as server:
        batches, over = tmp_path / "batches.jsonl", threading.Event()

        def kill() -> None:
            while not over.wait(0.1):
                if batches.exists():
                    os.killpg(server.process.pid, signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            plugin.run_script(
                plugin.EXAMPLES / "train_adversarial_actor_ppo.py",
                tmp_path,
                *settings(files, members, "ppo"),
                f"remote_critic_rm.critic.port={server.port}",
                fails=True,
            )
        finally:
            over.set()
            killer.join()
    assert f"RewardSourceError: the critic at localhost:{server.port} failed" in (tmp_path / "log").read_text()


def select_pairs_of(out: Path) -> None:
    """``nemo-advrm select`` reads what the actor recorded."""
    from nemo_advrm.attacks import pair_selection

    cfg = load_config([f"run_dir={out}", "selection.threshold_z=-100"])
    counts = pair_selection.select_round(cfg, out, 0, 0)
    assert counts["selected"] == len(PairStore(out / "pairs.jsonl").load())
