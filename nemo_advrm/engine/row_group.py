"""Rows of a batch that are generated together, while other rows are at other stages of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_advrm.data.batching import pad_rows
from nemo_advrm.engine import runtime
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.passes import prompt_passes, token_pass
from nemo_advrm.engine.sampling import Sampling, pick
from nemo_advrm.engine.stages import Pass, Stages
from nemo_advrm.engine.step_graphs import StepGraphs
from nemo_advrm.engine.step_shapes import StepShapes
from nemo_advrm.engine.written import Written


class RowGroup:
    """Prompts that become responses, a pass for every token. Every stage has the same group and the same tokens.

    Args:
        prompts: of ascending lengths.
        uniforms_BT: [len(prompts), max_new_tokens].
        cache: of this group alone until its responses are written.
        graphs: for its steps; may be those of other groups too.
    """

    def __init__(
        self,
        stages: Stages,
        prompts: list[list[int]],
        sampling: Sampling,
        uniforms_BT: Tensor,
        cache: KVCache,
        graphs: StepGraphs | None,
        shapes: StepShapes,
    ) -> None:
        rt = runtime.current()
        self._stages, self._sampling, self._cache, self._graphs, self._shapes = stages, sampling, cache, graphs, shapes
        self._prompts_BS, self._lengths_B = (tensor.to(rt.device) for tensor in pad_rows(prompts, pad_id=0))
        self._uniforms_BT = uniforms_BT.to(rt.device)
        self._written = Written(len(prompts), sampling, rt.device, shapes.look_every)
        self._picks = rt.is_last_stage
        self._next = 0  # token that the passes under way lead to
        self._logits: list[Tensor] = []  # of the prompts
        self._tokens_B = torch.empty(0, dtype=torch.int64)
        self._ended = False

    def prompt_passes(self, model: MegatronModel) -> Iterator[Pass]:
        """The passes that lead to token 0."""
        return prompt_passes(model, self._prompts_BS, self._lengths_B, self._cache, self._logits.append)

    def pick_first(self) -> None:
        """Pick token 0; called when the passes over the prompts of all groups are made.

        Not earlier: a first message between two ranks waits until both are there, and the others may need more passes
        of the last stage before they ask for tokens.
        """
        if self._picks:
            self._pick(torch.cat(self._logits))
            self._logits.clear()

    def pass_after(self, t: int) -> Pass | None:
        """The pass after token ``t``, for which it waits; None where all rows end with it or have ended before."""
        if self._ended:
            return None
        rows = self._written.rows_B.numel()
        tokens_B = self._tokens_B if self._picks else self._stages.shared_tokens(rows)
        self._written.add(t, tokens_B)
        if t + 1 == self._sampling.max_new_tokens:
            return None
        if t:
            self._cache.advance()
        else:
            self._cache.start_decoding()
        running = self._written.running(t)
        if running is not None:
            if not running.numel():
                self._ended = True
                return None
            kept = self._shapes.rows_to_keep(running, rows)
            if kept is not None:
                self._cache.keep_rows(kept)
                kept = kept.to(tokens_B.device)
                self._written.keep_rows(kept)
                tokens_B = tokens_B[kept]
        self._next = t + 1
        return token_pass(tokens_B, self._cache, self._graphs, self._pick)

    def _pick(self, logits_BV: Tensor) -> None:
        """Pick the next token of every row, and send them to the other stages."""
        self._tokens_B = pick(logits_BV, self._uniforms_BT[self._written.rows_B, self._next], self._sampling)
        self._stages.share_tokens(self._tokens_B)

    def responses(self) -> tuple[list[list[int]], list[bool]]:
        """Tokens of every row, and whether it has ended with a stop token."""
        return self._written.responses()
