"""Shared parts of the benchmarks: one random Llama for both sides, ragged data, and their comparison on a CPU.

The sides take turns (ours, peer, ours, peer, ...), as described in ``sides.py``. The same models and data, larger and
on a GPU, are those of ``gpu/``.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from sides import Make, SideProcess

if TYPE_CHECKING:
    import torch

    from nemo_advrm.config.schema import Config
    from nemo_advrm.engine.model import MegatronModel

TOLERANCE = 1e-3
PAD_ID, EOS_ID, FIRST_ID = 0, 1, 8


@dataclass(frozen=True)
class Llama:
    """Shape of the benchmark's model."""

    layers: int = 6
    hidden: int = 256
    ffn: int = 768
    heads: int = 8
    groups: int = 4
    vocab: int = 512
    context: int = 1024
    eps: float = 1e-5


def random_weights(shape: Llama, head: str, seed: int = 0, std: float = 0.02) -> dict[str, torch.Tensor]:
    """Return tensors by Hugging Face name of a Llama with head "lm" (untied) or "reward"; equal in every process."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * std

    key_size = shape.hidden // shape.heads * shape.groups
    weights = {"model.embed_tokens.weight": draw(shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.self_attn.q_proj.weight": draw(shape.hidden, shape.hidden),
            f"{layer}.self_attn.k_proj.weight": draw(key_size, shape.hidden),
            f"{layer}.self_attn.v_proj.weight": draw(key_size, shape.hidden),
            f"{layer}.self_attn.o_proj.weight": draw(shape.hidden, shape.hidden),
            f"{layer}.mlp.gate_proj.weight": draw(shape.ffn, shape.hidden),
            f"{layer}.mlp.up_proj.weight": draw(shape.ffn, shape.hidden),
            f"{layer}.mlp.down_proj.weight": draw(shape.hidden, shape.ffn),
            f"{layer}.input_layernorm.weight": 1 + draw(shape.hidden),
            f"{layer}.post_attention_layernorm.weight": 1 + draw(shape.hidden),
        }
    weights["model.norm.weight"] = 1 + draw(shape.hidden)
    if head == "lm":
        weights["lm_head.weight"] = draw(shape.vocab, shape.hidden)
    else:
        weights["score.weight"] = draw(1, shape.hidden)
    return weights


def peer_model(shape: Llama, head: str, weights: dict[str, torch.Tensor], device: str = "cpu") -> Any:
    """Build the transformers model with these weights, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.eps,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        tie_word_embeddings=False,
        num_labels=1,
        attn_implementation="sdpa",
    )
    with torch.device(device):  # 1.2 B parameters are drawn in a second there
        model = (LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification)(config)
    model.load_state_dict(weights)
    return model.eval()


def our_config(shape: Llama, accelerator: str = "cpu") -> Config:
    """Return our configuration of the same shape with defaults for everything else; bf16 on a GPU."""
    from nemo_advrm.config.schema import Config

    cfg = Config()
    cfg.trainer.accelerator = accelerator
    cfg.precision.name = "bf16" if accelerator == "gpu" else "fp32"
    model = cfg.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = shape.layers, shape.hidden, shape.ffn
    model.num_attention_heads, model.num_query_groups = shape.heads, shape.groups
    model.layernorm_epsilon, model.encoder_seq_length = shape.eps, shape.context
    model.vocab_size, model.share_embeddings_and_output_weights = shape.vocab, False
    return cfg


def our_facts(cfg: Config) -> dict[str, Any]:
    """Return what decides our speed, for a result."""
    import torch

    from nemo_advrm.engine.transformer_engine import is_usable
    from nemo_advrm.engine.varlen import packs

    on_gpu = cfg.trainer.accelerator == "gpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": cfg.precision.name,
        "transformer_engine": is_usable(on_gpu),
        "packed": packs(cfg.model, torch.bfloat16 if on_gpu else torch.float32, on_gpu),
    }


def start_runtime(accelerator: str = "cpu") -> None:
    """Start our engine in this process."""
    from nemo_advrm.engine import runtime
    from nemo_advrm.logging_setup import quiet_libraries

    quiet_libraries()
    runtime.start(accelerator=accelerator)


def our_model(shape: Llama, head: str, weights: dict[str, torch.Tensor], accelerator: str = "cpu") -> MegatronModel:
    """Build our model with these weights, not trainable."""
    from nemo_advrm.engine.model import build_model

    start_runtime(accelerator)
    cfg = our_config(shape, accelerator)
    model = build_model(cfg.model, cfg.precision, head, shape.vocab, seed=0, trainable=False)
    copy_weights(model, weights)
    return model


def copy_weights(model: MegatronModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy Hugging Face's tensors into one unsplit Megatron model."""
    import torch

    from nemo_advrm.convert.architecture_tables import ARCHITECTURES
    from nemo_advrm.convert.tensor_names import ATTENTION_NORM, MLP_NORM, canonical_shapes

    llama = next(table for table in ARCHITECTURES if table.family == "Llama")
    parameters = dict(model.parts[0].named_parameters())
    with torch.no_grad():
        for name, shape in canonical_shapes(model.model_config, model.head, model.vocab_size).items():
            found = llama.parts(name, shape, model.model_config)
            assert found is not None, name
            transform, theirs = found
            parameter = name
            if name not in parameters:  # without Transformer Engine the norms are layers of their own
                parameter = name.replace(ATTENTION_NORM, "input_layernorm.").replace(MLP_NORM, "pre_mlp_layernorm.")
            parameters.pop(parameter).copy_(transform.merge([weights[part] for part in theirs], model.model_config))
    if parameters:
        raise RuntimeError(f"tensors do not match: {sorted(parameters)}")


def ragged_lengths(rows: int, rng: np.random.Generator, longest: int) -> np.ndarray:
    """Draw lengths [rows, 2] of chosen and rejected as in HH-RLHF: mean 180, 95th percentile 460, log-corr. 0.85."""
    noise = rng.multivariate_normal([0.0, 0.0], [[1.0, 0.85], [0.85, 1.0]], size=rows)
    return np.exp(4.924 + 0.734 * noise).astype(int).clip(8, longest)


def ragged_sequences(lengths: np.ndarray, rng: np.random.Generator, vocab: int) -> list[list[int]]:
    """Draw random sequences of these lengths that end with EOS_ID."""
    return [[*rng.integers(FIRST_ID, vocab, size=n - 1).tolist(), EOS_ID] for n in lengths]


def compare(title: str, unit: str, sides: dict[str, Make], options: Any, repeats: int) -> dict[str, float]:
    """Time the sides in turn; the first is ours. Returns the median units per second of each.

    Prints median and range of units per second of wall-clock time, the median per second of CPU time (which excludes
    other work on the machine), peak memory, and the ratio of ours to each peer. The first repeat of each side is a
    warm-up. Raises AssertionError when the results of the sides differ by more than TOLERANCE.
    """
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    processes, ready = {}, {}
    for name, make in sides.items():
        processes[name] = SideProcess(make, [options])
        ready[name] = processes[name].ready()  # one after the other, because set-up also needs the CPU
    ours = next(iter(sides))
    for name, side in ready.items():
        expected = ready[ours].numbers
        assert side.numbers.shape == expected.shape, f"{name}: {side.numbers.shape} numbers, {ours}: {expected.shape}"
        worst = float(np.abs(side.numbers - expected).max())
        assert worst <= TOLERANCE, f"{name} and {ours} differ by {worst:.2e}"
        if name != ours:
            print(f"{title}: {ours} and {name} agree in {expected.size} numbers (largest difference {worst:.1e})")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu_rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, process in processes.items():
            done = process.go()
            if repeat:
                rates[name].append(done.units / done.seconds)
                cpu_rates[name].append(done.units / done.cpu_seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_rates.items()}
    width = max(map(len, sides))
    for name, process in processes.items():
        peak = process.stop()
        low, high = min(rates[name]), max(rates[name])
        print(
            f"  {name:{width}}  {medians[name]:10.1f} {unit}/s  ({low:.1f} to {high:.1f}, {repeats} repeats)  "
            f"{cpu_medians[name]:10.1f} per CPU second  "
            f"peak {peak:6.0f} MiB, of which {ready[name].peak_mib:.0f} before timing"
        )
    for name in sides:
        if name != ours:
            ratios = [a / b for a, b in zip(rates[ours], rates[name], strict=True)]
            print(
                f"  {ours} / {name}: {medians[ours] / medians[name]:.2f} of medians, {min(ratios):.2f} to "
                f"{max(ratios):.2f} by repeat, {cpu_medians[ours] / cpu_medians[name]:.2f} by CPU time"
            )
    return medians


def describe_machine() -> None:
    """Print the hardware and the versions on which the figures depend."""
    from nemo_advrm.report.lines import this_machine

    libraries = ("torch", "megatron-core", "transformers", "trl", "lightning")
    load = os.getloadavg()[0]
    print(f"{time.strftime('%Y-%m-%d')}: {this_machine()}, load {load:.1f}, 1 thread a side, fp32")
    print(", ".join(f"{name} {version(name)}" for name in libraries))
