"""Lets NeMo-Aligner 0.7.0, unmodified, do what its example scripts do, on a CPU: ``driver.py JOBS.json ANSWERS.json``.

Runs in the environment of NeMo-Aligner, not in that of nemo_advrm. JOBS is a list of [function, {arguments}]; the
answers are written as a list of the same length. All jobs of one process run at tensor parallel size 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cpu_shim

TRAINER = {
    "devices": 1,
    "num_nodes": 1,
    "accelerator": "cpu",
    "precision": "32",
    "logger": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
}
# what a model that runs on a CPU needs, whatever its architecture
ON_CPU = {
    "mcore_gpt": True,
    "transformer_engine": False,
    "megatron_amp_O2": False,
    "use_cpu_initialization": True,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "precision": "32",
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "gradient_as_bucket_view": True,
    "optim": {"name": "sgd", "lr": 0.1},
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "force_head_dtype": "float32",
    "sequence_parallel": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
}
RM = {
    "reward_model_type": "binary_ranking",
    "regression": {"num_attributes": 1, "merge_attributes": False, "attribute_weights": None},
    "output_sequence": False,
    "use_avg_pool": False,
    "forward_micro_batch_size": 1,
}


def _trainer(kind: str, steps: int = 1) -> Any:
    from nemo_aligner.utils.train_script_utils import resolve_and_create_trainer
    from omegaconf import OmegaConf

    settings = {**TRAINER, "max_epochs": 1, "max_steps": steps, kind: {}}
    return resolve_and_create_trainer(OmegaConf.create({"trainer": settings, "model": dict(ON_CPU)}), kind)


def _load(path: str, cls: Any, kind: str, extra: dict[str, Any], steps: int = 1, head: bool = True) -> tuple[Any, Any]:
    from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
    from omegaconf import OmegaConf

    overrides = OmegaConf.create({**ON_CPU, **extra})
    cfg = load_and_override_model_config(path, overrides)
    trainer = _trainer(kind, steps)
    model = load_from_nemo(cls, cfg, trainer, strict=True, load_base_model_only=not head, restore_path=path)
    return model, trainer


def create(model: dict[str, Any], out: str, seed: int = 0) -> None:
    """A GPT with random weights (norms and biases too) as a .nemo that the supervised fine-tuning class wrote."""
    import torch
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.utils.train_script_utils import init_distributed
    from omegaconf import OmegaConf

    trainer = _trainer("sft")
    torch.manual_seed(seed)
    settings = {**ON_CPU, **model}
    actor = GPTSFTModel(OmegaConf.create(settings), trainer)
    init_distributed(trainer, actor, False)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    actor.save_to(out)


def train_rm(base: str, data: str, out: str, steps: int, texts: list[str], **model: Any) -> dict[str, Any]:
    """Train a reward model as train_reward_model.py does and save it: losses by step, then the scores of ``texts``."""
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.data.nlp.builders import build_dataloader, build_train_valid_test_rm_datasets
    from nemo_aligner.models.nlp.gpt.reward_model_classes import REWARD_MODEL_CLASS_DICT, RewardModelType
    from nemo_aligner.utils.distributed import Timer
    from nemo_aligner.utils.train_script_utils import (
        FakeCheckpointCallback,
        extract_optimizer_scheduler_from_ptl_model,
        init_distributed,
        init_using_ptl,
    )
    from omegaconf import OmegaConf

    cls = REWARD_MODEL_CLASS_DICT[RewardModelType(RM["reward_model_type"])]
    files = {"train": [data], "validation": [data], "test": [data]}
    extra = {
        **RM,
        "data": {"data_impl": "jsonl", "splits_string": None, "data_prefix": files, "num_workers": 0},
        "seed": 1234,
        **model,
    }
    rm, trainer = _load(base, cls, "rm", extra, steps, head=False)
    init_distributed(trainer, rm, False)
    options = OmegaConf.create(
        {
            "max_epochs": 1,
            "max_steps": steps,
            "val_check_interval": steps,
            "save_interval": steps,
            "limit_val_batches": 1,
            "gradient_clip_val": 1.0,
        }
    )
    cfg = OmegaConf.create({"model": rm.cfg, "trainer": {"rm": options}})
    sets = build_train_valid_test_rm_datasets(
        cfg=rm.cfg,
        data_prefix=rm.cfg.data.data_prefix,
        data_impl="jsonl",
        splits_string=None,
        train_valid_test_num_samples=[-4, -4, -4],
        seq_length=rm.cfg.encoder_seq_length,
        seed=1234,
        tokenizer=rm.tokenizer,
    )
    size = {"mbs": rm.cfg.micro_batch_size, "gbs": rm.cfg.global_batch_size, "load_gbs": True}
    loaders = [build_dataloader(cfg=cfg, dataset=d, consumed_samples=0, **size) for d in sets[:2]]
    init_using_ptl(trainer, rm, loaders[0], sets[0])
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(rm)
    logger = _Losses()
    SupervisedTrainer(
        cfg=options,
        model=rm,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        test_dataloader=None,
        logger=logger,
        ckpt_callback=FakeCheckpointCallback(),
        run_timer=Timer(None),
    ).fit()
    rm.save_to(out)
    return {"losses": logger.losses, "scores": _infer(rm, texts)}


class _Losses:
    """What the trainer takes for a logger; keeps the training losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log_metrics(self, metrics: dict[str, Any], step: Any = None, prefix: str = "") -> None:
        if prefix.startswith("train") and "loss" in metrics:
            self.losses.append(float(metrics["loss"]))

    def finalize(self) -> None:
        pass


def score(path: str, texts: list[str], **model: Any) -> list[float]:
    """Scores of raw texts by a reward model of a .nemo, as serve_reward_model.py loads and asks it."""
    import torch
    from nemo_aligner.models.nlp.gpt.reward_model_classes import REWARD_MODEL_CLASS_DICT, RewardModelType
    from nemo_aligner.utils.train_script_utils import init_distributed

    cls = REWARD_MODEL_CLASS_DICT[RewardModelType(RM["reward_model_type"])]
    rm, trainer = _load(path, cls, "rm", {"forward_micro_batch_size": 1, **model})
    rm.freeze()
    init_distributed(trainer, rm, False)
    with torch.no_grad():
        return _infer(rm, texts)


def _infer(rm: Any, texts: list[str]) -> list[float]:
    rm.prepare_for_inference()
    return [round(float(row[0]), 7) for text in texts for row in rm.infer([text])]


def log_probs(path: str, rows: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token after the first of each row, by the actor of a .nemo."""
    import torch
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
    from nemo_aligner.utils.train_script_utils import init_distributed

    reinforce = {
        "offload_adam_states": False,
        "forward_micro_batch_size": 1,
        "rollout_micro_batch_size": 1,
        "length_params": {"max_length": 8, "min_length": 1},
        "sampling_params": {"end_strings": []},
    }
    extra = {"reinforce": reinforce, "peft": {"peft_scheme": "none"}, "data": {"data_impl": "jsonl"}}
    actor, trainer = _load(path, MegatronGPTReinforceActorModel, "reinforce", extra)
    init_distributed(trainer, actor, False)
    actor.prepare_for_inference()
    return [actor.get_inference_log_probs(torch.tensor([row]))[0].tolist() for row in rows]


def token_ids(path: str, texts: list[str]) -> list[list[int]]:
    """Ids that the tokenizer of a .nemo gives to texts."""
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel

    actor, _ = _load(path, GPTSFTModel, "sft", {})
    return [actor.tokenizer.text_to_ids(text) for text in texts]


def tokenizer_ids(settings: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Ids, end token and size of a tokenizer that NeMo builds from the ``tokenizer`` section of a configuration."""
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    built = get_nmt_tokenizer(
        library=settings["library"],
        model_name=settings.get("type"),
        tokenizer_model=settings.get("model"),
        special_tokens=settings.get("special_tokens"),
        legacy=settings["sentencepiece_legacy"],
        use_fast=True,
    )
    return {"ids": [built.text_to_ids(t) for t in texts], "eos": built.eos_id, "size": built.vocab_size}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = [globals()[name](**arguments) for name, arguments in jobs]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    cpu_shim.install()
    main()
