"""The command ``pipeline``: all rounds of Adv-RM, then RLHF and the report."""

from __future__ import annotations

from dataclasses import replace

from nemo_advrm.config.layout import at_layout
from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline.dag import LIGHT, find, of_run
from nemo_advrm.pipeline.runner import Pipeline
from nemo_advrm.rewards.sources import refuse_people
from nemo_advrm.run_directory import run_dir


def main(cfg: Config) -> int:
    """Runs all steps that are not complete in ``run_dir`` and prints the report, or one step (``pipeline.only``)."""
    refuse_people(cfg, "pipeline")
    if cfg.policy_server.policy:
        raise ConfigError("policy_server.policy: a pipeline trains the policy that it starts from, so no server has it")
    only = None
    if cfg.pipeline.only:
        only = find(of_run(cfg)[1], cfg.pipeline.only)
    run_dir.start(_one_process(cfg) if only and only.kind in LIGHT else cfg)
    Pipeline(cfg).run(only)
    return 0


def _one_process(cfg: Config) -> Config:
    """Returns the configuration with the layout of one process, for a step that uses no model."""
    return replace(cfg, model=at_layout(cfg.model))
