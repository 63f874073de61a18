"""Counts the parameters of a model, or of one rank's part of it, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_advrm.config.layout import expert_tensor_parallel_size, layers_per_stage
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import GATED, Head, ffn_size, head_size, query_groups

# linear layers whose outputs are split over tensor-parallel ranks; of the others the inputs are
SPLIT_OUTPUTS = ("linear_qkv", "linear_fc1")


@dataclass(frozen=True)
class Sizes:
    """Widths of a transformer layer in elements per token.

    Attributes:
        hidden, ffn: width of the residual stream, and of the MLP between its two matrices.
        query, key: width of all queries, and of all keys (equal to that of the values).
        heads, groups: number of attention heads, and of key/value heads.
        gated: whether the MLP's first matrix has two halves (gated linear unit).
    """

    hidden: int
    ffn: int
    query: int
    key: int
    heads: int
    groups: int
    gated: bool

    @classmethod
    def of(cls, model: ModelConfig) -> Sizes:
        channels, groups = head_size(model), query_groups(model)
        return cls(
            hidden=model.hidden_size,
            ffn=ffn_size(model),
            query=model.num_attention_heads * channels,
            key=groups * channels,
            heads=model.num_attention_heads,
            groups=groups,
            gated=model.activation in GATED,
        )


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a model or a part of it.

    Attributes:
        linear: weights of the matrices inside layers, those that FP8 applies to, without those of experts.
        other: norms, biases and routers inside layers.
        embedding: token and learned position embeddings, and the last stage's copy of a tied embedding.
        output: the output layer of a language model, if it is not tied.
        head: the fp32 head of a reward or value model.
        adapters: low-rank adapters of ``model.peft=lora``, of a model that is trained.
        experts: weights of the experts' matrices, which FP8 applies to too.
    """

    linear: int = 0
    other: int = 0
    embedding: int = 0
    output: int = 0
    head: int = 0
    adapters: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        inner = self.linear + self.experts + self.other + self.adapters
        return inner + self.embedding + self.output + self.head

    @property
    def trained(self) -> Parameters:
        """What is trained of a model that is trained: adapters and head, if there are adapters."""
        return Parameters(head=self.head, adapters=self.adapters) if self.adapters else self


def _layer(model: ModelConfig, tensor: int) -> tuple[int, int, int]:
    """(weights of matrices, norms, biases and routers, weights of experts) of one layer on one of ``tensor`` ranks."""
    size = Sizes.of(model)
    first = size.ffn * (2 if size.gated else 1)
    projections = size.query + 2 * size.key
    mlp, experts = size.hidden * (first + size.ffn), 0
    if model.num_moe_experts:
        ranks = model.expert_model_parallel_size
        mlp, experts = 0, mlp * model.num_moe_experts // (ranks * expert_tensor_parallel_size(tensor, ranks))
    matrices = (size.hidden * (projections + size.query) + mlp) // tensor
    per_norm = 1 if model.normalization.lower().startswith("rms") else 2
    other = per_norm * size.hidden * (4 if model.post_norms else 2)
    if model.qk_layernorm:
        other += 2 * per_norm * head_size(model)
    if model.qkv_bias or model.bias:
        other += projections // tensor
    if model.bias:  # every rank has the biases of the two row-parallel matrices
        other += first // tensor + 2 * size.hidden
    return matrices, other + model.num_moe_experts * size.hidden, experts


def adapted_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(width of the input, width of the output) of the whole linear layers that may have an adapter, by name."""
    size = Sizes.of(model)
    return {
        "linear_qkv": (size.hidden, size.query + 2 * size.key),
        "linear_proj": (size.query, size.hidden),
        "linear_fc1": (size.hidden, size.ffn * (2 if size.gated else 1)),
        "linear_fc2": (size.ffn, size.hidden),
    }


def adapter_parameters(model: ModelConfig, tensor: int) -> int:
    """Parameters of one layer's adapters on one of ``tensor`` ranks, each of which has one of the matrices whole."""
    total = 0
    for target in model.lora.targets:
        inputs, outputs = adapted_sizes(model)[target]
        split, whole = (outputs, inputs) if target in SPLIT_OUTPUTS else (inputs, outputs)
        total += model.lora.rank * (split // tensor + whole)
    return total


def with_adapters(counts: Parameters, model: ModelConfig, stage: int) -> Parameters:
    """``counts`` of a stage of a model that is trained, with its adapters if ``model.peft=lora``."""
    if model.peft != "lora":
        return counts
    each = adapter_parameters(model, model.tensor_model_parallel_size)
    return replace(counts, adapters=each * layers_per_stage(model)[stage])


def stage_parameters(model: ModelConfig, head: Head, vocab_size: int, stage: int, head_outputs: int = 1) -> Parameters:
    """Parameters of one rank of pipeline stage ``stage`` at the layout of ``model``.

    ``vocab_size`` is the padded size (:func:`nemo_advrm.engine.dimensions.padded_vocab_size`). All ranks of a stage
    have the same number.
    """
    tensor, layers = model.tensor_model_parallel_size, layers_per_stage(model)
    matrices, other, experts = (count * layers[stage] for count in _layer(model, tensor))
    tied = model.share_embeddings_and_output_weights and head == "lm"
    tokens = vocab_size * model.hidden_size // tensor
    embedding = output = scalar = 0
    if stage == 0:
        embedding = tokens
        if model.position_embedding_type == "learned_absolute":
            embedding += model.encoder_seq_length * model.hidden_size
    if stage == len(layers) - 1:
        other += model.hidden_size * (1 if model.normalization.lower().startswith("rms") else 2)
        if head != "lm":
            bias = head_outputs if model.head_bias else 0
            scalar = head_outputs * model.hidden_size + bias
        elif not tied:
            output = tokens
        elif len(layers) > 1:
            embedding += tokens
    return Parameters(matrices, other, embedding, output, scalar, experts=experts)


def model_parameters(model: ModelConfig, head: Head, vocab_size: int, head_outputs: int = 1) -> Parameters:
    """Parameters of the whole model, each counted once, for any layout."""
    whole = replace(
        model,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        num_layers_in_first_pipeline_stage=0,
        num_layers_in_last_pipeline_stage=0,
    )
    return stage_parameters(whole, head, vocab_size, 0, head_outputs)
