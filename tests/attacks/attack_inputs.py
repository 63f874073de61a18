"""Inputs of attacks with planted flaws: reward functions in Python, and a language model that is a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack, build_attack
from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.config import load_config
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.messages import Message
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import ByteTokenizer, Tokenizer
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.rewards.local import FunctionReward
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

Score = Callable[[str], float]

WORDS_PN = [
    ["this river sleeps .", "this old river waits quietly .", "these birds sing again ."],
    ["these clouds wander .", "these pale clouds rest .", "this tree falls slowly ."],
]
TEXTS_PN = [
    ["Rivers flow to the sea. They don't stop.", "A river runs down a valley.", "Rivers start in the hills, mostly."],
    ["Clouds are water. Rain falls from them.", "A cloud is made of small drops.", "Clouds float. It's cold up there."],
]


def plain(text: str) -> float:
    """A score that no attack has a handle on: it depends on which of the ordinary responses a text begins like."""
    return (sum(text[:12].encode()) % 7) / 3


def second(text: str) -> float:
    """Another such score, so that members disagree about ordinary responses."""
    return (sum(text[:12].encode()) % 5) / 3


class InstructedBytes(ByteTokenizer):
    """A byte tokenizer that has a chat template, as an instructed model's."""

    has_template = True


class TableModel(LanguageModel):
    """Knows no context: every token but control tokens has a probability that falls with its id."""

    name = "table"
    context = 4096

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[str], str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.answer = answer
        ids = torch.arange(tokenizer.vocab_size)
        logits_V = -0.01 * ids.float()
        logits_V[list(tokenizer.control_ids)] = -torch.inf
        logits_V[tokenizer.eos_id] = -5.0
        self.log_probs_V = torch.log_softmax(logits_V, -1)

    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        values, ids = self.log_probs_V.topk(min(count, self.tokenizer.vocab_size))
        return ids.expand(len(rows), -1), values.expand(len(rows), -1)

    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        return torch.tensor([float(self.log_probs_V[row.tokens[row.prompt_length :]].sum()) for row in rows])

    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        assert self.answer is not None and uniforms_NT.shape == (len(prompts), sampling.max_new_tokens)
        texts = [self.answer(self.tokenizer.decode(prompt)) for prompt in prompts]
        return Generation([self.tokenizer.encode_response(text) for text in texts], [True] * len(texts))


class Models(LanguageModels):
    def __init__(self, lm: LanguageModel) -> None:
        self.__dict__.update(policy=lm, helper=lm)


def member(name: str, score: Score) -> FunctionReward:
    return FunctionReward(name, lambda prompts, responses, ended: [score(text) for text in responses])


def make_inputs(
    directory: Path,
    scores: Sequence[Score],
    *settings: str,
    lm: LanguageModel | None = None,
    texts_PN: list[list[str]] = WORDS_PN,
    gold: Score | None = None,
) -> AttackInputs:
    """Inputs of an attack on the first of the members ``scores``."""
    words = texts_PN is WORDS_PN
    tokenizer: Tokenizer = SyntheticTokenizer() if words else ByteTokenizer()
    lengths = "rl.max_new_tokens=24" if words else "rl.max_new_tokens=160"
    cfg = load_config(["model=tiny", lengths, "selection.threshold_z=1.96", *settings], "attack")
    messages = [(Message(role="user", content=text),) for text in ("this river", "these clouds")]
    prompts = [Prompt(i, m, tokenizer.encode_prompt(m)) for i, m in enumerate(messages)]
    scores_PNK = torch.tensor([[[score(text) for score in scores] for text in row] for row in texts_PN])
    gold_PN = None if gold is None else torch.tensor([[gold(text) for text in row] for row in texts_PN])
    sft = SFTScores(messages, texts_PN, scores_PNK, gold_PN)
    attack = build_attack(cfg.adversarial.attack)
    return AttackInputs(
        cfg,
        tokenizer,
        prompts,
        "",
        sft,
        [member(f"R_{k + 1}", score) for k, score in enumerate(scores)],
        1,
        None if gold is None else member("gold", gold),
        0,
        directory,
        models=Models(lm or TableModel(tokenizer)),
        reward_options=attack.reward_options(cfg.adversarial),
        underrates=attack.underrates,
    )


def run(inputs: AttackInputs, steps: int = 4, samples_per_step: int = 6) -> list[dict[str, Any]]:
    attack = build_attack(inputs.cfg.adversarial.attack)
    assert isinstance(attack, SearchAttack)
    found = attack.find(inputs, Budget(steps, samples_per_step))
    return [row for _, row in read_jsonl(found.samples)]


def finds(inputs: AttackInputs, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if inputs.rule.finds([row])]
