"""The models that the scripts of this folder measure, and the FLOPs of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from common import Llama, our_config

ONE_B = Llama(layers=16, hidden=2048, ffn=8192, heads=32, groups=8, vocab=128256, context=1024)  # Llama 3.2 1B, untied
# layers of Llama 3.1 8B: four of them, and a small vocabulary, whose training state fits one GPU
EIGHT_B = Llama(layers=4, hidden=4096, ffn=14336, heads=32, groups=8, vocab=32000, context=2048)
TINY = Llama(layers=2, hidden=64, ffn=128, heads=4, groups=2, vocab=512, context=64)  # rehearsals


def flops_per_token(shape: Llama, lengths: Sequence[int], passes: int) -> float:
    """Model FLOPs of a token on average over sequences of these lengths; 3 passes train, one reads.

    Padding and the scalar head are not counted.
    """
    from nemo_advrm.engine.flops import Microbatch, layer_flops

    model = our_config(shape).model
    whole = sum(layer_flops(model, Microbatch(1, length)).total for length in lengths)
    return passes * shape.layers * whole / sum(lengths)
