"""The configuration schema: every key that exists, with its type, default, help line, limits, choices and role.

The YAML files under ``conf/`` only give values to these keys. A key that is not here is an error that names the nearest
one (see :mod:`nemo_advrm.config.compose`). Keys that NeMo and NeMo-Aligner users know keep their names
(``trainer.devices``, ``model.tensor_model_parallel_size``, ``model.optim``). The classes are in the ``schema_*``
modules beside this one, one a subject; docs/configuration.md is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.fields import NOT_NEGATIVE, Restart, free, key, section
from nemo_advrm.config.schema_audit import AuditConfig
from nemo_advrm.config.schema_commands import (
    BestOfNConfig,
    ConvertConfig,
    EvaluateConfig,
    ExpManagerConfig,
    ExportPairsConfig,
    PlanConfig,
    ReportConfig,
    ServeConfig,
    StageConfig,
)
from nemo_advrm.config.schema_data import (
    DataConfig,
    EnsembleConfig,
    JudgeConfig,
    PolicyServerConfig,
    RemoteConfig,
    RewardModelConfig,
    SyntheticConfig,
)
from nemo_advrm.config.schema_method import (
    AdversarialConfig,
    AugmentationConfig,
    BranchConfig,
    DetectorConfig,
    HardenConfig,
    KLConfig,
    PipelineConfig,
    RLConfig,
    RLHFRunConfig,
    SelectionConfig,
    SFTStatisticsConfig,
)
from nemo_advrm.config.schema_model import (
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainedConfig,
    ScheduleConfig,
    TrainerConfig,
)


@dataclass
class Config:
    """Root of the configuration."""

    name: str = free("advrm", "name of the run")
    seed: int = key(0, "seed of every random number", NOT_NEGATIVE)
    run_dir: str = free("runs/${name}", "directory that everything is written to")
    trainer: TrainerConfig = section(TrainerConfig)
    model: ModelConfig = section(ModelConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    pretrained_checkpoint: PretrainedConfig = section(PretrainedConfig)
    data: DataConfig = section(DataConfig)
    reward_model: RewardModelConfig = section(RewardModelConfig)
    ensemble: EnsembleConfig = section(EnsembleConfig)
    remote: RemoteConfig = section(RemoteConfig)
    judge: JudgeConfig = section(JudgeConfig)
    policy_server: PolicyServerConfig = section(PolicyServerConfig)
    sft_statistics: SFTStatisticsConfig = section(SFTStatisticsConfig)
    adversarial: AdversarialConfig = section(AdversarialConfig)
    detector: DetectorConfig = section(DetectorConfig)
    rl: RLConfig = section(RLConfig)
    selection: SelectionConfig = section(SelectionConfig)
    augmentation: AugmentationConfig = section(AugmentationConfig)
    pipeline: PipelineConfig = section(PipelineConfig)
    harden: HardenConfig = section(HardenConfig)
    synthetic: SyntheticConfig = section(SyntheticConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    best_of_n: BestOfNConfig = section(BestOfNConfig)
    report: ReportConfig = section(ReportConfig, restart=Restart.FREE)
    serve: ServeConfig = section(ServeConfig, restart=Restart.FREE)
    plan: PlanConfig = section(PlanConfig, restart=Restart.FREE)
    stage: StageConfig = section(StageConfig)
    exp_manager: ExpManagerConfig = section(ExpManagerConfig, restart=Restart.FREE)
