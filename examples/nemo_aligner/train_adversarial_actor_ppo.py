"""Attacks an ensemble of reward models with NeMo-Aligner's PPO.

This is NeMo-Aligner's train_gpt_ppo_actor.py with our actor and client. Its unchanged serve_ppo_critic.py computes the
values.
"""

import torch.multiprocessing as mp
from actor import ensemble_client, prepare
from nemo.core.config import hydra_runner
from nemo_aligner.algorithms.ppo import PPOTrainer
from omegaconf import DictConfig

from nemo_advrm.integrations.nemo_aligner import CriticClient

mp.set_start_method("spawn", force=True)


@hydra_runner(config_path="conf", config_name="adversarial_actor_ppo")
def main(cfg: DictConfig) -> None:
    setup = prepare(cfg, "ppo")
    rm_critic = ensemble_client(cfg, setup, "ppo", CriticClient(cfg.remote_critic_rm))
    trainer = PPOTrainer(rm_critic=rm_critic, **setup.arguments)
    if setup.state is not None:
        trainer.load_state_dict(setup.state)
    try:
        trainer.fit()
    finally:  # otherwise its threads block exit after an error
        rm_critic.communicator.close()


if __name__ == "__main__":
    main()
