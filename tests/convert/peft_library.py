"""Runs in an environment that has ``peft``: ``python peft_library.py load|make BASE ADAPTER TOKENS LOGITS``.

``load`` opens the adapter of the directory ADAPTER on the Hugging Face model BASE; ``make`` writes one with random
weights there. Both save what the model with the adapter computes of the tokens in the file TOKENS, [B, S, V] or [B, 1].
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def _made(base: Any, adapter: Path) -> Any:
    """One rank for all modules but one: peft's own names, settings and shapes."""
    torch.manual_seed(6)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(adapter)
    return model


def main(action: str, base: Path, adapter: Path, tokens: Path, out: Path) -> None:
    reward = action == "load" and '"SEQ_CLS"' in (adapter / "adapter_config.json").read_text()
    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    options = {"num_labels": 1, "pad_token_id": 0} if reward else {}
    below = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
    model = _made(below, adapter) if action == "make" else PeftModel.from_pretrained(below, adapter)
    with torch.no_grad():
        torch.save(model.eval()(torch.load(tokens)).logits, out)


if __name__ == "__main__":
    action, *paths = sys.argv[1:]
    main(action, *map(Path, paths))
