"""The command ``plan``: whether a stage fits its GPUs, how long a step takes, and which layout would be faster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.engine.gpus import GPUS, GPUS_PER_NODE, supports
from nemo_advrm.engine.parameters import model_parameters, stage_parameters
from nemo_advrm.errors import ConfigError
from nemo_advrm.plan.job_types import Held, Job
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.memory import RankMemory, all_stages, budget
from nemo_advrm.plan.search import Candidate, search, single_changes
from nemo_advrm.plan.step_time import Clock
from nemo_advrm.plan.text import change_line, describe_job, layout_line, memory_table, nodes_of, time_lines

DOES_NOT_FIT = 1


def main(cfg: Config) -> int:
    """Prints the plan of ``plan.stage``; returns 1 when it does not fit, or with ``plan.search`` when nothing fits.

    Raises ConfigError or LayoutError that names the keys of a layout that cannot be built.
    """
    gpus = cfg.plan.gpus or cfg.trainer.devices * cfg.trainer.num_nodes
    if not supports(cfg.plan.gpu, cfg.precision.name):
        raise ConfigError(f"precision.name={cfg.precision.name}: plan.gpu={cfg.plan.gpu} cannot compute in it")
    size = tokenizer_size(cfg)
    if cfg.plan.search:
        return _search(cfg, gpus, size)
    validate_layout(cfg, gpus)
    job = job_of(cfg, gpus, size)
    _check_by_building(job)
    stages = all_stages(job)
    print("\n".join([*describe_job(job, _parameters(job)), *memory_table(job, stages)]))
    print("\n".join(time_lines(job, Clock(job).step())))
    if fits(cfg, stages):
        print(f"it fits; {_submit_line(cfg, gpus, [])}")
        return 0
    _print_changes(single_changes(cfg, gpus, size))
    return DOES_NOT_FIT


def fits(cfg: Config, stages: Sequence[RankMemory]) -> bool:
    """Returns whether the fullest rank fits the memory budget."""
    return max(stage.total for stage in stages) <= budget(cfg)


def tokenizer_size(cfg: Config) -> int:
    """Returns the vocabulary size before padding: that of the model if set, else of its tokenizer."""
    if cfg.model.vocab_size:
        return cfg.model.vocab_size
    from nemo_advrm.data.tokenizers import build_tokenizer

    return build_tokenizer(cfg.model.tokenizer).vocab_size


def _parameters(job: Job) -> list[tuple[str, int]]:
    """Returns title and number of parameters of each kind of model in the job."""
    named = []
    for held in job.models:
        number = f"{held.count} x " if held.count > 1 else ""
        kind = f"{number}{held.title} ({_use(held, job.cfg.model)})"
        named.append((kind, model_parameters(job.cfg.model, held.head, job.vocab_size, job.head_outputs).total))
    return named


def _use(held: Held, model: ModelConfig) -> str:
    if held.trained:
        return "trained" if model.peft == "none" else f"adapters of rank {model.lora.rank} trained"
    if held.adapter_sets:
        return f"frozen, {held.adapter_sets} are adapters of rank {model.lora.rank}"
    return "the policy without adapters" if held.shared else "frozen"


def _check_by_building(job: Job) -> None:
    """Builds the models of every pipeline stage without memory, so that a layout Megatron refuses is not planned."""
    # imported here: it needs Megatron-Core, and a search of layouts, which builds nothing, does not
    from nemo_advrm.plan.shards import build_stages

    model = job.cfg.model
    for head in dict.fromkeys(held.head for held in job.models):
        built = build_stages(model, head, job.vocab_size, job.gpus, job.head_outputs)
        stages = [
            stage_parameters(model, head, job.vocab_size, stage, job.head_outputs).total
            for stage in range(model.pipeline_model_parallel_size)
        ]
        whole = model_parameters(model, head, job.vocab_size, job.head_outputs).total
        assert built == (stages, whole), (head, built, stages, whole)


def _print_changes(options: list[Candidate]) -> None:
    if not options:
        print("it does not fit, and no single change makes it fit: try plan.search=true, or more GPUs (plan.gpus)")
        return
    print("it does not fit; any one of these changes makes it fit (fullest rank, step):")
    for option in options:
        print(f"  {change_line(option)}")


def _search(cfg: Config, gpus: int, size: int) -> int:
    found = search(cfg, gpus, size)
    gpu = GPUS[cfg.plan.gpu]
    if not found:
        print(f"no layout of {gpus} x {gpu.title} fits stage {cfg.plan.stage}: more GPUs (plan.gpus) or shorter rows")
        return DOES_NOT_FIT
    print(f"fastest layouts of {gpus} x {gpu.title} that fit stage {cfg.plan.stage} (fullest rank, step):")
    for place, option in enumerate(found, start=1):
        print(f"{place}. {layout_line(option)}")
    print(f"to start the first: {_submit_line(cfg, gpus, found[0].overrides())}")
    return 0


def _submit_line(cfg: Config, gpus: int, added: list[str]) -> str:
    """Returns the sbatch command of the job: the settings of this command without ``plan.*``, then ``added``.

    The scripts set trainer.devices and trainer.num_nodes from SLURM's environment.
    """
    own = ("plan.", "trainer.devices=", "trainer.num_nodes=")
    given = [word for word in sys.argv[2:] if not word.startswith(own)] if sys.argv[1:2] == ["plan"] else []
    place = f"--nodes={nodes_of(gpus)} --gpus-per-node={min(gpus, GPUS_PER_NODE)}"
    return f"sbatch {place} slurm/{cfg.plan.stage}.sbatch {shlex.join([*given, *added])}".rstrip()
