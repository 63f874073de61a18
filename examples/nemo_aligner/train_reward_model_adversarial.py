"""Trains a reward model on preference and adversarial pairs with NeMo-Aligner's SupervisedTrainer.

This is NeMo-Aligner's train_reward_model.py with our data loader and, if model.fp8=True, our model class.
"""

from pathlib import Path

import torch.multiprocessing as mp
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import build_dataloader, build_train_valid_test_rm_datasets
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
from nemo_aligner.utils.distributed import Timer
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
from omegaconf import DictConfig, OmegaConf

from nemo_advrm.data.messages import plain_text
from nemo_advrm.data.nemo_aligner_rows import as_transcript
from nemo_advrm.integrations.nemo_aligner import AdversarialAugmentation, MegatronGPTFP8RewardModel

mp.set_start_method("spawn", force=True)
RENDERS = {"transcript": as_transcript, "plain": plain_text}


@hydra_runner(config_path="conf", config_name="reward_model_adversarial")
def main(cfg: DictConfig) -> None:
    cfg.model = load_and_override_model_config(cfg.pretrained_checkpoint.restore_from_path, cfg.model)
    trainer = resolve_and_create_trainer(cfg, "rm")
    exp_manager(trainer, cfg.exp_manager)
    logger = CustomLoggerWrapper(trainer.loggers)
    model = load_from_nemo(
        MegatronGPTFP8RewardModel if cfg.model.get("fp8", False) else MegatronGPTRewardModel,
        cfg.model,
        trainer,
        strict=True,
        load_base_model_only=not cfg.load_rm_head_weights,
        restore_path=cfg.pretrained_checkpoint.restore_from_path,
    )
    state = None if trainer.ckpt_path is None else retrieve_custom_trainer_state_dict(trainer)
    init_distributed(trainer, model, cfg.model.get("transformer_engine", False))

    data = cfg.model.data
    train, validation, _ = build_train_valid_test_rm_datasets(
        cfg=cfg.model,
        data_prefix=data.data_prefix,
        data_impl=data.data_impl,
        splits_string=data.splits_string,
        train_valid_test_num_samples=[-cfg.model.global_batch_size] * 3,
        seq_length=data.seq_length,
        seed=cfg.model.seed,
        tokenizer=model.tokenizer,
    )
    size = {"mbs": cfg.model.micro_batch_size, "gbs": cfg.model.global_batch_size, "load_gbs": True}
    consumed = state["consumed_samples"] if state else 0
    train_dataloader = build_dataloader(cfg=cfg, dataset=train, consumed_samples=consumed, **size)
    val_dataloader = build_dataloader(cfg=cfg, dataset=validation, consumed_samples=0, use_random_sampler=False, **size)
    init_using_ptl(trainer, model, train_dataloader, train)
    augmented = AdversarialAugmentation(
        train_dataloader,
        cfg.augmentation.pairs_path,
        cfg.augmentation.ratio,
        seed=cfg.model.seed,
        render=RENDERS[cfg.augmentation.render],
        snapshot=Path(cfg.exp_manager.explicit_log_dir) / "adversarial_pairs.jsonl",
    )
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    logger.log_hyperparams(OmegaConf.to_container(cfg))
    rm_trainer = SupervisedTrainer(
        cfg=cfg.trainer.rm,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=augmented,
        val_dataloader=val_dataloader,
        test_dataloader=None,
        logger=logger,
        ckpt_callback=add_custom_checkpoint_callback(trainer, model),
        run_timer=Timer(cfg.exp_manager.get("max_time_per_run")),
    )
    if state is not None:
        rm_trainer.load_state_dict(state)
    rm_trainer.fit()


if __name__ == "__main__":
    main()
