"""NeMo-Aligner's REINFORCE and PPO actors with recording of the responses that an attack finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from omegaconf import DictConfig, open_dict

from nemo_advrm.errors import ConfigError
from nemo_advrm.integrations.nemo_aligner.client import EnsembleRewardClient
from nemo_advrm.integrations.nemo_aligner.parallel_layout import refuse_context_parallelism
from nemo_advrm.integrations.nemo_aligner.recorder import AdversarialRecorder


class MegatronGPTAdversarialActorModel(NLPAdapterModelMixin, MegatronGPTModel, AlignableGenerativeInterface):
    """An actor trained to find responses that one reward model of an ensemble scores high and the others do not.

    The reward comes from its client (:class:`EnsembleRewardClient`, or NeMo-Aligner's own client of ``nemo-advrm
    serve``). With ``model.reinforce`` in the configuration it is NeMo-Aligner's REINFORCE actor, with ``model.ppo`` its
    PPO actor. Its .nemo files name NeMo-Aligner's classes and open without this package.

    Raises ConfigError when the configuration has neither or both sections, or uses context parallelism.
    """

    _file_class: type | None = None  # the class named in .nemo files
    _recorder: AdversarialRecorder | None = None
    _step_metrics: dict[str, float] | None = None

    def __new__(cls, cfg: DictConfig, trainer: Any) -> Any:
        if cls is MegatronGPTAdversarialActorModel:
            sections = [name for name in ("reinforce", "ppo") if name in cfg]
            if len(sections) != 1:
                raise ConfigError(f"model must have exactly one of the sections reinforce and ppo, not {len(sections)}")
            cls = _ReinforceActor if sections == ["reinforce"] else _PPOActor
        return super().__new__(cls)

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        refuse_context_parallelism(cfg.get("context_parallel_size", 1))
        assert self._file_class is not None
        with open_dict(cfg):
            cfg.target = f"{self._file_class.__module__}.{self._file_class.__name__}"
        super().__init__(cfg, trainer=trainer)

    def record(self, client: EnsembleRewardClient, run_dir: str | Path, policy: str, step: int = 0) -> None:
        """Record training responses from now on; all ranks call it.

        Every response is written with scores, z and Z(U) to ``RUN_DIR/attack/samples.jsonl``, and the means of each
        step are added to the trainer's metrics; see :class:`AdversarialRecorder`.
        """
        self._recorder = AdversarialRecorder(client, Path(run_dir) / "attack" / "samples.jsonl", policy, step)

    def prepare_for_inference(self) -> None:
        super().prepare_for_inference()
        if self._recorder is not None:
            self._recorder.begin()

    def prepare_for_training_step(self) -> None:
        super().prepare_for_training_step()
        if self._recorder is not None:
            self._step_metrics = self._recorder.record() or self._step_metrics

    def get_loss_and_metrics(self, batch: Any, forward_only: bool) -> tuple[float, dict[str, float]]:
        loss, metrics = super().get_loss_and_metrics(batch, forward_only)
        return loss, {**metrics, **(self._step_metrics or {})}


class _ReinforceActor(MegatronGPTAdversarialActorModel, MegatronGPTReinforceActorModel):
    _file_class = MegatronGPTReinforceActorModel


class _PPOActor(MegatronGPTAdversarialActorModel, MegatronGPTActorModel):
    _file_class = MegatronGPTActorModel
