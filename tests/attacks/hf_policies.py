"""A tiny Hugging Face policy of an architecture that has no conversion table."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_tokenizers import CHATML, save_hf


def save_policy(directory: Path) -> Path:
    """A GPT-NeoX with a byte-level tokenizer and a chat template."""
    import transformers

    save_hf(directory, template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = transformers.GPTNeoXForCausalLM(config)
    model.generation_config.temperature = 0.01  # of the directory, and not of the job
    model.generation_config.do_sample = True
    model.save_pretrained(directory)
    return directory
