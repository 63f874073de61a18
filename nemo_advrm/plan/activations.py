"""What a forward pass keeps for its backward pass: the formula of Korthikanti et al. for this engine's layers.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count, per layer of s tokens in b rows of width h with a heads
and 2-byte elements, s b h (34 + 5 a s / h) bytes: 11 s b h + 5 a s^2 b in attention, 19 s b h in the MLP, 4 s b h in
the two norms. Here the same tensors are counted in elements, so that the formula holds for other shapes:

    norms      2h (inputs)
    attention  h (input) + q + 2k (projections) [+ q + k, their rotated copies] + q (result) + its softmax sums
    MLP        h (input) + f' (first product, activation and second product's input)

q = heads * d and k = groups * d (grouped queries), f' = 2f (gelu), 5f (gated), and so on, see :func:`_mlp`. Attention
is fused: it keeps one fp32 sum per token and head in place of the 5 a s^2 b bytes of its score matrix. The masks of
dropout count only where dropout is used. Tensor parallelism divides what lies between a column-parallel and a
row-parallel matrix; sequence parallelism divides the rest too; context parallelism divides the tokens. Our own
attention, which stands in for Transformer Engine's on a CPU and for windows and soft-caps, keeps the keys and values
that it gathered from all context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.flops import Microbatch
from nemo_advrm.engine.fusions import fuses_activation
from nemo_advrm.engine.parameters import Sizes
from nemo_advrm.engine.transformer import head_size

_SUM_BYTES = 4  # softmax sums and means are fp32


@dataclass(frozen=True)
class Kernels:
    """How layers are computed, which decides what they keep.

    Attributes:
        fused_activation: Megatron's fused gated activation, which keeps its input alone.
        fused_rotation: rotary positions are applied without a copy of queries and keys.
        stepwise_rms_norm: PyTorch's RMSNorm on a CPU, which keeps the normalised input too.
        own_attention: keys and values are gathered from context-parallel ranks before attention, and kept.
    """

    fused_activation: bool = False
    fused_rotation: bool = False
    stepwise_rms_norm: bool = False
    own_attention: bool = False


# what the engine runs on a GPU without any fusion and on a CPU
PLAIN = Kernels()
ON_CPU = Kernels(stepwise_rms_norm=True, own_attention=True)


def on_gpu(model: ModelConfig) -> Kernels:
    """What the engine runs on a GPU; rotary positions as without Transformer Engine, whose kernel keeps less."""
    return Kernels(fused_activation=fuses_activation(model))


def _is_rms(model: ModelConfig) -> bool:
    return model.normalization.lower().startswith("rms")


def _mlp(model: ModelConfig, kernels: Kernels) -> float:
    """Elements kept between the MLP's matrices, in units of f.

    Gated: both halves of the first product (2) and the product of the activation and the linear half (1); not fused
    the activation and the linear half, which Megatron adds an offset to, as well (2). gelu: its input and its output.
    ReLU keeps its output alone, squared ReLU its square too.
    """
    if Sizes.of(model).gated:
        return 3 if kernels.fused_activation else 5
    return 1 if model.activation == "relu" else 2


@dataclass(frozen=True)
class LayerTerms:
    """Bytes that one layer keeps on one rank, by part."""

    norms: float
    attention: float
    scores: float  # explicit score matrices: soft-capped attention alone
    mlp: float
    dropout: float
    gathered: float = 0.0  # keys and values of all context-parallel ranks

    @property
    def in_attention(self) -> float:
        """What recomputing the product of queries and keys saves, but for the softmax sums."""
        return self.scores + self.gathered

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.in_attention + self.mlp + self.dropout


def layer_terms(model: ModelConfig, batch: Microbatch, element: int, kernels: Kernels) -> LayerTerms:
    """What one layer keeps of one microbatch on one rank when nothing is recomputed; ``element`` in bytes."""
    size, tensor = Sizes.of(model), model.tensor_model_parallel_size
    tokens = batch.tokens / model.context_parallel_size
    outside = tensor if model.sequence_parallel else 1
    kept = element * tokens
    norm = kept * size.hidden / outside * (2 if kernels.stepwise_rms_norm and _is_rms(model) else 1)
    norms = norm * (4 if model.post_norms else 2)

    projections = size.query + 2 * size.key
    rotated = model.position_embedding_type == "rope" and not kernels.fused_rotation
    if rotated:
        projections += size.query + size.key
    if model.qk_layernorm:
        projections += size.query  # regrouped by head before its norm
        if kernels.stepwise_rms_norm and _is_rms(model):
            projections += size.query + size.key
    attention = kept * size.hidden / outside + kept * (projections + size.query) / tensor
    attention += _SUM_BYTES * tokens * size.heads / tensor
    if rotated:  # cos and sin, for queries and for keys
        length = batch.length / model.context_parallel_size
        attention += 4 * element * length * head_size(model) * model.rotary_percent
    gathered = 0.0
    fp32 = element == 4  # in which Transformer Engine shares no sequences
    own = kernels.own_attention or model.attention_softcap or model.sliding_window or fp32
    if model.context_parallel_size > 1 and own:
        # the early chunk of queries on rank i keeps i + 1 of 2 cp chunks of keys, the late one 2 cp - i
        share = 1 + 1 / (2 * model.context_parallel_size)
        gathered = element * batch.tokens * 2 * size.key / tensor * share
    scores = 0.0
    if model.attention_softcap:
        # tanh, the softmax in fp32 and its copy in the elements' format, and the mask's bytes
        scores = tokens * batch.length * size.heads / tensor * _capped_bytes(element)
    mlp = kept * (size.hidden / outside + size.ffn * _mlp(model, kernels) / tensor)
    dropout = 2 * tokens * size.hidden / outside if model.hidden_dropout else 0.0
    return LayerTerms(norms, attention, scores, mlp, dropout, gathered)


def _capped_bytes(element: int) -> int:
    return element + _SUM_BYTES + (element if element != _SUM_BYTES else 0)


def boundary_bytes(model: ModelConfig, batch: Microbatch, element: int) -> float:
    """One copy of the residual stream on one rank: what a recomputed unit keeps, and what stages exchange."""
    outside = model.tensor_model_parallel_size if model.sequence_parallel else 1
    return element * batch.tokens / model.context_parallel_size * model.hidden_size / outside


def chunk_bytes(model: ModelConfig, layers: int, batch: Microbatch, element: int, kernels: Kernels) -> float:
    """What ``layers`` layers keep of one microbatch, with the recompute of ``model``."""
    layer = layer_terms(model, batch, element, kernels)
    unit = boundary_bytes(model, batch, element)
    count = model.recompute_num_layers
    if model.recompute == "full":
        return -(-layers // count) * unit
    if model.recompute == "block":
        again = min(count, layers)
        return again * unit + (layers - again) * layer.total
    if model.recompute == "selective":
        return layers * (layer.total - layer.in_attention - _fused_sums(model, batch))
    return layers * layer.total


def _fused_sums(model: ModelConfig, batch: Microbatch) -> float:
    """Softmax sums of one layer: all that recomputing a fused attention saves."""
    tokens = batch.tokens / model.context_parallel_size
    return _SUM_BYTES * tokens * model.num_attention_heads / model.tensor_model_parallel_size


def recomputed_bytes(model: ModelConfig, layers: int, batch: Microbatch, element: int, kernels: Kernels) -> float:
    """What is kept for a moment while the backward pass makes a recomputed unit's activations again."""
    layer = layer_terms(model, batch, element, kernels)
    if model.recompute == "full":
        return min(model.recompute_num_layers, layers) * layer.total
    if model.recompute == "block":  # the layers that are not recomputed come first, and are let go by then
        return layer.total if layers <= model.recompute_num_layers else 0.0
    return layer.in_attention if model.recompute == "selective" else 0.0


def backward_bytes(model: ModelConfig, batch: Microbatch, element: int, gradient: int) -> float:
    """Largest set of gradients that exist at once inside one layer's backward pass, less what it has let go by then.

    In the MLP: the residual stream's gradient twice, with either the gradients inside the activation (2f where
    gated, 3f where squared, else f) or one f and the gradient of the second matrix, ``gradient`` bytes an element.
    """
    size, tensor = Sizes.of(model), model.tensor_model_parallel_size
    inner = element * batch.tokens / model.context_parallel_size * size.ffn / tensor
    matrix = gradient * size.hidden * size.ffn / tensor
    at_activation = (2 if size.gated else 3 if model.activation == "squared_relu" else 1) * inner
    return 2 * boundary_bytes(model, batch, element) + max(at_activation, inner + matrix)


def head_bytes(
    model: ModelConfig, head: str, batch: Microbatch, vocab_size: int, element: int, kernels: Kernels
) -> float:
    """What the last stage keeps after its layers: the last norm's input, the gathered hidden state, logits.

    A language model's logits are [tokens, V / tp] for every token that is predicted (at most all): once in the
    elements' format and, while log-probabilities and their gradient are made, four times in fp32.
    """
    tokens = batch.tokens / model.context_parallel_size
    norm = boundary_bytes(model, batch, element) * (2 if kernels.stepwise_rms_norm and _is_rms(model) else 1)
    gathered = element * tokens * model.hidden_size
    if head == "reward":
        return norm + (gathered if model.sequence_parallel else boundary_bytes(model, batch, element))
    if head == "value":
        return norm + gathered + _SUM_BYTES * tokens * model.hidden_size
    logits = tokens * vocab_size / model.tensor_model_parallel_size
    half = element if element != _SUM_BYTES else 0
    return norm + 2 * gathered + logits * (half + 4 * _SUM_BYTES)


def peak_bytes(
    model: ModelConfig, layers: int, in_flight: float, head: float, batch: Microbatch, element: int, kernels: Kernels
) -> float:
    """Most that training holds at once on one stage: ``in_flight`` microbatches, and one in its backward pass.

    ``layers`` are those of one model chunk, ``head`` is :func:`head_bytes` on the last stage, else 0.
    """
    kept = in_flight * chunk_bytes(model, layers, batch, element, kernels)
    again = recomputed_bytes(model, layers, batch, element, kernels)
    return kept + max(head, again + backward_bytes(model, batch, element, element))
