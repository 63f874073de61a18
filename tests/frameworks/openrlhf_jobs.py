"""Jobs in OpenRLHF's environment: its own executor asks the server; only the text that vLLM would write is given."""

from __future__ import annotations

import asyncio
import importlib
import sys
import types
from typing import Any


class WrittenResponses:
    """In the place of vLLM's engine: returns given token ids as a completion."""

    def __init__(self, tokens: list[int], text: str, ended: bool) -> None:
        reason = "stop" if ended else "length"
        completion = types.SimpleNamespace(token_ids=tokens, text=text, finish_reason=reason, logprobs=None)
        self.output = types.SimpleNamespace(outputs=[completion])

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        return self.output


def roll_out(urls: list[str], policy: str, chats: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``SingleTurnAgentExecutor`` returns, and the rewards and scores of the ``Experience`` made of it."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    executor = SingleTurnAgentExecutor(urls)
    params = types.SimpleNamespace(max_tokens=64, logprobs=None)

    async def one(chat: dict[str, Any]) -> Any:
        messages = [{"role": "user", "content": chat["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.encode(chat["response"], add_special_tokens=False)
        tokens += [tokenizer.eos_token_id] * chat["ended"]
        engine = WrittenResponses(tokens, chat["response"], chat["ended"])
        return await executor.execute(prompt, chat.get("label"), params, 256, tokenizer, engine)

    async def all_at_once() -> Any:
        return await asyncio.gather(*(one(chat) for chat in chats))

    outputs = asyncio.run(all_at_once())
    experiences = [_experience(output) for output in outputs]
    return {
        "reward": [output["reward"] for output in outputs],
        "scores": [output["scores"] for output in outputs],
        "tensors": [None if e.rewards is None else e.rewards.flatten().tolist() for e in experiences],
    }


def _experience(output: dict[str, Any]) -> Any:
    """OpenRLHF's own conversion; its module imports vLLM, which is not here, for two names that it does not use."""
    if "vllm" not in sys.modules:
        for name, attributes in (("vllm", ["SamplingParams"]), ("vllm.inputs", ["TokensPrompt"]), ("vllm.utils", [])):
            module = types.ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, object)
            sys.modules[name] = module
        sys.modules["vllm.utils"].random_uuid = lambda: ""  # type: ignore[attr-defined]
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    generator = SamplesGenerator.__new__(SamplesGenerator)
    return generator._process_response_into_experience(output, max_len=256)


roll_out_refused = roll_out


def imports(modules: list[str]) -> dict[str, str]:
    """The error that the import of each module raises here, or ""."""
    errors = {}
    for module in modules:
        try:
            importlib.import_module(module)
            errors[module] = ""
        except Exception as error:
            errors[module] = str(error)
    return errors
