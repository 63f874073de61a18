"""NeMo-Aligner's critic server in the order of calls of its serve_ppo_critic.py, which its wheel does not carry."""

from functools import partial

from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.algorithms.critic_server_trainer import CriticServerTrainer
from nemo_aligner.models.nlp.gpt.megatron_gpt_critic import MegatronGPTCriticModel
from nemo_aligner.utils.text_generation_utils import tokenize_batch
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
    resolve_and_create_trainer,
)
from nemo_aligner.utils.utils import copy_model_states_to_cpu, load_and_override_model_config, load_from_nemo
from omegaconf import DictConfig


@hydra_runner(config_path="conf", config_name="critic")
def main(cfg: DictConfig) -> None:
    path = cfg.pretrained_checkpoint.restore_from_path
    cfg.model = load_and_override_model_config(path, cfg.model)
    trainer = resolve_and_create_trainer(cfg, "ppo")
    exp_manager(trainer, cfg.exp_manager)
    critic = load_from_nemo(MegatronGPTCriticModel, cfg.model, trainer, strict=True, restore_path=path)
    critic.rm_state_dict_cpu = copy_model_states_to_cpu(
        critic, cpu_dict=None, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False), sync=True
    )
    init_distributed(trainer, critic, cfg.model.get("transformer_engine", False))
    init_using_ptl(trainer, critic, None, None)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(critic)
    CriticServerTrainer(
        cfg=cfg.trainer.ppo,
        model=critic,
        optimizer=optimizer,
        scheduler=scheduler,
        logger=CustomLoggerWrapper(trainer.loggers),
        ckpt_callback=add_custom_checkpoint_callback(trainer, critic),
        tokenize_func=partial(
            tokenize_batch,
            tokenizer=critic.tokenizer,
            max_len=critic.cfg.encoder_seq_length,
            add_BOS=False,
            add_EOS=False,
        ),
        gbs=cfg.model.global_batch_size,
        model_forward_micro_batch_size=cfg.model.get("forward_micro_batch_size", cfg.model.micro_batch_size),
    ).run_server()


if __name__ == "__main__":
    main()
