"""NeMo-Aligner's own training with what this package serves and writes, and our attack on what NeMo-Aligner serves."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convert_jobs
import httpx
import plugin
import pytest
import torch
from ports import free_port

from nemo_advrm import cli
from nemo_advrm.config.schema import Config, ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.integrations.nemo_aligner.rollout_reader import FINGERPRINT, as_prompt
from nemo_advrm.objectives.adversarial import paper_reward
from nemo_advrm.objectives.sft_statistics import z_scores
from nemo_advrm.rewards.sources import build, parse
from nemo_advrm.rollouts.types import Rollouts

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = 3


@pytest.fixture(scope="module")
def reference(files: plugin.Files, single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the members say of three answers to each prompt, as the plug-in's actor scripts write it."""
    draw, tokenizer = random.Random(2), build_tokenizer(f"hf:{files.checkpoints[0] / 'tokenizer'}")
    answers = [(i, " ".join(draw.choices(plugin.WORDS, k=5))) for i in range(len(plugin.PROMPTS)) for _ in range(3)]
    tokens = [tokenizer.encode(plugin.PROMPTS[i]) + tokenizer.encode(answer) for i, answer in answers]
    scores = zip(*(convert_jobs.scores(str(path), tokens).tolist() for path in files.checkpoints), strict=True)
    rows = [
        {"prompt_id": i, "messages": list(as_prompt(plugin.PROMPTS[i])), "response": answer, "scores": list(both)}
        for (i, answer), both in zip(answers, scores, strict=True)
    ]
    path = tmp_path_factory.mktemp("reference") / "reference.jsonl"
    write_jsonl_atomic(path, rows)
    return path


@pytest.fixture(scope="module")
def served(files: plugin.Files, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The adversarial reward of both reward models; the port."""
    home = tmp_path_factory.mktemp("ours")
    with plugin.serving(
        home / "server",
        f"ensemble.members=[{','.join(map(str, files.checkpoints))}]",
        "serve.reward=adversarial",
        f"serve.reference_path={reference}",
    ) as address:
        yield int(address.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def stock_server(files: plugin.Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """NeMo-Aligner's own server of the first reward model; its address."""
    home, port = tmp_path_factory.mktemp("stock"), free_port()
    jobs = [["serve", {"path": str(files.reward_models[0]), "port": port}]]
    (home / "jobs.json").write_text(json.dumps(jobs))
    command = [plugin.python(), str(plugin.HERE / "driver.py"), "jobs.json", "answers.json"]

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/v2/models/reward_model/ready").status_code == 200
        except httpx.TransportError:
            return False

    # Triton's Python must be the one whose library its modules are of; the environments here have the same
    libraries = {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}
    with plugin.background(command, home / "log", ready, **libraries):
        yield f"triton+http://127.0.0.1:{port}/reward_model"


@pytest.fixture(scope="module")
def attack(files: plugin.Files, stock_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our attack on NeMo-Aligner's server, beside the second reward model and the weights that the server has."""
    home = tmp_path_factory.mktemp("attack")
    policy, run = home / "policy", home / "run"
    settings = ConvertConfig(from_="nemo", path=str(files.actor), to="megatron", out=str(policy))
    convert(settings, report=lambda line: None)
    first, second = files.checkpoints
    command = [
        "attack",
        f"hydra.searchpath=[{policy}/conf]",
        "model=imported",
        f"run_dir={run}",
        f"ensemble.members=['{stock_server}?tokenizer=hf:{first}/tokenizer','{second}','{first}']",
        f"pretrained_checkpoint.restore_from_path={policy}",
        f"data.prompts_path={files.prompts}",
        "model.encoder_seq_length=64",
        f"rl.max_steps={STEPS}",
        "rl.prompts_per_step=2",
        "rl.max_new_tokens=10",
        "rl.apply_unended_penalty=false",
        "sft_statistics.samples_per_prompt=3",
        "model.optim.lr=1e-3",
        "trainer.accelerator=cpu",
        "exp_manager.create_tensorboard_logger=false",
    ]
    assert cli.main(command) == 0
    return run


@dataclass
class Trained:
    """What NeMo-Aligner's own training left."""

    batches: list[dict[str, Any]]
    logged: list[float]
    log_probs: list[float]
    losses: list[float]
    gap: float


@pytest.fixture(scope="module")
def trained(
    aligner: Callable[..., list[Any]],
    files: plugin.Files,
    served: int,
    attack: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """REINFORCE with our server, and a reward model on what our attack found."""
    home = tmp_path_factory.mktemp("trained")
    pairs, data = attack / "pairs.jsonl", home / "augmented.jsonl"
    assert cli.main(["select", f"run_dir={attack}", "selection.threshold_z=-100"]) == 0
    assert PairStore(pairs).load()
    original = files.prompts.with_name("pairs.jsonl")
    assert cli.main(["export_pairs", f"pairs={pairs}", f"out={data}", f"with={original}", "template=plain"]) == 0
    texts = [row["text"] for _, row in read_jsonl(data)]
    actor = str(home / "actor.nemo")
    settings = {"base": str(files.actor), "prompts": str(files.prompts), "steps": STEPS, "out": actor, "port": served}
    (run,) = aligner(("reinforce", settings))
    training = {"data": str(data), "out": str(home / "rm.nemo"), "steps": STEPS, "texts": texts}
    rm, log_probs = aligner(  # another process: all models of one have the same size of microbatches
        ("train_rm", {"base": str(files.actor), **training}),
        ("log_probs", {"path": actor, "rows": [plugin.ROW]}),
    )
    chosen, rejected = (torch.tensor(rm["scores"][start::2]) for start in (0, 1))
    return Trained(run["batches"], run["rewards"], log_probs[0], rm["losses"], float((chosen - rejected).mean()))


def test_its_reinforce_is_rewarded_by_our_server(files: plugin.Files, reference: Path, trained: Trained) -> None:
    """RemoteGPTRMClient, MegatronGPTReinforceActorModel and ReinforceTrainer as they are."""
    batches = trained.batches
    assert len(batches) == STEPS
    tokenizer, known = build_tokenizer(f"hf:{files.checkpoints[0] / 'tokenizer'}"), SFTScores.read(reference)
    index = {tuple(tokenizer.encode(prompt)): i for i, prompt in enumerate(plugin.PROMPTS)}
    for batch, logged in zip(batches, trained.logged, strict=True):
        rows = plugin.trained_sequences([batch])
        starts = batch["prompt_lengths"]
        mean_NK = known.prompt_mean([index[tuple(row[:n])] for row, n in zip(rows, starts, strict=True)])
        scores_NK = torch.stack([convert_jobs.scores(str(path), rows) for path in files.checkpoints], -1)
        z_NK = z_scores(scores_NK, mean_NK, known.statistics().std_K)
        wanted = paper_reward(scores_NK, z_NK, mean_NK, 1.5, -4.0)
        torch.testing.assert_close(torch.tensor(batch["rewards"]).flatten(), wanted, **TOLERANCE)
        assert logged == pytest.approx(wanted.mean().item(), abs=1e-4)
    rewards = {round(reward, 3) for batch in batches for reward in torch.tensor(batch["rewards"]).flatten().tolist()}
    assert len(rewards) > STEPS  # not the penalty alone


def test_that_reinforce_moves_the_weights_it_saves(files: plugin.Files, trained: Trained) -> None:
    assert any(end for batch in trained.batches for end in batch["is_end"])  # others are not trained on
    before, now = torch.tensor(files.log_probs[0]), torch.tensor(trained.log_probs)
    assert torch.isfinite(now).all() and (now - before).abs().max() > 1e-4


def test_its_reward_model_learns_from_the_pairs_of_our_attack(trained: Trained) -> None:
    assert len(trained.losses) == STEPS and trained.losses[-1] < trained.losses[0] and trained.gap > 0


def test_our_attack_asks_its_server_as_a_member(attack: Path) -> None:
    rows = [row for _, row in read_jsonl(attack / "attack" / "samples.jsonl")]
    assert {row["step"] for row in rows} == set(range(STEPS))
    scores_NK = torch.tensor([row["scores"] for row in rows])
    # the third member has the weights of the first, and is a checkpoint of this package
    torch.testing.assert_close(scores_NK[:, 0], scores_NK[:, 2], **TOLERANCE)
    assert scores_NK[:, 0].std() > 0.02 and (scores_NK[:, 0] - scores_NK[:, 1]).abs().max() > 0.01


def test_its_server_takes_text_from_us(files: plugin.Files, single: Runtime, stock_server: str) -> None:
    prompts, answers = plugin.PROMPTS[:3], [" a big tree", " ran", " to the small house and no cat"]
    rollouts = Rollouts(
        prompts=[as_prompt(prompt) for prompt in prompts],
        responses=answers,
        ended=[True] * 3,
        prompt_tokens=[[]] * 3,
        response_tokens=[[]] * 3,
        prompt_index=[0] * 3,
        fingerprint=FINGERPRINT,
    )
    found = build(parse(stock_server, "stock"), "stock", Config()).score(rollouts)
    tokenizer = build_tokenizer(f"hf:{files.checkpoints[0] / 'tokenizer'}")
    rows = [tokenizer.encode(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(found, convert_jobs.scores(str(files.checkpoints[0]), rows), **TOLERANCE)
