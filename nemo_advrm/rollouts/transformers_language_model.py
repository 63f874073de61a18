"""A frozen Hugging Face language model of any architecture that transformers has, on one rank of each model replica."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.convert.hf_directory import check_language_model, load_language_model
from nemo_advrm.data.batching import microbatch_cost, pad_rows, split_by_tokens
from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer, check_vocabulary
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.sampling import Sampling, pick
from nemo_advrm.errors import ConfigError
from nemo_advrm.rollouts.language_model import LanguageModel

T = TypeVar("T")


class TransformersLanguageModel(LanguageModel):
    """See :class:`LanguageModel`. The first rank of each replica holds the model and computes for the others.

    It needs no conversion table, and it cannot be trained. Generation is transformers' own, with its cache; only the
    choice of the next token is ours, so that a sample depends on its logits and its uniform numbers alone.

    Args:
        name: for messages.
        model: an ``AutoModelForCausalLM``, None on ranks that do not hold it.
        tokenizer: of the model.
        context: most tokens of a row.
        max_tokens: padded tokens of a batch.
        max_rows: rows of a batch.
    """

    def __init__(
        self,
        name: str,
        model: Any | None,
        tokenizer: Tokenizer,
        context: int,
        max_tokens: int = 4096,
        max_rows: int = 16,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        self.max_tokens = max_tokens
        self.max_rows = max_rows

    @classmethod
    def load(cls, path: Path, cfg: Config, tokenizer: Tokenizer | None = None) -> TransformersLanguageModel:
        """Loads a directory that ``save_pretrained`` wrote; all ranks call.

        Args:
            tokenizer: the model's, where it is open already.

        Raises CheckpointError for a directory that is no language model, is damaged or quantised, or whose vocabulary
        is smaller than the tokenizer's; DataError for a bad tokenizer.
        """
        from transformers import AutoConfig, GenerationConfig  # takes seconds to import

        check_language_model(path)
        tokenizer = tokenizer or HFTokenizer(path)
        described = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        text = described.get_text_config()
        check_vocabulary(tokenizer, int(text.vocab_size), f"hf:{path}")
        longest = int(getattr(text, "max_position_embeddings", 0) or 0)
        context = min(filter(None, (longest, cfg.model.encoder_seq_length)))
        rt, model = runtime.current(), None
        dtype = torch.float32 if cfg.precision.name == "fp32" else torch.bfloat16
        if rt.is_replica_source:
            model = load_language_model(path, dtype=dtype).to(rt.device).eval().requires_grad_(False)
            model.generation_config = GenerationConfig()  # the directory's own would change temperature and penalties
        settings = cfg.model
        rows = 4 * settings.micro_batch_size
        return cls(f"hf:{path}", model, tokenizer, context, settings.micro_batch_tokens, rows)

    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        """See :class:`LanguageModel`. Raises ConfigError for a prompt that is empty or leaves too little room."""
        for i, prompt in enumerate(prompts):
            self._check(i, len(prompt), sampling.max_new_tokens)
        return self._once(lambda: self._generate(prompts, sampling, uniforms_NT))

    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        for i, row in enumerate(rows):
            self._check(i, len(row), 0)
        return self._once(lambda: self._next_tokens(rows, min(count, self.tokenizer.vocab_size)))

    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        for i, row in enumerate(rows):
            self._check(i, len(row.tokens), 0)
        return self._once(lambda: self._log_probs(rows))

    def _check(self, place: int, length: int, more: int) -> None:
        if not length or length + more > self.context:
            raise ConfigError(
                f"{self.name}: row {place} has {length} tokens, and {more} are to follow; the model takes 1 to "
                f"{self.context} (model.encoder_seq_length, or the model's own positions)"
            )

    def _once(self, work: Callable[[], T]) -> T:
        """Calls ``work`` on the rank that holds the model and returns its result on all ranks of the replica."""
        return run_on_first_rank(runtime.current().replica, work) if runtime.is_running() else work()

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        assert self.model is not None
        cost = microbatch_cost(self.model.device)
        return split_by_tokens(lengths, self.max_tokens, self.max_rows, cost_of_one=cost)

    def _ban(self, logits_BV: Tensor) -> Tensor:
        """Gives no probability to control tokens and to the padding of the vocabulary, as in Megatron's policies."""
        logits_BV = logits_BV.float()
        logits_BV[:, list(self.tokenizer.control_ids)] = -torch.inf
        logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf
        return logits_BV

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        from transformers import GenerationConfig, LogitsProcessorList

        assert self.model is not None
        made: dict[int, list[int]] = {}
        for group in self._batches([len(prompt) + sampling.max_new_tokens for prompt in prompts]):
            tokens_BS, mask_BS = self._left_padded([prompts[i] for i in group])
            width, uniforms_BT = tokens_BS.size(1), uniforms_NT[group].to(tokens_BS.device)

            def choose(
                input_ids: Tensor, scores: Tensor, width: int = width, uniforms_BT: Tensor = uniforms_BT
            ) -> Tensor:
                """Leaves the picked token alone, which greedy search then takes."""
                picked_B = pick(self._ban(scores), uniforms_BT[:, input_ids.size(1) - width], sampling)
                return torch.full_like(scores, -torch.inf).scatter(1, picked_B[:, None], 0.0)

            options = GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(sampling.stop_tokens),
                pad_token_id=self.tokenizer.pad_id,
            )
            written = self.model.generate(
                tokens_BS,
                attention_mask=mask_BS,
                generation_config=options,
                logits_processor=LogitsProcessorList([choose]),
            )
            made.update(zip(group, written[:, width:].tolist(), strict=True))
        answers = [_until(made[i], sampling.stop_tokens) for i in range(len(prompts))]
        return Generation(answers, [bool(row) and row[-1] in sampling.stop_tokens for row in answers])

    @torch.no_grad()
    def _next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        assert self.model is not None
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        ids_NK, log_probs_NK = torch.zeros(len(rows), count, dtype=torch.int64), torch.zeros(len(rows), count)
        for group in self._batches([len(row) for row in rows]):
            tokens_BS, mask_BS = self._left_padded([rows[i] for i in group])
            positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
            logits_BV = self.model(
                tokens_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False, **last
            ).logits[:, -1]
            log_probs_BK, ids_BK = torch.log_softmax(self._ban(logits_BV), -1).topk(count)
            ids_NK[group], log_probs_NK[group] = ids_BK.cpu(), log_probs_BK.cpu()
        return ids_NK, log_probs_NK

    @torch.no_grad()
    def _log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        assert self.model is not None
        values_N = torch.zeros(len(rows))
        for group in self._batches([len(row.tokens) for row in rows]):
            tokens_BS, lengths_B = pad_rows([rows[i].tokens for i in group], self.tokenizer.pad_id)
            places_S = torch.arange(tokens_BS.size(1))
            mask_BS = places_S < lengths_B[:, None]
            device = self.model.device
            inputs = {"input_ids": tokens_BS.to(device), "attention_mask": mask_BS.long().to(device)}
            logits_BSV = self.model(**inputs, use_cache=False).logits
            targets_BS = tokens_BS[:, 1:].to(device)
            starts_B = torch.tensor([rows[i].prompt_length for i in group])
            predicted_BS = (mask_BS & (places_S >= starts_B[:, None]))[:, 1:].to(device)
            for place, (logits_SV, targets_S, predicted_S) in enumerate(
                zip(logits_BSV[:, :-1], targets_BS, predicted_BS, strict=True)
            ):
                log_probs_NV = torch.log_softmax(self._ban(logits_SV[predicted_S]), -1)
                picked_N = log_probs_NV.gather(-1, targets_S[predicted_S][:, None])
                values_N[group[place]] = picked_N.sum().cpu()
        return values_N

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows padded on the left, as generation needs them, and their attention mask; [B, S] each."""
        assert self.model is not None
        width = max(map(len, rows))
        tokens = [[self.tokenizer.pad_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(tokens, device=self.model.device), torch.tensor(mask, device=self.model.device)


def _until(row: list[int], stops: tuple[int, ...]) -> list[int]:
    """Returns the tokens up to the first stop token, with it."""
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row) - 1) + 1]
