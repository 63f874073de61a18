"""A client of NeMo-Aligner's critic server for its PPO trainer; a failed request ends the step that needs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMCriticClient
from nemo_aligner.servers.http_communicator import HTTPCommunicator
from nemo_aligner.utils.distributed import run_if_model_parallel_src
from nemo_aligner.utils.server_utils import FutureResult
from omegaconf import DictConfig
from pytriton.client import FuturesModelClient, ModelClient
from pytriton.client.exceptions import PyTritonClientTimeoutError
from torch import Tensor

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.integrations.nemo_aligner.agreement import WAIT_SECONDS, run_in_job, run_in_replica

# A request fails when a server that was ready is unreachable for this many seconds.
_AWAY_SECONDS = 10.0


class CriticClient(RemoteGPTRMCriticClient):
    """NeMo-Aligner's client of its critic server, used for values only.

    NeMo-Aligner never checks the result of a training pass. This client raises the error of a failed pass at the next
    request for values or a checkpoint.

    Args:
        cfg: ``remote_critic_rm`` of NeMo-Aligner's configuration with two additional keys: ``connect_seconds``, the
            time in which the server must become ready, and ``wait_seconds``, the maximum wait for values, a training
            pass or a checkpoint (below the 30 minutes of the process groups). Its ``reward_model`` is not used. The
            critic must be served with ``trainer.ppo.combine_rm_and_critic_server=True``, NeMo-Aligner's default
            (without it the server of 0.7.0 fails at every request); the rewards of such a server are ignored.

    Raises:
        RewardSourceError: no server at the address became ready; raised on all ranks.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.pad_to_length = cfg.pad_to_length
        self.wait_seconds = float(cfg.get("wait_seconds", WAIT_SECONDS))
        self.name = f"the critic at {cfg.critic.ip}:{cfg.critic.port}"
        self._training: Future[Any] | None = None
        models = [cfg.critic.name[key] for key in ("infer", "train", "save")]
        first = torch.distributed.get_rank() == 0
        run_in_job((lambda: self._await_server(models)) if first else None, self.name)
        self.communicator = _Connections(self.wait_seconds)
        for model in models:
            self.communicator.add_server_by_name(model, cfg.critic.ip, cfg.critic.port)

    def infer_values(self, rollout_batch: Any) -> Callable[[], Tensor]:
        """Request the values of a batch; return a function that waits for them.

        All ranks of a replica call the function; it returns [B, S - 1] on the actor's device and raises
        RewardSourceError for a failed request or values of a wrong shape.
        """
        tokens = rollout_batch["response_tokens"].cpu()
        rows, length = tokens.shape
        if self.pad_to_length is not None:
            if length > self.pad_to_length:
                raise RewardSourceError(f"remote_critic_rm.pad_to_length={self.pad_to_length}: a batch has {length}")
            tokens = torch.nn.functional.pad(tokens, (0, self.pad_to_length - length), value=0)
        lengths = rollout_batch["response_lengths"].unsqueeze(1).cpu()
        future = run_if_model_parallel_src(
            self.communicator.send_data_to_server,
            server_name=self.cfg.critic.name.infer,
            data={"tokens": tokens.numpy(), "sequence_lengths": lengths.numpy()},
        )

        def values() -> Tensor:
            end = time.monotonic() + self.wait_seconds
            self._await_training()
            found = torch.tensor(future.result(timeout=max(0.0, end - time.monotonic()))["values"])
            if found.dim() != 2 or len(found) != rows or found.size(1) < length - 1:
                raise RewardSourceError(f"{self.name} sent values {tuple(found.shape)} for tokens {(rows, length)}")
            return found[:, : length - 1].contiguous()

        def result() -> Tensor:
            return run_in_replica(None if future is None else values, self.name).to(torch.cuda.current_device())

        return result

    def train(self, ppo_rollout_data: Any) -> Any:
        """Start one critic update; return the future of its loss on rank 0."""
        self._training = super().train(ppo_rollout_data)
        return self._training

    def save(self) -> FutureResult:
        """Save the critic after its last training pass; return the future. All ranks call it and wait for it."""
        first = torch.distributed.get_rank() == 0
        run_in_job(self._await_training if first else None, self.name)
        return _Saved(self, super().save().pytriton_save_future)

    def _await_training(self) -> None:
        """Wait for the current training pass, which only rank 0 has, and raise its error."""
        training, self._training = self._training, None
        if training is not None:
            training.result(timeout=self.wait_seconds)

    def _await_server(self, models: list[str]) -> None:
        limit = float(self.cfg.get("connect_seconds", 600.0))
        deadline = time.monotonic() + limit
        for model in models:
            with ModelClient(f"http://{self.cfg.critic.ip}:{self.cfg.critic.port}", model) as client:
                try:
                    client.wait_for_model(max(deadline - time.monotonic(), 1.0))
                except PyTritonClientTimeoutError:
                    raise RewardSourceError(
                        f"{self.name} did not serve {model} within {limit:g} s (remote_critic_rm.connect_seconds)"
                    ) from None


class _Saved(FutureResult):
    def __init__(self, client: CriticClient, future: Any) -> None:
        self._client, self._future = client, future

    def result(self) -> None:
        future, wait = self._future, self._client.wait_seconds
        run_in_job(None if future is None else lambda: future.result(timeout=wait), self._client.name)


class _Connections(HTTPCommunicator):
    """Connections with a timeout: NeMo-Aligner's wait for a week, which blocks exit when the server is dead."""

    def __init__(self, wait_seconds: float) -> None:
        super().__init__(init_timeout_s=_AWAY_SECONDS)
        self.wait_seconds = wait_seconds

    def add_server_by_name(self, server_name: str, ip: str = "localhost", port: int = 5555) -> None:
        client = FuturesModelClient(
            f"http://{ip}:{port}",
            server_name,
            init_timeout_s=self.init_timeout_s,
            inference_timeout_s=self.wait_seconds,
        )
        self.connections[server_name] = (ip, port, client)
