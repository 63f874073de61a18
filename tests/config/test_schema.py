"""What is derived from the schema: the list of keys, the reference page, and what checkpoints and restarts look at."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.fields import Restart, Role
from nemo_advrm.config.keys import all_keys, architecture_keys, keys_at_restart
from nemo_advrm.config.reference import page

ROOT = Path(__file__).resolve().parents[2]


def test_a_new_key_is_a_decision() -> None:
    """Add the key to keys.txt when it is meant; a key that goes away needs a line in nemo_advrm/config/moved.py."""
    assert list(all_keys()) == (Path(__file__).parent / "keys.txt").read_text().split()


def test_the_page_of_all_keys_is_current() -> None:
    made = "python -m nemo_advrm.config.reference > docs/configuration.md"
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), f"run {made}"


def test_checkpoints_carry_the_architecture_and_name_what_depends_on_another_key_after_it() -> None:
    keys = architecture_keys()
    assert {"num_layers", "activation", "head_bias"} <= set(keys)
    assert not {"tensor_model_parallel_size", "micro_batch_size", "tokenizer"} & set(keys)
    for first, then in (("position_embedding_type", "rope_scaling"), ("rope_scaling", "rope_scaling_factor")):
        assert keys.index(first) < keys.index(then)
    assert keys.index("sliding_window") < keys.index("sliding_window_every")


def test_a_restart_may_change_the_layout_and_what_does_not_count_and_nothing_else() -> None:
    layout = keys_at_restart(Restart.RECORDED)
    assert "model.tensor_model_parallel_size" in layout and "model.micro_batch_size" in layout
    assert not {"model.use_distributed_optimizer", "model.global_batch_size", "model.optim.lr"} & layout
    assert {"name", "exp_manager", "report", "serve", "plan", "pipeline.jobs"} <= keys_at_restart(Restart.FREE)
    roles = {all_keys()[name].about.role for name in layout}
    assert roles == {Role.PARALLELISM, Role.BATCHING}
