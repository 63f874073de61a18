"""Shared setup of the two actor scripts, in the order of NeMo-Aligner's train_gpt_{reinforce,ppo}_actor.py.

Additions to NeMo-Aligner's scripts use nemo_advrm.integrations.nemo_aligner.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.data.nlp.builders import (
    build_dataloader,
    build_train_valid_test_rlhf_datasets,
    collate_with_pad_to_max_batch,
)
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo, retrieve_model_state_dict_in_cpu
from omegaconf import DictConfig, OmegaConf

from nemo_advrm.config.moved import moved_key
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.integrations.nemo_aligner import EnsembleRewardClient, MegatronGPTAdversarialActorModel
from nemo_advrm.integrations.nemo_aligner.members import build_reward, open_members, read_sft_scores
from nemo_advrm.integrations.nemo_aligner.rollout_reader import RolloutReader
from nemo_advrm.integrations.nemo_aligner.sft_scores import prompt_texts, write_sft_scores


@dataclass
class Setup:
    """An actor that is ready to train, and the ``arguments`` common to both of NeMo-Aligner's RL trainers."""

    actor: Any
    arguments: dict[str, Any]
    datasets: list[Any]
    state: dict[str, Any] | None

    @property
    def step(self) -> int:
        """Number of steps completed by earlier jobs of this run."""
        return int(self.state["step"]) if self.state else 0


def prepare(cfg: DictConfig, kind: str) -> Setup:
    """Load the actor, its data and its optimizer; ``kind`` is reinforce or ppo."""
    cfg.model = load_and_override_model_config(cfg.pretrained_checkpoint.restore_from_path, cfg.model)
    trainer = resolve_and_create_trainer(cfg, kind)
    exp_manager(trainer, cfg.exp_manager)
    logger = CustomLoggerWrapper(trainer.loggers)
    own = cfg.model[kind]
    actor = load_from_nemo(
        MegatronGPTAdversarialActorModel,
        cfg.model,
        trainer,
        strict=True,
        restore_path=cfg.pretrained_checkpoint.restore_from_path,
    )
    init_peft(actor, cfg.model)
    actor.init_policy_state_dict = None
    if cfg.trainer[kind].initial_policy_kl_penalty > 0 and cfg.model.peft.peft_scheme == "none":
        actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
            actor, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False)
        )
    state = None if trainer.ckpt_path is None else retrieve_custom_trainer_state_dict(trainer)
    init_distributed(trainer, actor, cfg.model.get("transformer_engine", False))

    data = cfg.model.data
    train, validation, _ = build_train_valid_test_rlhf_datasets(
        cfg=cfg.model,
        data_prefix=data.data_prefix,
        data_impl=data.data_impl,
        splits_string=data.splits_string,
        train_valid_test_num_samples=[-1, -1, -1],
        seq_length=data.seq_length,
        seed=cfg.model.seed,
        tokenizer=actor.tokenizer,
    )
    collate = collate_with_pad_to_max_batch(
        own.length_params.max_length, actor.tokenizer.eos_id, cfg, generate_masks_and_position_ids=False
    )
    builder = partial(build_dataloader, cfg=cfg, collate_fn=collate, load_gbs=False)
    # Lightning needs a loader to count optimizer steps; the trainers read prompts from the builders
    size = cfg.model.global_batch_size // parallel_state.get_data_parallel_world_size()
    init_using_ptl(trainer, actor, torch.utils.data.DataLoader(train, batch_size=size), train)
    del actor._train_dl
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(actor)
    logger.log_hyperparams(OmegaConf.to_container(cfg))
    arguments = {
        "cfg": cfg.trainer[kind],
        "model": actor,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "train_dataloader_builder": partial(
            builder, dataset=train, mbs=own.rollout_micro_batch_size, gbs=own.num_rollout_samples
        ),
        "val_dataloader_builder": partial(
            builder,
            dataset=validation,
            mbs=own.val_rollout_micro_batch_size,
            gbs=own.num_val_samples,
            use_random_sampler=False,
        ),
        "collate_fn": collate,
        "batch_iterator_cls": get_batch_iterator_cls(cfg.trainer[kind].get("batch_iterator", {})),
        "logger": logger,
        "ckpt_callback": add_custom_checkpoint_callback(trainer, actor),
        "run_timer": Timer(cfg.exp_manager.get("max_time_per_run")),
    }
    return Setup(actor, arguments, [train, validation], state)


def ensemble_client(cfg: DictConfig, setup: Setup, kind: str, critic: Any = None) -> EnsembleRewardClient:
    """Build the reward client of the ensemble; sample and score SFT responses if their file does not exist.

    The adversarial reward is relative to these scores; several members of an ensemble are standardised by them.
    """
    if told := " and ".join(filter(None, (moved_key(str(key)) for key in cfg))):
        raise ConfigError(told)
    actor = setup.actor
    members = open_members(cfg.ensemble, actor.tokenizer.eos_id)
    reference = None
    adversarial = cfg.ensemble.reward == "adversarial"
    if adversarial or (len(members) > 1 and cfg.ensemble.get("standardise", True)):
        path = Path(cfg.ensemble.reference_path)
        if not run_on_rank_zero(path.exists):
            rows = cfg.model[kind].rollout_micro_batch_size
            texts = prompt_texts(*setup.datasets)
            write_sft_scores(path, actor, texts, members, cfg.sft_statistics.samples_per_prompt, rows)
        reference = read_sft_scores(cfg.ensemble, members)
    client = EnsembleRewardClient(
        build_reward(cfg.ensemble, members, reference),
        RolloutReader(actor.tokenizer, reference.prompts_P if adversarial and reference is not None else None),
        unended_penalty=cfg.unended_penalty,
        critic=critic,
        threads=4,
    )
    if adversarial:
        # in the directory of reference.jsonl, where `nemo-advrm select run_dir=...` expects both
        actor.record(client, Path(cfg.ensemble.reference_path).parent, cfg.exp_manager.name, setup.step)
    return client
