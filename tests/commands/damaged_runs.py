"""Small real runs of every stage that writes a run's directory, and ways to damage one of their files.

Used by test_damaged_runs.py, which starts the commands that read the files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from nemo_advrm import cli
from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.errors import UserError
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs

_WEIGHTS = r"(meta|manifest|weights/metadata)\.json|weights/(\.metadata|common\.pt|__\d+_\d+\.distcp)"
_CHECKPOINT = r"checkpoints/step_\d+"
# every file of every run, by patterns of its name; a run that leaves another file must be thought of here
CHECKED = [
    *(r"config\.yaml", r"versions\.yaml", r"state\.json"),
    *(rf"(.+/)?model/({_WEIGHTS}|reference_features\.json)", r"(.+/)?manifest\.json"),
    *(r"(.+/)?result\.json", r"(.+/)?summary\.json", r"(.+/)?metrics\.jsonl", r"(.+/)?samples\.jsonl"),
    rf"(.+/)?{_CHECKPOINT}/(trainer\.json|manifest\.json|(policy|critic|reward_model)/({_WEIGHTS}))",
    *(r"(.+/)?reference\.jsonl", r"(.+/)?pairs\.jsonl", r"(.+/)?held_out(_reference)?\.jsonl"),
    *(r"preferences/(train_\d+|validation)\.jsonl", r"best_of_n/\w+\.json", r"room\.json"),
]
# nothing reads these again
RECORDS = [r"(.+/)?logs/.+", r"report/.+\.(png|html|json)", r"(.+/)?standardisation\.jsonl"]
LOCKS = [r"(writer|config|state)\.lease", r"locks/[\w.-]+\.lease"]
# what the commands read that do not write the run
READ_BY = {
    "select": [r"reference\.jsonl", r"attack/(samples\.jsonl|summary\.json)"],
    "report": [r"state\.json"],
    "stages": [r"state\.json"],
    "evaluate": [rf"model/({_WEIGHTS}|reference_features\.json)"],
    "evaluate several": [r"reference\.jsonl"],
    "train on its pairs": [r"pairs\.jsonl"],
}

SMALL = [
    *("experiment=synthetic", "exp_manager.create_tensorboard_logger=false", "pipeline.jobs=1"),
    *("model.num_layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.num_attention_heads=2"),
    *("trainer.max_steps=3", "trainer.checkpoint_every_n_steps=1", "trainer.val_check_interval=0"),
    *("stage.sft.trainer.max_steps=2", "stage.train_rm.trainer.max_steps=3", "data.validation_fraction=0.2"),
    *("stage.sft.model.global_batch_size=4", "stage.train_rm.model.global_batch_size=4"),
    *("stage.attack.rl.max_steps=3", "stage.rlhf.rl.max_steps=3", "rl.group_size=2", "rl.max_new_tokens=24"),
    *("stage.attack.rl.prompts_per_step=4", "stage.rlhf.rl.prompts_per_step=2", "rl.evaluation_every=1"),
    *("stage.rlhf.rl.held_out_every=1", "stage.rlhf.rl.held_out_prompts=2"),
    *("sft_statistics.num_prompts=4", "sft_statistics.samples_per_prompt=4"),
    *("best_of_n.prompts=2", "best_of_n.samples=2"),
    *("adversarial.target_members=[1]", "stage.attack.adversarial.held_out_prompts=2"),
    *("selection.threshold_z=-9", "selection.null_ratio=0", "selection.last_fraction=1", "selection.min_pairs=0"),
    *("synthetic.sft_rows=40", "synthetic.preference_pairs=24", "synthetic.validation_pairs=8"),
    *("augmentation.warm_steps=1", "augmentation.pairs_per_step=1", "pipeline.stop_success_rate=0"),
    "pipeline.rlhf={r1:{reward:r1},hybrid:{reward:r1}}",
]
_BEFORE = {
    **{key: ["sft"] for key in ("train_rm", "train_rm_2", "train_rm_stopped")},
    **{key: ["sft", "train_rm", "train_rm_2"] for key in ("attack", "attack_stopped", "rlhf")},
    **{key: ["sft", "train_rm"] for key in ("rlhf_stopped", "best_of_n")},
}
# the function that a stage calls when its training has ended
_AT_THE_END = {
    "sft": "training.sft_training.write_result",
    "train_rm": "training.reward_model_training.write_result",
    "attack": "attacks.run.of_adversary",
    "rlhf": "training.rlhf_training.write_result",
}


def kind_of(name: str) -> str:
    """checked | record | lock, or "" for a file of which nobody has thought."""
    for kind, patterns in (("checked", CHECKED), ("record", RECORDS), ("lock", LOCKS)):
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return kind
    return ""


def files_of(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Said:
    """Status, standard output and what was told beside it; a status of -1 is a traceback."""

    status: int
    printed: str
    told: str


class Runs:
    """The runs below ``home``, each made when it is asked for, and the commands that read them.

    A command is called by the run that it makes, or ``RUN:READER``.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pairs = home / "data" / "pairs.jsonl"
        self.pairs.parent.mkdir()
        write_jsonl_atomic(self.pairs, annotated_pairs(40, 1, SyntheticConfig()))

    def make(self, run: str) -> Path:
        """The directory of a run; one that is ``_stopped`` has lost its last checkpoint and its result."""
        home = self.home / run
        if home.exists():
            return home
        for other in _BEFORE.get(run, []):
            self.make(other)
        is_stopped = run.endswith("_stopped")
        stopped: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if is_stopped:
            at_the_end = f"nemo_advrm.{_AT_THE_END[run.removesuffix('_stopped')]}"
            stopped = mock.patch(at_the_end, side_effect=UserError("stopped"))
        with stopped:
            said = self.say(run)
        assert said.status == (2 if is_stopped else 0), said.told
        if run == "attack":
            said = self.say("attack:select")
            assert said.status == 0 and not said.printed.startswith("0 pairs"), said
        return home

    def model(self, run: str) -> Path:
        return self.home / run / "model"

    def words(self, command: str) -> list[str]:
        """The command line."""
        run, _, reader = command.partition(":")
        data, start = f"data.train_path={self.pairs}", f"pretrained_checkpoint.restore_from_path={self.model('sft')}"
        held_out = f"data.validation_path={self.pairs}"
        one = f"ensemble.members=[{self.model('train_rm')}]"
        both = f"ensemble.members=[{self.model('train_rm')},{self.model('train_rm_2')}]"
        attack = self.home / "attack"
        stage, *rest = {
            "sft": ["sft", data],
            "train_rm": ["train_rm", data, start],
            "train_rm_2": ["train_rm", data, start, "seed=2"],
            "train_rm_stopped": ["train_rm", data, start],
            "attack": ["attack", start, both],
            "attack_stopped": ["attack", start, both],
            "rlhf": ["rlhf", start, both],
            "rlhf_stopped": ["rlhf", start, one, "rl=ppo"],
            "best_of_n": ["best_of_n", start, one],
            "pipeline": ["pipeline"],
            "attack:select": ["select"],
            "pipeline:report": ["report"],
            "pipeline:stages": ["stages"],
            "train_rm:evaluate": ["evaluate", held_out, one],
            "attack:evaluate several": [
                *("evaluate", held_out, both, f"ensemble.reference_path={attack / 'reference.jsonl'}")
            ],
            "attack:train on its pairs": [
                *("train_rm", data, start, f"augmentation.pairs_path={attack / 'pairs.jsonl'}")
            ],
        }[command]
        writes_there = reader in ("", "select", "report", "stages")
        return [stage, *SMALL, *rest, f"run_dir={self.home / (run if writes_there else 'elsewhere')}"]

    def say(self, command: str) -> Said:
        """Run a command in this process."""
        printed, told = io.StringIO(), io.StringIO()
        handler, log = logging.StreamHandler(told), logging.getLogger("nemo_advrm")
        log.addHandler(handler)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
                status = cli.main(self.words(command))
        except Exception:
            return Said(-1, printed.getvalue(), traceback.format_exc())
        finally:
            log.removeHandler(handler)
        # how long a step took is nothing that is compared
        return Said(status, re.sub(r"\b\d+ s$", "", printed.getvalue(), flags=re.MULTILINE), told.getvalue())

    @contextlib.contextmanager
    def kept(self, run: str) -> Iterator[Path]:
        """The run's directory, which is afterwards what it was."""
        home = self.make(run)
        whole = self.home / "kept" / run
        if not whole.exists():
            shutil.copytree(home, whole, symlinks=True)
        try:
            yield home
        finally:
            for directory in (home, self.home / "elsewhere"):
                shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(whole, home, symlinks=True)


def ways(path: Path) -> dict[str, Callable[[], object]]:
    """Ways to damage a file."""

    def cut() -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])

    def in_its_place(make: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            path.unlink()
            make()

        return work

    return {
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "cut": cut,
        "a directory": in_its_place(path.mkdir),
        "a link to nothing": in_its_place(lambda: path.symlink_to("nowhere")),
    }
