"""GGUF files whose headers claim what the file does not hold: one line each, before memory is taken."""

from __future__ import annotations

import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nemo_advrm import gguf_limits
from nemo_advrm.convert.hf_source import HFSource
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import CheckpointError, DataError
from nemo_advrm.gguf_limits import check_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def file(
    path: Path,
    fields: tuple[bytes, ...] = (),
    shapes: tuple[tuple[list[int], int, int], ...] = (([4, 8], 0, 0),),
    data: int = 128,
    **claims: int,
) -> Path:
    """A file with fp32 tensors as (shape, type, offset); ``claims`` are counts other than the true ones."""
    counts = claims.get("tensors", len(shapes)), claims.get("field_count", len(fields))
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(fields)
    for number, (shape, kind, offset) in enumerate(shapes):
        sizes = struct.pack(f"<I{len(shape)}Q", claims.get("dimensions", len(shape)), *shape)
        header += text(f"blk.{number}.weight") + sizes + struct.pack("<IQ", kind, offset)
    path.write_bytes(header + bytes(-len(header) % 32 + data))
    return path


def test_a_file_of_the_library_is_accepted(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_feed_forward_length([96])
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_bool("llama.some", True)
    rng = np.random.default_rng(0)
    for name, shape in {"token_embd.weight": (3, 64), "blk.0.ffn_up.weight": (96, 64), "rope": (5,)}.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    packed = gguf.quants.quantize(rng.standard_normal((64, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for length in (3, 10, 40, 300, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: damaged: "):
            check_header(tmp_path / "cut.gguf")


HUGE = 1 << 60
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tensors": ({"tensors": HUGE}, f"claims {HUGE} tensors"),
    "fields": ({"field_count": HUGE}, rf"and {HUGE} fields"),
    "dimensions": ({"dimensions": 1 << 31}, "2147483648 dimensions"),
    "a large tensor": ({"shapes": [([HUGE, HUGE], 0, 0)]}, "blk.0.weight claims"),
    "a tensor elsewhere": ({"shapes": [([4, 8], 0, HUGE)]}, "blk.0.weight claims 128 bytes at"),
    "one tensor in another": ({"shapes": [([4, 8], 0, 0)] * 2}, "blk.1.weight lies in another tensor"),
    "a format": ({"shapes": [([4, 8], 4_000, 0)]}, "4000 is not a valid"),
    "a text": ({"fields": [field("a", 8, struct.pack("<Q", HUGE))]}, f"a claims {HUGE} bytes"),
    "a name": ({"fields": [struct.pack("<QI", HUGE, 4)]}, f"a name claims {HUGE} bytes"),
    "an array": ({"fields": [field("a", 9, struct.pack("<IQ", 4, 3_000_000))]}, "a claims 3000000 values"),
    "a long array": ({"fields": [field("a", 9, struct.pack("<IQ", 0, HUGE))]}, "header has more than 4000000 values"),
    "arrays in arrays": ({"fields": [field("a", 9, struct.pack("<IQ", 9, 1) * 10_000)]}, "a has values of the type 9"),
    "a type": ({"fields": [field("a", 99, b"")]}, "a has values of the type 99"),
    "an alignment": ({"fields": [field("general.alignment", 4, struct.pack("<I", 0))]}, "no power of two"),
    "layers": ({"fields": [field("llama.block_count", 4, struct.pack("<I", 10**9))]}, "llama.block_count=1000000000"),
    "a width": ({"fields": [field("llama.embedding_length", 4, struct.pack("<I", 10**9))]}, "largest dimension .* 8$"),
    "widths": (
        {"fields": [field("llama.feed_forward_length", 9, struct.pack("<IQ2I", 4, 2, 8, 9))]},
        "llama.feed_forward_length=9",
    ),
    "heads": ({"fields": [field("llama.attention.head_count", 11, struct.pack("<q", -1))]}, "head_count=-1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_claim_that_the_file_does_not_bear_out_is_one_line(kind: str, tmp_path: Path) -> None:
    changes, words = BAD[kind]
    path = file(tmp_path / "model.gguf", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=words) as caught:
        HFSource(path)
    assert str(caught.value).startswith(f"{path}: damaged: ") and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=words):
        build_tokenizer(f"hf:{path}")
    if kind != "tensors":  # the first one imports transformers
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_the_values_of_all_fields_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_limits, "_MAX_VALUES", 10)
    fields = tuple(field(f"a{i}", 9, struct.pack("<IQ", 0, 4) + b"1234") for i in range(3))
    check_header(file(tmp_path / "two.gguf", fields[:2]))
    with pytest.raises(CheckpointError, match="a2: the header has more than 10 values"):
        check_header(file(tmp_path / "three.gguf", fields))
