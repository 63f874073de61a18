"""Watches how much of what a served policy writes still counts for the policy that learns from it."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.engine import runtime
from nemo_advrm.models.off_policy import ESS, GAP, MEAN_RATIO
from nemo_advrm.models.policy import PolicyModel

# nats a token: kernels and number formats differ by less, other weights by more
_LARGEST_GAP = 0.1

_log = logging.getLogger(__name__)


class ServedPolicyWatch(Callback):
    """Ends a training, or warns, at the step whose effective sample size is below ``policy_server.min_ess``.

    It is taken times the mean ratio where that is below 1: where all ratios are equally small it is the whole, and
    nothing is learned. The server never gets the trained weights, so that every training gets there in the end. At
    the first step it warns when the served policy is not the one that the training starts from.

    It must come before callbacks that act at the last step of a training.
    """

    def __init__(self) -> None:
        self._is_told = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModel)
        options, step = pl_module.config.policy_server, trainer.global_step - 1
        ess, ratio, gap = (pl_module.step_metrics[name] for name in (ESS, MEAN_RATIO, GAP))
        warn = _log.warning if runtime.current().is_writer else _log.debug
        if step == 0 and gap > _LARGEST_GAP:
            warn(
                "%s tells log-probabilities that differ by %.2f nats a token from those of "
                "pretrained_checkpoint.restore_from_path: it seems to be another policy, or policy_server.log_probs "
                "should be never",
                options.policy,
                gap,
            )
        if ess * min(1.0, ratio) >= options.min_ess or self._is_told:
            return
        self._is_told = True
        ends = options.below_min_ess == "end"
        warn(
            "step %d: the responses of the served policy have an effective sample size of %.3f of their number, at a "
            "mean ratio of %.3g, together below policy_server.min_ess=%g: the trained policy has become another. %s "
            "(docs/attacks.md)",
            step,
            ess,
            ratio,
            options.min_ess,
            "The training ends here, with what it has learned" if ends else "It goes on (policy_server.below_min_ess)",
        )
        if ends:
            # so that the other callbacks treat this step as the last one
            pl_module.max_steps = trainer.global_step
            trainer.should_stop = True


def served_policy_watch(module: PolicyModel) -> list[Callback]:
    """Returns the watch of a training that learns from a served policy; of another one, none."""
    return [] if module.behaviour is None else [ServedPolicyWatch()]
