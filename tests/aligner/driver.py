"""Lets NeMo-Aligner 0.7.0, unmodified, do what its example scripts do, on a CPU: ``driver.py JOBS.json ANSWERS.json``.

Runs in the environment of NeMo-Aligner, not in that of nemo_advrm. JOBS is a list of [function, {arguments}]; the
answers are written as a list of the same length. All jobs of one process run at tensor parallel size 1.
"""

from __future__ import annotations

import importlib
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


REINFORCE = {
    "rollout_micro_batch_size": 2,
    "num_rollout_samples": 2,
    "forward_micro_batch_size": 2,
    "val_rollout_micro_batch_size": 2,
    "num_val_samples": 2,
    "offload_adam_states": False,
    "length_params": {"max_length": 24, "min_length": 1},
    "sampling_params": {
        "use_greedy": False,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "add_BOS": False,
        "all_probs": False,
        "compute_logprob": False,
        "end_strings": [],
    },
}
REINFORCE_TRAINER = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "initial_policy_kl_penalty": 0.01,
    "use_absolute_kl": True,
    "num_rollouts_per_prompt": 4,
    "rollout_batch_seq_length": None,
    "batch_iterator": {"use_flask": False, "port": 5557},
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
    """What the trainers take for a logger; keeps the training losses and the mean rewards of steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rewards: list[float] = []

    def log_metrics(self, metrics: dict[str, Any], step: Any = None, prefix: str = "") -> None:
        if prefix.startswith("train") and "loss" in metrics:
            self.losses.append(float(metrics["loss"]))
        if prefix == "train_rollouts/":
            self.rewards.append(float(metrics["rewards"]))

    def log_table(self, *table: Any, **more: Any) -> None:
        pass

    def finalize(self) -> None:
        pass


def reinforce(base: str, prompts: str, out: str, steps: int, port: int, **settings: Any) -> dict[str, Any]:
    """Train an actor as train_gpt_reinforce_actor.py does, rewarded by the server at ``port``, and save it.

    Returns the rollout batches it trained on and the mean rewards it logged.
    """
    from functools import partial

    import torch
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.data.nlp.builders import (
        build_dataloader,
        build_train_valid_test_rlhf_datasets,
        collate_with_pad_to_max_batch,
    )
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
    from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
    from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls
    from nemo_aligner.utils.distributed import Timer
    from nemo_aligner.utils.train_script_utils import (
        FakeCheckpointCallback,
        extract_optimizer_scheduler_from_ptl_model,
        init_distributed,
        init_peft,
        init_using_ptl,
    )
    from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu
    from omegaconf import OmegaConf

    own = {**REINFORCE, **settings}
    files = {"train": [prompts], "validation": [prompts], "test": [prompts]}
    data = {"data_impl": "jsonl", "splits_string": None, "data_prefix": files, "seq_length": 64, "num_workers": 0}
    peft = {"peft_scheme": "none", "restore_from_path": None}
    extra = {"reinforce": own, "peft": peft, "data": data, "seed": 1234, "micro_batch_size": 1}
    actor, trainer = _load(base, MegatronGPTReinforceActorModel, "reinforce", extra, steps)
    init_peft(actor, actor.cfg)
    actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(actor, megatron_amp_O2=False)
    init_distributed(trainer, actor, False)
    options = {
        **REINFORCE_TRAINER,
        "max_steps": steps,
        "val_check_interval": steps,
        "save_interval": steps,
        "model_gbs": actor.cfg.global_batch_size,
        "model_mbs": actor.cfg.micro_batch_size,
    }
    cfg = OmegaConf.create({"model": actor.cfg, "trainer": {"reinforce": options}})
    train, validation, _ = build_train_valid_test_rlhf_datasets(
        cfg=actor.cfg,
        data_prefix=actor.cfg.data.data_prefix,
        data_impl="jsonl",
        splits_string=None,
        train_valid_test_num_samples=[-1, -1, -1],
        seq_length=data["seq_length"],
        seed=1234,
        tokenizer=actor.tokenizer,
    )
    collate = collate_with_pad_to_max_batch(
        own["length_params"]["max_length"], actor.tokenizer.eos_id, cfg, generate_masks_and_position_ids=False
    )
    size = {"mbs": own["rollout_micro_batch_size"], "gbs": own["num_rollout_samples"]}
    builder = partial(build_dataloader, cfg=cfg, collate_fn=collate, load_gbs=False, **size)
    init_using_ptl(trainer, actor, torch.utils.data.DataLoader(train, batch_size=4), train)
    del actor._train_dl
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(actor)
    server = {"name": "reward_model", "ip": "127.0.0.1", "port": port}
    rm = RemoteGPTRMClient(OmegaConf.create({"pad_to_length": actor.cfg.encoder_seq_length, "reward_model": server}))
    logger, batches = _Losses(), []

    class Watched(ReinforceTrainer):
        def generate_reinforce_data(self, batch: Any) -> Any:
            keys = ("response_tokens", "response_lengths", "prompt_lengths", "is_end", "rewards")
            batches.append({key: batch[key].tolist() for key in keys})
            return super().generate_reinforce_data(batch)

    training = Watched(
        cfg=cfg.trainer.reinforce,
        model=actor,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader_builder=partial(builder, dataset=train),
        val_dataloader_builder=partial(builder, dataset=validation, use_random_sampler=False),
        collate_fn=collate,
        rm=rm,
        batch_iterator_cls=get_batch_iterator_cls(cfg.trainer.reinforce.batch_iterator),
        logger=logger,
        ckpt_callback=FakeCheckpointCallback(),
        run_timer=Timer(None),
    )
    try:
        training.fit()
    finally:
        rm.communicator.close()  # its threads keep a process alive that has failed
    actor.save_to(out)
    return {"batches": batches, "rewards": logger.rewards}


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


def serve(path: str, port: int) -> None:
    """Serve a reward model of a .nemo by PyTriton as serve_reward_model.py does, until the process is ended."""
    import torch
    from nemo_aligner.algorithms.reward_server import RewardModelServer
    from nemo_aligner.models.nlp.gpt.reward_model_classes import REWARD_MODEL_CLASS_DICT, RewardModelType
    from nemo_aligner.utils.text_generation_utils import tokenize_batch
    from nemo_aligner.utils.train_script_utils import init_distributed

    cls = REWARD_MODEL_CLASS_DICT[RewardModelType(RM["reward_model_type"])]
    rm, trainer = _load(path, cls, "rm", {"forward_micro_batch_size": 2})
    rm.freeze()
    init_distributed(trainer, rm, False)
    rm.prepare_for_inference()

    def tokenize(sentences: Any) -> Any:
        length = rm.cfg.encoder_seq_length
        return tokenize_batch(sentences=sentences, tokenizer=rm.tokenizer, max_len=length, add_BOS=False, add_EOS=False)

    with torch.no_grad():
        RewardModelServer(
            infer_fn=rm.infer,
            tokenize_func=tokenize,
            model_name="reward_model",
            port=port,
            inference_micro_batch_size=2,
            model_forward_micro_batch_size=2,
            strip_sequence_length_to_multiple=None,
        ).run_server()


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


def _job(name: str) -> Any:
    """A function of this file, or MODULE.FUNCTION of one beside it."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function) if module else globals()[name]


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = [_job(name)(**arguments) for name, arguments in jobs]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    cpu_shim.install()
    main()
