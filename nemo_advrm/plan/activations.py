"""Activation memory: the formula of Korthikanti et al., adapted to this engine's layers.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count, per layer of s tokens in b rows of width h with a heads
and 2-byte elements, s b h (34 + 5 a s / h) bytes: 11 s b h + 5 a s^2 b in attention, 19 s b h in the MLP, 4 s b h in
the two norms. Here the same tensors are counted in elements, so that the formula holds for other shapes:

    norms      2h (inputs)
    attention  h (input) + q + 2k (projections) [+ q + k, their rotated copies] + q (result) + its softmax sums
    MLP        h (input) + f' (first product, activation and second product's input)

q = heads * d and k = groups * d (grouped queries), f' = 2f (gelu), 5f (gated), and so on, see :func:`_mlp`. Attention
is fused: it keeps one fp32 sum per token and head instead of the 5 a s^2 b bytes of the score matrix. Dropout masks
count only if dropout is used. Tensor parallelism divides the tensors between a column-parallel and a row-parallel
matrix, sequence parallelism the others too, and context parallelism the tokens. Our own attention, which replaces
Transformer Engine's on a CPU and for windows and soft-caps, keeps the keys and values that it gathered from all
context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.layout import expert_tensor_parallel_size
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import head_size, tokens_at_once
from nemo_advrm.engine.flops import Microbatch
from nemo_advrm.engine.fusions import fuses_activation
from nemo_advrm.engine.parameters import Sizes

_SUM_BYTES = 4  # softmax sums and means are fp32


@dataclass(frozen=True)
class Kernels:
    """Kernels of the layers, which determine the activations that are kept.

    Attributes:
        fused_activation: Megatron's fused gated activation, which keeps only its input.
        on_cpu: PyTorch's RMSNorm, which also keeps the normalised input, and our attention, which keeps the keys and
            values that it gathers from context-parallel ranks. The tests compare this with measured steps.
    """

    fused_activation: bool = False
    on_cpu: bool = False

    def norm_copies(self, model: ModelConfig) -> int:
        """Number of tensors that a norm keeps."""
        return 2 if self.on_cpu and model.normalization.lower().startswith("rms") else 1


# the engine's kernels on a GPU without fusions, and on a CPU
PLAIN = Kernels()
ON_CPU = Kernels(on_cpu=True)


def on_gpu(model: ModelConfig) -> Kernels:
    """The engine's kernels on a GPU, without Transformer Engine's fused rotation, which would keep less."""
    return Kernels(fused_activation=fuses_activation(model))


def _mlp(model: ModelConfig, kernels: Kernels) -> float:
    """Elements kept between the MLP's matrices, in units of f.

    Gated: both halves of the first product (2) and the product of activation and linear half (1); without fusion also
    the activation and the linear half, to which Megatron adds an offset (2). gelu: input and output. ReLU: its output;
    squared ReLU: also the square.
    """
    if Sizes.of(model).gated:
        return 3 if kernels.fused_activation else 5
    return 1 if model.activation == "relu" else 2


@dataclass(frozen=True)
class LayerTerms:
    """Bytes of activations that one layer keeps on one rank, by part.

    ``in_attention`` is what recomputing attention saves, without the softmax sums: explicit score matrices, which only
    soft-capped attention has, and the keys and values of all context-parallel ranks.
    """

    norms: float
    attention: float
    in_attention: float
    mlp: float
    dropout: float

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.in_attention + self.mlp + self.dropout


def _expert_copies(model: ModelConfig, tokens: float) -> tuple[float, int]:
    """(tokens that a rank's experts process, ranks that share an expert) if every expert gets as many.

    ``tokens`` of the rank each go to ``moe_router_topk`` experts, and as many come from others. Ranks that share an
    expert all process the tokens of each other.
    """
    split = expert_tensor_parallel_size(model.tensor_model_parallel_size, model.expert_model_parallel_size)
    return tokens * model.moe_router_topk * split, split


def _experts(model: ModelConfig, tokens: float, element: int, kernels: Kernels) -> float:
    """Bytes that experts and router keep of a rank's ``tokens``, of which each has ``moe_router_topk`` copies.

    Of each copy: the input, what a dense MLP keeps between its matrices, and the product with its weight, less the
    result of the activation. Of each token: logits, probabilities and choice of all experts.
    """
    size = Sizes.of(model)
    copies, split = _expert_copies(model, tokens)
    inner = size.ffn * (_mlp(model, kernels) + 1) / split
    return element * copies * (size.hidden + inner) + tokens * model.num_moe_experts * 2 * _SUM_BYTES


def layer_terms(model: ModelConfig, batch: Microbatch, element: int, kernels: Kernels) -> LayerTerms:
    """Activations of one layer for one microbatch on one rank without recomputation; ``element`` in bytes."""
    size, tensor = Sizes.of(model), model.tensor_model_parallel_size
    tokens = batch.tokens / model.context_parallel_size
    outside = tensor if model.sequence_parallel else 1
    kept = element * tokens
    norms = kept * size.hidden / outside * kernels.norm_copies(model) * (4 if model.post_norms else 2)

    projections = size.query + 2 * size.key
    rotated = model.position_embedding_type == "rope"
    if rotated:
        projections += size.query + size.key
    if model.qk_layernorm:
        projections += size.query  # copy grouped by head, before the norm
        projections += (kernels.norm_copies(model) - 1) * (size.query + size.key)
    attention = kept * size.hidden / outside + kept * (projections + size.query) / tensor
    attention += _SUM_BYTES * tokens * size.heads / tensor
    if rotated:  # cosines and sines, for queries and for keys
        length = batch.length / model.context_parallel_size
        attention += 4 * element * length * head_size(model) * model.rotary_percent
    in_attention = 0.0
    fp32 = element == 4  # Transformer Engine has no context parallelism in fp32
    own = kernels.on_cpu or model.attention_softcap or model.sliding_window or fp32
    if model.context_parallel_size > 1 and own:
        # of 2 cp chunks of keys, rank i keeps i + 1 for its early query chunk and 2 cp - i for the late one
        share = 1 + 1 / (2 * model.context_parallel_size)
        in_attention += element * batch.tokens * 2 * size.key / tensor * share
    if model.attention_softcap:
        # tanh, the fp32 softmax and its copy in the dtype of the elements
        each = element + _SUM_BYTES + (0 if fp32 else element)
        in_attention += tokens * batch.length * size.heads / tensor * each
    if model.num_moe_experts:
        mlp = kept * size.hidden / outside + _experts(model, tokens / outside, element, kernels)
    else:
        mlp = kept * (size.hidden / outside + size.ffn * _mlp(model, kernels) / tensor)
    dropout = 2 * tokens * size.hidden / outside if model.hidden_dropout else 0.0
    return LayerTerms(norms, attention, in_attention, mlp, dropout)


def boundary_bytes(model: ModelConfig, batch: Microbatch, element: int) -> float:
    """Bytes of the residual stream on one rank: kept per recomputed unit, and exchanged between stages."""
    outside = model.tensor_model_parallel_size if model.sequence_parallel else 1
    return element * batch.tokens / model.context_parallel_size * model.hidden_size / outside


def chunk_bytes(model: ModelConfig, layers: int, batch: Microbatch, element: int, kernels: Kernels) -> float:
    """Bytes that ``layers`` layers keep for one microbatch, with the recomputation of ``model``."""
    layer = layer_terms(model, batch, element, kernels)
    unit = boundary_bytes(model, batch, element)
    count = model.recompute_num_layers
    if model.recompute == "full":
        return -(-layers // count) * unit
    if model.recompute == "block":
        again = min(count, layers)
        return again * unit + (layers - again) * layer.total
    if model.recompute == "selective":
        tokens = batch.tokens / model.context_parallel_size
        sums = _SUM_BYTES * tokens * model.num_attention_heads / model.tensor_model_parallel_size
        return layers * (layer.total - layer.in_attention - sums)
    return layers * layer.total


def recomputed_bytes(model: ModelConfig, layers: int, batch: Microbatch, element: int, kernels: Kernels) -> float:
    """Bytes held while the backward pass recomputes the activations of one unit."""
    layer = layer_terms(model, batch, element, kernels)
    if model.recompute == "full":
        return min(model.recompute_num_layers, layers) * layer.total
    if model.recompute == "block":  # the backward pass of the other layers comes first, and has freed theirs
        return layer.total if layers <= model.recompute_num_layers else 0.0
    return layer.in_attention if model.recompute == "selective" else 0.0


def backward_bytes(model: ModelConfig, batch: Microbatch, element: int) -> float:
    """Peak bytes of gradients inside one layer's backward pass, less the activations freed by then.

    The peak is in the MLP: the residual stream's gradient twice, and either the gradients inside the activation (2f if
    gated, 3f if squared, else f), or f and the gradient of the second matrix.
    """
    size, tensor = Sizes.of(model), model.tensor_model_parallel_size
    boundary = boundary_bytes(model, batch, element)
    if model.num_moe_experts:  # one expert after another: gradients of all their outputs, and of all their inputs
        copies, _ = _expert_copies(model, boundary / (element * size.hidden))
        return 2 * boundary + 2 * element * copies * size.hidden
    inner = element * batch.tokens / model.context_parallel_size * size.ffn / tensor
    matrix = element * size.hidden * size.ffn / tensor
    at_activation = (2 if size.gated else 3 if model.activation == "squared_relu" else 1) * inner
    return 2 * boundary + max(at_activation, inner + matrix)


def log_prob_bytes(model: ModelConfig, tokens: float, vocab_size: int, element: int) -> float:
    """Bytes of the logits of a language model, [tokens, V / tp], while log-probabilities are computed.

    Once in the dtype of the elements, if that is not fp32, and three times in fp32: of all predicted tokens (at most
    all), or of those that ``model.logits_chunk_size`` allows at once.
    """
    each = (element if element != _SUM_BYTES else 0) + 3 * _SUM_BYTES
    return _logits_at_once(model, tokens, vocab_size) * each


def _logits_at_once(model: ModelConfig, tokens: float, vocab_size: int) -> float:
    return min(tokens, tokens_at_once(model, vocab_size)) * vocab_size / model.tensor_model_parallel_size


def output_gradient_bytes(model: ModelConfig, vocab_size: int, element: int) -> float:
    """Bytes of the gradient of a language model's output layer, before it is added up; 0 if that is not trained."""
    if model.peft != "none":
        return 0.0
    return element * vocab_size / model.tensor_model_parallel_size * model.hidden_size


def head_bytes(
    model: ModelConfig, head: str, batch: Microbatch, vocab_size: int, element: int, kernels: Kernels
) -> float:
    """Peak bytes on the last stage after its layers: the last norm's input, the gathered hidden state, and logits.

    The peak is while log-probabilities are computed, or while the gradient of the output layer is made of that of the
    logits. Where logits are made in chunks, the gradients of the chunks before stand beside them: those of their
    hidden states, and the output layer's.
    """
    tokens = batch.tokens / model.context_parallel_size
    norm = boundary_bytes(model, batch, element) * kernels.norm_copies(model)
    gathered = element * tokens * model.hidden_size
    if head == "reward":
        return norm + (gathered if model.sequence_parallel else boundary_bytes(model, batch, element))
    if head == "value":
        return norm + gathered + _SUM_BYTES * tokens * model.hidden_size
    weight = output_gradient_bytes(model, vocab_size, element)
    of_logits = _SUM_BYTES * _logits_at_once(model, tokens, vocab_size)
    peak = max(log_prob_bytes(model, tokens, vocab_size, element), weight + of_logits)
    before = gathered + weight if tokens > tokens_at_once(model, vocab_size) else 0.0
    return norm + 2 * gathered + before + peak


def peak_bytes(
    model: ModelConfig,
    layers: int,
    in_flight: float,
    head: float,
    batch: Microbatch,
    element: int,
    kernels: Kernels,
    tied: float = 0.0,
) -> float:
    """Peak activation bytes of training on one stage: ``in_flight`` microbatches, and one in its backward pass.

    Args:
        layers: those of one model chunk.
        head: :func:`head_bytes` on the last stage, else 0.
        tied: gradient of an output layer that waits in the layers' backward pass for that of the embedding with the
            same weight (:func:`tied_bytes`).
    """
    kept = in_flight * chunk_bytes(model, layers, batch, element, kernels)
    again = recomputed_bytes(model, layers, batch, element, kernels)
    return kept + max(head, tied + again + backward_bytes(model, batch, element))


def tied_bytes(model: ModelConfig, head: str, vocab_size: int, element: int) -> float:
    """Bytes of the gradient of an output layer that shares its weight with the embedding of the same stage."""
    tied = head == "lm" and model.share_embeddings_and_output_weights and model.pipeline_model_parallel_size == 1
    return output_gradient_bytes(model, vocab_size, element) if tied else 0.0
