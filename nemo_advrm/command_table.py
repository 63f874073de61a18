"""The table of commands: ``nemo-advrm NAME`` calls ``main(cfg)`` of ``nemo_advrm.commands.NAME``.

It stands outside ``commands/`` and imports nothing, because help and mistakes must be told without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command: where its ``main(cfg) -> int | None`` is, and what ``--help`` says of it.

    Attributes:
        summary: one line.
        keys: what ``COMMAND --help`` shows, separated by spaces: keys, and prefixes that end with a full stop.
        schema: class of the schema that holds all keys, for a command that reads no configuration files.
        resumes: at a signal it stops where it can go on. The others, of which a half is worth nothing, end at once.
        processes: it starts as many processes as ``trainer.devices`` says.
        section: section of the configuration whose keys are typed without its name, as in ``target=`` for
            ``harden.target=``.
    """

    summary: str
    keys: str
    example: str
    schema: str = ""
    resumes: bool = False
    processes: bool = True
    section: str = ""


_COMMON = "name run_dir seed trainer.devices trainer.num_nodes trainer.accelerator"
_PARALLEL = (
    "model.tensor_model_parallel_size model.pipeline_model_parallel_size model.context_parallel_size "
    "model.expert_model_parallel_size model.sequence_parallel precision.name"
)
_TRAINING = (
    "pretrained_checkpoint.restore_from_path model.optim.lr model.optim.sched.name model.optim.sched.warmup_steps "
    "model.global_batch_size model.micro_batch_size model.micro_batch_tokens model.encoder_seq_length model.tokenizer "
    "trainer.max_epochs trainer.max_steps trainer.gradient_clip_val trainer.checkpoint_every_n_steps "
    "trainer.async_checkpoint"
)
_READING = "data.ignore_columns data.on_bad_row data.on_overlong"
_ROWS = f"data.train_path data.train_split data.format data.limit_train_rows {_READING}"
_HELD_OUT = "data.validation_path data.validation_split"
_DATA = f"{_ROWS} {_HELD_OUT} data.validation_fraction"
_PROMPTS = "data.prompts_path data.prompts_split data.held_out_prompts_path"
_START = f"pretrained_checkpoint.restore_from_path {_READING}"
_REWARD = "ensemble.members ensemble.aggregate ensemble.coefficient ensemble.standardise ensemble.reference_path"
_RL = (
    "rl.algorithm rl.max_steps rl.prompts_per_step rl.group_size rl.max_new_tokens rl.kl.coefficient rl.kl.estimator "
    "rl.unended_penalty model.optim.lr"
)

COMMANDS: dict[str, Command] = {
    "sft": Command(
        "train the policy on text",
        f"{_COMMON} {_ROWS} {_TRAINING} {_PARALLEL}",
        "nemo-advrm sft model=tiny data.train_path=text.jsonl",
        resumes=True,
    ),
    "train_rm": Command(
        "train a reward model on preference pairs",
        f"{_COMMON} {_DATA} reward_model. {_TRAINING} augmentation. {_PARALLEL}",
        "nemo-advrm train_rm model=tiny data.train_path=preferences.jsonl",
        resumes=True,
    ),
    "attack": Command(
        "find responses that the first reward model of an ensemble scores wrongly, by RL or by search",
        f"{_COMMON} {_START} {_PROMPTS} ensemble.members sft_statistics. adversarial. {_RL} {_PARALLEL}",
        "nemo-advrm attack run_dir=runs/a 'ensemble.members=[runs/rm_1/model,runs/rm_2/model]' "
        "pretrained_checkpoint.restore_from_path=runs/sft/model data.prompts_path=prompts.jsonl",
        resumes=True,
    ),
    "select": Command(
        "turn the adversarial samples of an attack into preference pairs",
        "run_dir seed selection.",
        "nemo-advrm select run_dir=runs/a selection.max_pairs=500",
        processes=False,
    ),
    "rlhf": Command(
        "train a policy on a reward: one model or an ensemble",
        f"{_COMMON} {_START} {_PROMPTS} {_REWARD} sft_statistics. {_RL} "
        f"rl.held_out_prompts rl.held_out_every {_PARALLEL}",
        "nemo-advrm rlhf 'ensemble.members=[runs/rm_1/model,runs/rm_2/model]' ensemble.aggregate=lcb rl=ppo "
        "pretrained_checkpoint.restore_from_path=runs/sft/model data.prompts_path=prompts.jsonl",
        resumes=True,
    ),
    "audit": Command(
        "say whether reward models are hackable: attacks, judged finds, named weaknesses, a page",
        "",
        "nemo-advrm audit target=hf:RM policy=hf:LM prompts=prompts.jsonl judge=hf:OTHER_RM budget=30min "
        "--fail-above 0.05",
        schema="AuditConfig",
        resumes=True,
        processes=False,
    ),
    "best_of_n": Command(
        "gold and proxy of the best of n responses by a reward, against KL; trains nothing",
        f"{_COMMON} {_START} {_PROMPTS} best_of_n. {_REWARD} "
        f"rl.max_new_tokens rl.temperature pipeline.gold {_PARALLEL}",
        "nemo-advrm best_of_n 'ensemble.members=[runs/rm_1/model]' best_of_n.samples=64 "
        "pretrained_checkpoint.restore_from_path=runs/sft/model data.prompts_path=prompts.jsonl",
    ),
    "harden": Command(
        "cure a reward model of what an attack or an audit found, without its training data",
        f"harden. {_COMMON} {_READING} model.optim.sched.name model.global_batch_size model.micro_batch_size "
        f"model.micro_batch_tokens trainer.checkpoint_every_n_steps {_PARALLEL}",
        "nemo-advrm harden target=hf:models/rm finds=runs/audit/finds.jsonl prompts=clean.jsonl out=models/hardened",
        resumes=True,
        section="harden",
    ),
    "evaluate": Command(
        "measure a reward model on held-out preference pairs",
        f"{_COMMON} {_START} {_HELD_OUT} data.format {_REWARD} evaluate. judge.",
        "nemo-advrm evaluate pretrained_checkpoint.restore_from_path=runs/rm_1/model "
        "data.validation_path=held_out.jsonl",
    ),
    "serve": Command(
        "serve a reward model, an ensemble or the adversarial reward over HTTP",
        f"run_dir {_REWARD} serve. remote. {_PARALLEL}",
        "nemo-advrm serve run_dir=runs/server 'ensemble.members=[runs/rm_1/model,hf:models/rm]' serve.port=8000",
    ),
    "report": Command(
        "write report/index.html of a run, or of several runs together, and print its tables",
        "run_dir report.",
        "nemo-advrm report runs/seed_0 runs/seed_1 runs/seed_2",
        processes=False,
    ),
    "pipeline": Command(
        "all of it: reward models, rounds of attack and retraining, RLHF, report; resumes where it stopped",
        f"{_COMMON} pipeline. {_DATA} ensemble.size adversarial. selection. augmentation. rl.algorithm",
        "nemo-advrm pipeline experiment=synthetic",
        resumes=True,
    ),
    "stages": Command(
        "list the pipeline's stages, what each waits for and which are complete (for job schedulers)",
        "run_dir pipeline.",
        "nemo-advrm stages experiment=synthetic run_dir=runs/synthetic",
        processes=False,
    ),
    "convert": Command(
        "convert a checkpoint between Hugging Face, Megatron and .nemo",
        "",
        "nemo-advrm convert from=hf path=DIR to=megatron out=checkpoints/base",
        schema="ConvertConfig",
        processes=False,
    ),
    "export_pairs": Command(
        "write adversarial pairs as the jsonl that NeMo-Aligner trains reward models on",
        "",
        "nemo-advrm export_pairs pairs=runs/a/pairs.jsonl with=train.jsonl template=transcript out=augmented.jsonl",
        schema="ExportPairsConfig",
        processes=False,
    ),
    "plan": Command(
        "say whether a stage fits its GPUs, how long a step takes, and which layout is faster; starts nothing",
        f"plan. trainer.devices trainer.num_nodes {_PARALLEL} model.virtual_pipeline_model_parallel_size "
        "model.use_distributed_optimizer model.recompute model.recompute_num_layers model.micro_batch_size "
        "model.micro_batch_tokens model.encoder_seq_length model.global_batch_size",
        "nemo-advrm plan model=nemotron4_340b parallel=nemotron4_340b_96xh100_tp8_pp12",
        processes=False,
    ),
    "doctor": Command(
        "print what this machine has and what each absence means",
        "",
        "nemo-advrm doctor",
        processes=False,
    ),
}
