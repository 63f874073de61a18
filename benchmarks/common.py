"""Shared parts of the benchmarks: one random Llama for both sides, ragged data, and interleaved timing.

Each side of a comparison runs in a process of its own, so that peak memory is measured separately. The parent
alternates between them (ours, peer, ours, peer, ...): only one computes at a time, and drifts affect both.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

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


@dataclass(frozen=True)
class Side:
    """One side of a comparison: ``check`` returns values that must agree, ``work`` runs one repeat, returns units."""

    check: Callable[[], np.ndarray]
    work: Callable[[], float]
    loop: Callable[[], None] | None = None  # a training loop controlled by ``work``, run in the main thread


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


def peer_model(shape: Llama, head: str, weights: dict[str, torch.Tensor]) -> Any:
    """Build the transformers model with these weights."""
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
    model = (LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification)(config)
    model.load_state_dict(weights)
    return model.eval()


def our_config(shape: Llama) -> Config:
    """Return our configuration of the same shape with defaults for everything else."""
    from nemo_advrm.config.schema import Config

    cfg = Config()
    cfg.trainer.accelerator = "cpu"
    model = cfg.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = shape.layers, shape.hidden, shape.ffn
    model.num_attention_heads, model.num_query_groups = shape.heads, shape.groups
    model.layernorm_epsilon, model.encoder_seq_length = shape.eps, shape.context
    model.vocab_size, model.share_embeddings_and_output_weights = shape.vocab, False
    return cfg


def start_runtime() -> None:
    """Start our engine in this process, on one thread."""
    from nemo_advrm.engine import runtime
    from nemo_advrm.logging_setup import quiet_libraries

    quiet_libraries()
    runtime.start(accelerator="cpu")


def our_model(shape: Llama, head: str, weights: dict[str, torch.Tensor]) -> MegatronModel:
    """Build our model with these weights, not trainable."""
    from nemo_advrm.engine.model import build_model

    start_runtime()
    cfg = our_config(shape)
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
            # without Transformer Engine the norms are layers of their own
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


def peak_mib() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _process(connection: Connection, make: Callable[..., Side], options: Any) -> None:
    """Run one side in its process: set up, send the check, then run one repeat for every message of the parent."""
    import torch

    torch.set_num_threads(1)
    side = make(options)
    if side.loop is None:
        _serve(connection, side)
    else:
        threading.Thread(target=_serve, args=(connection, side), daemon=True).start()
        side.loop()


def _serve(connection: Connection, side: Side) -> None:
    try:
        connection.send((side.check(), peak_mib()))
        while connection.recv() == "go":
            started, cpu_started = time.perf_counter(), time.process_time()
            units = side.work()
            connection.send((units, time.perf_counter() - started, time.process_time() - cpu_started))
        connection.send(peak_mib())
    finally:
        os._exit(0)  # a training loop in the main thread would wait for its next step forever


def compare(
    title: str, unit: str, sides: dict[str, Callable[..., Side]], options: Any, repeats: int
) -> dict[str, float]:
    """Time the sides in turn; the first is ours. Returns the median units per second of each.

    Prints median and range of units per second of wall-clock time, the median per second of CPU time (which excludes
    other work on the machine), peak memory, and the ratio of ours to each peer. The first repeat of each side is a
    warm-up. Raises AssertionError when the results of the sides differ by more than TOLERANCE.
    """
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    context = multiprocessing.get_context("spawn")
    connections, processes, ready = {}, [], {}
    for name, make in sides.items():
        connections[name], theirs = context.Pipe()
        process = context.Process(target=_process, args=(theirs, make, options), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ready[name] = connections[name].recv()  # one after the other, because set-up also needs the CPU
    ours = next(iter(sides))
    for name, (numbers, _) in ready.items():
        expected = ready[ours][0]
        assert numbers.shape == expected.shape, f"{name}: {numbers.shape} numbers, {ours}: {expected.shape}"
        worst = float(np.abs(numbers - expected).max())
        assert worst <= TOLERANCE, f"{name} and {ours} differ by {worst:.2e}"
        if name != ours:
            print(f"{title}: {ours} and {name} agree in {numbers.size} numbers (largest difference {worst:.1e})")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu_rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, connection in connections.items():
            connection.send("go")
            units, seconds, cpu_seconds = connection.recv()
            if repeat:
                rates[name].append(units / seconds)
                cpu_rates[name].append(units / cpu_seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_rates.items()}
    width = max(map(len, sides))
    for name, connection in connections.items():
        connection.send("stop")
        peak = connection.recv()
        low, high = min(rates[name]), max(rates[name])
        print(
            f"  {name:{width}}  {medians[name]:10.1f} {unit}/s  ({low:.1f} to {high:.1f}, {repeats} repeats)  "
            f"{cpu_medians[name]:10.1f} per CPU second  "
            f"peak {peak:6.0f} MiB, of which {ready[name][1]:.0f} before timing"
        )
    for name in sides:
        if name != ours:
            ratios = [a / b for a, b in zip(rates[ours], rates[name], strict=True)]
            print(
                f"  {ours} / {name}: {medians[ours] / medians[name]:.2f} of medians, {min(ratios):.2f} to "
                f"{max(ratios):.2f} by repeat, {cpu_medians[ours] / cpu_medians[name]:.2f} by CPU time"
            )
    for process in processes:
        process.join(timeout=20)
    return medians


def describe_machine() -> None:
    """Print the hardware and the versions on which the figures depend."""
    from nemo_advrm.report.lines import this_machine

    libraries = ("torch", "megatron-core", "transformers", "trl", "lightning")
    load = os.getloadavg()[0]
    print(f"{time.strftime('%Y-%m-%d')}: {this_machine()}, load {load:.1f}, 1 thread a side, fp32")
    print(", ".join(f"{name} {version(name)}" for name in libraries))
