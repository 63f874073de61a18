"""A tiny Hugging Face policy of an architecture that has no conversion table."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_tokenizers import CHATML, save_hf

_EOS = 2


def save_policy(directory: Path) -> Path:
    """A GPT-NeoX with a byte-level tokenizer and a chat template, which writes printable letters and soon ends."""
    import transformers

    save_hf(directory, template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
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
        eos_token_id=_EOS,
    )
    model = transformers.GPTNeoXForCausalLM(config)
    with torch.no_grad():  # the first hidden unit is always 1, so that its weights are a bias of each token
        model.gpt_neox.final_layer_norm.weight[0], model.gpt_neox.final_layer_norm.bias[0] = 0.0, 1.0
        texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        bias = [0.0 if text.isascii() and text.isprintable() else -40.0 for text in texts]
        bias[_EOS] = 5.0
        model.get_output_embeddings().weight[: len(bias), 0] = torch.tensor(bias)
    model.generation_config.temperature = 0.01  # of the directory, and not of the job
    model.generation_config.do_sample = True
    model.save_pretrained(directory)
    return directory
