"""A reward manager of verl that scores responses by a server of ``nemo-advrm serve``.

verl's own way to a reward model starts vLLM or SGLang on GPUs and asks that; it has no setting for another server. Its
custom reward function gets the response without the prompt's messages and without its end. A reward manager gets both,
and verl loads one from outside by ``reward.reward_manager.source=importlib``.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from nemo_advrm.config.schema import RemoteConfig
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.rewards.remote import ServerReward


class AdvRMRewardManager(RewardManagerBase):
    """Asks the server for the reward of one response; verl calls many at once, and the server batches them.

    ``reward.reward_kwargs.server`` of verl's configuration is an address, or several as ``http://A:1|http://B:1``.
    Raises ConfigError without it, and RewardSourceError when the server refuses or does not answer.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        server = (config.reward.get("reward_kwargs") or {}).get("server")
        if not server:
            raise ConfigError("set +reward.reward_kwargs.server to the address of nemo-advrm serve")
        self.source = ServerReward(server, str(server).split("|"), RemoteConfig())
        self.special_ids = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.special_ids |= set(tokenizer.all_special_ids)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Returns ``reward_score`` of the last row of ``data`` (verl's DataProto of one trajectory)."""
        row = self._row(data[-1:][0])
        score = await self.loop.run_in_executor(None, lambda: self.source.ask([row]))
        return {"reward_score": score.item(), "reward_extra_info": {}}

    def _row(self, item: Any) -> dict[str, Any]:
        """Returns the sample of ``/v1/score``: the prompt's messages, the response, and whether it ended by itself."""
        turns = item.non_tensor_batch.get("__num_turns__")
        if turns is not None and turns > 2:
            raise DataError(f"a trajectory of {turns} turns: only single responses to a prompt are scored")
        if item.non_tensor_batch.get("raw_prompt") is None:
            raise DataError("verl's batch has no raw_prompt: the messages of the prompt are needed")
        tokens = item.batch["responses"].tolist()[: self._response_length(item)]
        end = len(tokens)
        while end and tokens[end - 1] in self.special_ids:
            end -= 1
        return {
            "messages": [{"role": m["role"], "content": m["content"]} for m in item.non_tensor_batch["raw_prompt"]],
            # special tokens before the end stay in the text: leaving them out would score what was not written
            "response": self.tokenizer.decode(
                tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            "ended": end < len(tokens),
        }

    @staticmethod
    def _response_length(item: Any) -> int:
        # rows of a trajectory are padded behind the response, so only response_len says its length; batches of several
        # prompts are padded between prompt and response, and have a mask
        length = item.non_tensor_batch.get("response_len")
        if length is None:
            length = item.batch["attention_mask"][-item.batch["responses"].shape[-1] :].sum()
        return int(length)
