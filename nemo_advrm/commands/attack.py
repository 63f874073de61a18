"""The command ``attack``: looks for responses that members of an ensemble score wrongly, and records them."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.attacks.attack_summary import line
from nemo_advrm.attacks.run import AttackRun, check_attack, check_target_members
from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_held_out
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.detector_features import attack_reader, check_detector
from nemo_advrm.rewards.hybrid import Opened, open_sft_policy
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.sft_responses import read_for_attack, sample_sft_scores
from nemo_advrm.rewards.sources import build_gold, load_members, refuse_people
from nemo_advrm.rollouts.run_prompts import attack_prompts, encode_prompts
from nemo_advrm.run_directory import run_dir
from nemo_advrm.seeds import derive_seed

DISAGREEMENT = "ensemble_disagreement"


def main(cfg: Config) -> int:
    """Attacks ``ensemble.members`` starting from the policy ``pretrained_checkpoint.restore_from_path``."""
    if len(cfg.ensemble.members) < 2 and (not cfg.ensemble.members or cfg.adversarial.detector == DISAGREEMENT):
        raise ConfigError(
            "ensemble.members must name at least 2 reward models, the attacked one first, or one and a detector that "
            "needs no others (adversarial.detector=mahalanobis)"
        )
    if not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name the policy the attack starts from")
    check_attack(cfg)
    check_target_members(cfg, len(cfg.ensemble.members))
    check_held_out(cfg, "adversarial.held_out_prompts", cfg.adversarial.held_out_prompts)
    check_detector(cfg)
    refuse_people(cfg, "attack")
    run_dir.start(cfg)
    directory = Path(cfg.run_dir)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    prompts = encode_prompts(attack_prompts(cfg), tokenizer, cfg)
    opened: Opened = {}
    members = load_members(cfg, cfg.ensemble.members, tokenizer, opened)
    prompts = prompts_with_room(prompts, tokenizer.fingerprint, members, cfg)
    run_dir.claim(cfg, directory, "attack")
    gold = build_gold(cfg, tokenizer)
    sft_policy = open_sft_policy(cfg, tokenizer, cfg.pretrained_checkpoint.restore_from_path, opened)
    path, reader = directory / "reference.jsonl", attack_reader(cfg, members, sft_policy)
    sample_sft_scores(cfg, tokenizer, path, prompts, reader, gold, derive_seed(cfg.seed, "reference"))
    sft_responses = read_for_attack(cfg, path, prompts)
    home = directory / "attack"
    attack = AttackRun(cfg, tokenizer, home, prompts, members, sft_responses, gold, cfg.seed, sft_policy)
    summary = attack.run()
    if runtime.current().is_writer:
        for target, found in summary["directions"].items():
            print(line(target, found))
        print(f"samples: {directory / 'attack' / 'samples.jsonl'}  (next: nemo-advrm select run_dir={cfg.run_dir})")
    return 0
