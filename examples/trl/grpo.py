"""Trains a policy with TRL's GRPO on the rewards of a running ``nemo-advrm serve``.

    python examples/trl/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --prompts PROMPTS.jsonl \\
        --server http://127.0.0.1:8000 --out runs/grpo

``prompt`` in each row of PROMPTS.jsonl is a text or a list of chat messages.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from nemo_advrm.rewards.remote import trl_reward


def main(model: str, prompts: str, server: str, out: str, steps: int, max_completion_length: int) -> None:
    on_gpu = torch.cuda.is_available()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False),
        processing_class=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
        reward_funcs=trl_reward(server),
        train_dataset=load_dataset("json", data_files=prompts, split="train"),
        args=GRPOConfig(
            output_dir=out,
            max_steps=steps,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            per_device_train_batch_size=8,
            num_generations=4,  # responses per prompt, whose rewards are compared
            max_completion_length=max_completion_length,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--model", "--prompts", "--server", "--out"):
        parser.add_argument(option, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-completion-length", type=int, default=256)
    main(**vars(parser.parse_args()))
