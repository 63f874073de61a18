"""A training by TRL on the reward of the server: the shipped example, as a user runs it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Served
from hf_models import tiny_hf
from tiny import TOKENIZER, tiny_config

from nemo_advrm.data.messages import Message
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.synthetic.language import WORDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl" / "grpo.py"
STEPS = 3


def _save_policy(directory: Path) -> None:
    """A random model over the words of the embedded language, which the served models read."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *(w for w in WORDS if not w.startswith("<"))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    size = {"vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    tiny_hf("llama3", 0, **size).save_pretrained(directory)


def test_grpo_trains_on_the_rewards_of_the_server(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="needs trl")
    asked: list[tuple[str, str, float]] = []
    example = runpy.run_path(str(EXAMPLE))
    make = example["trl_reward"]

    def recorded(url: str) -> Any:
        ask = make(url)

        def reward(prompts: list[str], completions: list[str], **rest: Any) -> list[float]:
            rewards = ask(prompts, completions, **rest)
            asked.extend(zip(prompts, completions, rewards, strict=True))
            return rewards

        return reward

    monkeypatch.setitem(example["main"].__globals__, "trl_reward", recorded)
    _save_policy(tmp_path / "policy")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("this river", "these clouds", "this garden")))
    example["main"](
        model=str(tmp_path / "policy"),
        prompts=str(prompts),
        server=served.server.address,
        out=str(tmp_path / "out"),
        steps=STEPS,
        max_completion_length=16,
    )

    assert len(asked) == STEPS * 8 and len({response for _, response, _ in asked}) > 8
    members = load_members(tiny_config(), [str(p) for p in served.members], TOKENIZER)
    rollouts = Rollouts(
        prompts=[(Message(role="user", content=prompt),) for prompt, _, _ in asked],
        responses=[response for _, response, _ in asked],
        ended=[True] * len(asked),
        prompt_tokens=[[]] * len(asked),
        response_tokens=[[]] * len(asked),
        prompt_index=[0] * len(asked),
        fingerprint="of TRL's tokenizer",
    )
    expected = UncertaintyReward(members).compute_rewards(rollouts).rewards_N
    assert [reward for _, _, reward in asked] == pytest.approx(expected.tolist(), abs=1e-4)

    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "out"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
