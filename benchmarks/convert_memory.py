"""Measures the peak memory of converting a random sharded checkpoint of about 2 GB in both directions.

The source is a random Llama in bf16 in shards of 500 MB. Each direction runs as ``nemo-advrm convert`` in a fresh
process. The result is the peak of resident memory, including mapped pages of files, above that after all imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from nemo_advrm.config.schema import ConvertConfig, ModelConfig
from nemo_advrm.convert.architecture_tables import ARCHITECTURES
from nemo_advrm.convert.hf_config import hf_config
from nemo_advrm.convert.safetensors_files import ShardWriter
from nemo_advrm.convert.tensor_names import TensorSpec, canonical_shapes

LIMIT_BYTES = 10**9


def llama(layers: int) -> ModelConfig:
    """Return the shape of Llama 3.2 1B with another number of layers and vocabulary."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=32000,
        rotary_base=500000.0,
        share_embeddings_and_output_weights=False,
    )


def generate(directory: Path, model: ModelConfig, shard_bytes: int) -> int:
    """Write a random checkpoint with an index, one tensor at a time; return its size in bytes."""
    table = ARCHITECTURES[0]
    specs: dict[str, TensorSpec] = {}
    for name, shape in canonical_shapes(model, "lm", model.vocab_size).items():
        found = table.parts(name, shape, model)
        assert found is not None
        specs |= {theirs: TensorSpec(part, torch.bfloat16) for theirs, part in found[1].items()}
    writer = ShardWriter(specs, shard_bytes)
    directory.mkdir()
    writer.open(directory)
    draw = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        writer.write(name, torch.empty(spec.shape, dtype=spec.dtype).normal_(generator=draw))
    writer.close()
    (directory / "config.json").write_text(json.dumps(hf_config(table, model, "lm", {})))
    return sum(spec.nbytes for spec in specs.values())


def measure(settings: ConvertConfig, results: Any) -> None:
    """Convert; put (bytes before, bytes at the peak, seconds) into the queue."""
    from transformers import AutoConfig

    from nemo_advrm.convert import hf_sink, hf_source, megatron_checkpoint  # noqa: F401
    from nemo_advrm.convert.conversion import convert

    torch.zeros(1).sum()
    AutoConfig.for_model("llama")
    before = psutil.Process().memory_info().rss  # now, not the peak of the imports
    start = time.perf_counter()
    convert(settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((before, peak, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=14, help="14 make 2.0 GB")
    parser.add_argument(
        "--directory", default=None, help="directory of the temporary checkpoints (needs three times the size)"
    )
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        hf, ours, back = (Path(temporary) / name for name in ("hf", "megatron", "back"))
        size = generate(hf, llama(arguments.layers), 500 * 10**6)
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(list(hf.glob('*.safetensors')))} files")
        for settings in (
            ConvertConfig(from_="hf", path=str(hf), to="megatron", out=str(ours)),
            ConvertConfig(from_="megatron", path=str(ours), to="hf", out=str(back), max_shard_size="500MB"),
        ):
            results = context.Queue()
            process = context.Process(target=measure, args=(settings, results))
            process.start()
            process.join(timeout=1800)
            if process.exitcode != 0:
                process.kill()
                raise SystemExit(f"the conversion {settings.from_} -> {settings.to} failed ({process.exitcode})")
            before, peak, seconds = results.get(timeout=10)
            verdict = "under" if peak - before < LIMIT_BYTES else "OVER"
            print(
                f"{settings.from_} -> {settings.to}: peak {(peak - before) / 1e6:.0f} MB over the baseline of "
                f"{before / 1e6:.0f} MB ({verdict} {LIMIT_BYTES / 1e6:.0f} MB), {seconds:.1f} s"
            )
        same = [(back / file.name).read_bytes() == file.read_bytes() for file in sorted(hf.glob("*.safetensors"))]
        print(f"files that are bit-equal after the round trip: {sum(same)} of {len(same)}")


if __name__ == "__main__":
    main()
