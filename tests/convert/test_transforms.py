"""Every transform is undone bit by bit, for all shapes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.transforms import COPY, GATE_UP, QKV, pad_vocabulary

sizes = st.integers(1, 4)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    """A tensor whose elements all differ."""
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape).float()


@settings(deadline=None, max_examples=60)
@given(groups=sizes, per_group=sizes, size=sizes, hidden=sizes, bias=st.booleans())
def test_qkv_stands_group_by_group_and_comes_apart_again(
    groups: int, per_group: int, size: int, hidden: int, bias: bool
) -> None:
    model = ModelConfig(num_attention_heads=groups * per_group, num_query_groups=groups, kv_channels=size)
    trailing = () if bias else (hidden,)
    q = numbered(groups * per_group * size, *trailing)
    k = numbered(groups * size, *trailing, start=1000)
    v = numbered(groups * size, *trailing, start=2000)

    fused = QKV.merge([q, k, v], model)

    rows = []
    for group in range(groups):  # the definition, row by row
        rows += [q[i] for i in range(group * per_group * size, (group + 1) * per_group * size)]
        rows += [part[i] for part in (k, v) for i in range(group * size, (group + 1) * size)]
    assert torch.equal(fused, torch.stack(rows))
    assert all(torch.equal(a, b) for a, b in zip(QKV.split(fused, model), (q, k, v), strict=True))


@settings(deadline=None, max_examples=30)
@given(ffn=sizes, hidden=sizes)
def test_the_gate_stands_above_up(ffn: int, hidden: int) -> None:
    gate, up = numbered(ffn, hidden), numbered(ffn, hidden, start=100)
    fused = GATE_UP.merge([gate, up], ModelConfig())
    assert torch.equal(fused[:ffn], gate) and torch.equal(fused[ffn:], up)
    assert all(torch.equal(a, b) for a, b in zip(GATE_UP.split(fused, ModelConfig()), (gate, up), strict=True))


def test_copy_is_the_tensor_itself() -> None:
    tensor = numbered(3, 2)
    assert COPY.split(COPY.merge([tensor], ModelConfig()), ModelConfig())[0] is tensor


@settings(deadline=None, max_examples=30)
@given(vocabulary=st.integers(1, 9), padding=st.integers(0, 9), hidden=sizes)
def test_padding_of_the_vocabulary_is_zeros_and_comes_off(vocabulary: int, padding: int, hidden: int) -> None:
    tensor = numbered(vocabulary, hidden, start=1)
    padded = pad_vocabulary(tensor, vocabulary + padding)
    assert padded.shape == (vocabulary + padding, hidden) and not padded[vocabulary:].any()
    assert torch.equal(padded[:vocabulary], tensor)
