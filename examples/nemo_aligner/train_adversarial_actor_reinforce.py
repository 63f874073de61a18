"""Attacks an ensemble of reward models with NeMo-Aligner's REINFORCE.

This is NeMo-Aligner's train_gpt_reinforce_actor.py with our actor and client.
"""

import torch.multiprocessing as mp
from actor import ensemble_client, prepare
from nemo.core.config import hydra_runner
from nemo_aligner.algorithms.reinforce import ReinforceTrainer
from omegaconf import DictConfig

mp.set_start_method("spawn", force=True)


@hydra_runner(config_path="conf", config_name="adversarial_actor_reinforce")
def main(cfg: DictConfig) -> None:
    setup = prepare(cfg, "reinforce")
    rm = ensemble_client(cfg, setup, "reinforce")
    trainer = ReinforceTrainer(rm=rm, **setup.arguments)
    if setup.state is not None:
        trainer.load_state_dict(setup.state)
    try:
        trainer.fit()
    finally:  # otherwise its threads block exit after an error
        rm.communicator.close()


if __name__ == "__main__":
    main()
