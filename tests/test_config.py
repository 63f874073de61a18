"""The configuration: composition, stage settings, and an error that names the key for every kind of mistake."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_advrm.config import conf_dir, for_stage, load_config, resolved, versions
from nemo_advrm.config.keys import all_keys, expected_type, nearest_key
from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import AuditConfig, Config, ConvertConfig, ExportPairsConfig, RLHFRunConfig
from nemo_advrm.config.validation import check_values
from nemo_advrm.errors import ConfigError

CHOICES = {name: list(key.about.choices) for name, key in all_keys().items() if key.about.choices}
GROUPS = sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir())
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((conf_dir() / group).glob("*.yaml"))]


def message(*overrides: str, stage: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(overrides, stage)
    return str(error.value)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_configuration_file_loads_and_validates(group: str, option: str) -> None:
    cfg = load_config([f"{group}={option}"])
    assert isinstance(cfg, Config)
    if group == "model":
        validate_layout(cfg, world_size=1)


def test_every_group_has_files() -> None:
    assert GROUPS == ["experiment", "model", "parallel", "precision", "rl"]


def test_config_yaml_repeats_the_defaults_of_the_schema() -> None:
    written = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    default = OmegaConf.to_container(OmegaConf.structured(Config()))
    written.pop("defaults")

    def compare(mine: dict, schema: dict, prefix: str) -> None:
        for name, value in mine.items():
            if isinstance(value, dict):
                compare(value, schema[name], f"{prefix}{name}.")
            else:
                assert value == schema[name], f"{prefix}{name}"

    compare(written, default, "")


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # Published totals in units of 1e9, from the sizes of the matrices (norms and biases are below the tolerance).
        ("llama3_8b", 8.03),
        ("llama3_70b", 70.55),
        ("qwen2_5_7b", 7.62),
        ("qwen2_5_72b", 72.7),
        ("nemotron4_340b", 341.0),
        ("smollm2_135m", 0.1345),
    ],
)
def test_model_sizes_are_the_published_ones(model: str, parameters: float) -> None:
    m = load_config([f"model={model}"]).model
    head = m.hidden_size // m.num_attention_heads
    attention = m.hidden_size * head * (2 * m.num_attention_heads + 2 * m.num_query_groups)
    feed_forward = m.hidden_size * m.ffn_hidden_size * (3 if m.activation == "swiglu" else 2)
    embeddings = m.vocab_size * m.hidden_size * (1 if m.share_embeddings_and_output_weights else 2)
    total = (m.num_layers * (attention + feed_forward) + embeddings) / 1e9
    assert total == pytest.approx(parameters, rel=2e-3)


def test_returns_objects_of_the_schema_with_resolved_interpolations() -> None:
    cfg = load_config(["name=mine", "pipeline.rlhf.low={reward: ensemble, aggregate: lcb}"])
    assert cfg.run_dir == "runs/mine"
    assert cfg.pipeline.rlhf == {"low": RLHFRunConfig(reward="ensemble", aggregate="lcb")}
    assert cfg.model.num_layers == 4  # model=tiny is the default


@pytest.mark.parametrize("override", ["pipeline.rlhf.low.reward=hardened", "pipeline.rlhf={low: {reward: hardened}}"])
def test_an_rlhf_run_can_be_added_key_by_key(override: str) -> None:
    runs = load_config(["experiment=synthetic", override]).pipeline.rlhf
    assert list(runs) == ["r1", "r1_kl", "adv_rm", "hybrid", "low"]
    assert runs["low"] == RLHFRunConfig(reward="hardened")


def test_an_rlhf_run_can_be_removed() -> None:
    assert list(load_config(["experiment=synthetic", "~pipeline.rlhf.r1_kl"]).pipeline.rlhf) == [
        "r1",
        "adv_rm",
        "hybrid",
    ]


def test_group_option_on_the_command_line_beats_the_experiment() -> None:
    assert load_config(["experiment=synthetic", "model=tiny"]).model.tokenizer == "byte"


# Stage settings


def test_stage_settings_count_over_the_root_only_in_their_stage() -> None:
    root = load_config(["experiment=synthetic"])
    assert root.model.optim.lr == 1.0e-3
    assert load_config(["experiment=synthetic"], "train_rm").model.optim.lr == 2.0e-3
    assert load_config(["experiment=synthetic"], "evaluate").model.optim.lr == 1.0e-3
    assert for_stage(root, "train_rm") == load_config(["experiment=synthetic"], "train_rm")


def test_stage_settings_are_laid_over_once() -> None:
    cfg = load_config(["experiment=synthetic"], "attack")
    assert cfg.stage.attack == {} and cfg.stage.rlhf == {}
    assert for_stage(cfg, "rlhf") == cfg


def test_stage_without_a_section_keeps_all_of_them() -> None:
    cfg = load_config(["experiment=synthetic"], "pipeline")
    assert cfg == load_config(["experiment=synthetic"])
    assert cfg.stage.rlhf["rl"]["max_steps"] == 120


@pytest.mark.parametrize("override", ["rl.max_steps=7", "+rl.max_steps=7", "++rl.max_steps=7", "rl={max_steps: 7}"])
def test_command_line_beats_stage_settings(override: str) -> None:
    overrides = ["experiment=synthetic", override]
    assert load_config(overrides, "rlhf").rl.max_steps == 7
    # A pipeline lays the stages over later, from the loaded object alone.
    assert for_stage(load_config(overrides, "pipeline"), "attack").rl.max_steps == 7


def test_stage_key_on_the_command_line_beats_the_plain_key() -> None:
    overrides = ["experiment=synthetic", "stage.rlhf.rl.max_steps=9", "rl.max_steps=7"]
    assert load_config(overrides, "rlhf").rl.max_steps == 9
    assert load_config(overrides, "attack").rl.max_steps == 7


def test_a_group_on_the_command_line_leaves_the_stage_settings_beside_it() -> None:
    cfg = load_config(["model=tiny", "stage.rlhf.model.micro_batch_size=3"])
    assert for_stage(cfg, "rlhf").model.micro_batch_size == 3
    assert for_stage(cfg, "rlhf").model.hidden_size == cfg.model.hidden_size == 128


def test_other_stage_settings_stay_when_one_is_given_on_the_command_line() -> None:
    cfg = load_config(["experiment=synthetic", "rl.max_steps=7"], "attack")
    assert (cfg.rl.max_steps, cfg.rl.kl.coefficient, cfg.model.optim.lr) == (7, 0.0, 9.0e-4)


# Mistakes


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.num_layrs", "model.num_layers"),
        ("trainer.max_step", "trainer.max_steps"),
        ("sed", "seed"),
        ("lr", "model.optim.lr"),
        ("model.lr", "model.optim.lr"),
        ("tensor_model_parallel_size", "model.tensor_model_parallel_size"),
        ("stage.train_rm.model.num_layrs", "stage.train_rm.model.num_layers"),
        ("stage.trainrm.model.num_layers", "stage.train_rm.model.num_layers"),
        ("pipeline.rlhf.mine.agregate", "pipeline.rlhf.mine.aggregate"),
    ],
)
def test_misspelt_key_is_an_error_that_names_the_nearest(wrong: str, right: str) -> None:
    text = message(f"{wrong}=1")
    assert wrong in text and f"did you mean {right}?" in text


@pytest.mark.parametrize("prefix", ["+", "++"])
def test_prefix_does_not_let_a_misspelt_key_in(prefix: str) -> None:
    assert "did you mean model.num_layers?" in message(f"{prefix}model.num_layrs=1")


def test_misspelt_key_inside_a_dictionary_value_is_found() -> None:
    assert "model.optim.lrr: did you mean model.optim.lr?" in message("model.optim={lrr: 1}")
    assert "stage.sft.rl.max_step: did you mean stage.sft.rl.max_steps?" in message("stage.sft={rl: {max_step: 1}}")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.num_layers=abc", ("model.num_layers", "'abc'", "int")),
        ("model.optim.lr=fast", ("model.optim.lr", "'fast'", "float")),
        ("model.bias=perhaps", ("model.bias", "'perhaps'", "bool")),
        ("seed=null", ("seed", "int")),
        ("stage.rlhf.rl.max_steps=abc", ("stage.rlhf", "rl.max_steps", "'abc'", "int")),
        ("model.optim.betas=[x,y]", ("model.optim.betas", "'x'", "float")),
        ("trainer=8", ("trainer", "section", "trainer.devices")),
    ],
)
def test_wrong_type_names_key_value_and_type(override: str, parts: tuple[str, ...]) -> None:
    text = message(override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model=tini", ("model=tiny", "llama3_8b", "synthetic")),
        ("precision=fp16", ("precision=", "bf16", "fp8_delayed")),
        ("experiment=synthetc", ("experiment=synthetic",)),
        ("model=3", ("model=3", "tiny")),
    ],
)
def test_unknown_group_option_names_the_nearest_and_lists_all(override: str, parts: tuple[str, ...]) -> None:
    text = message(override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("override", ["model.num_layers=[1", "seed", "a b=1", "seed=a=b", "data.train_path='a", "=3"])
def test_override_that_cannot_be_read_is_shown_with_how_to_write_it(override: str) -> None:
    text = message(override)
    assert repr(override) in text and "key=value" in text


@pytest.mark.parametrize(
    "text",
    ["runs/модель", "/tmp/ä ö.jsonl", "a=b", "007", "1e3", "true", "it's", "back\\slash\\", "a(b) [c]", "#1", "x: y"],
)
def test_a_text_that_hydra_refuses_or_takes_for_something_else_is_meant_literally(text: str) -> None:
    assert load_config([f"data.train_path={text}"], "sft").data.train_path == text
    assert load_config([f"stage.sft.data.train_path={text}"], "sft").data.train_path == text


def test_texts_of_a_list_are_read_in_the_same_way_and_quotes_and_interpolations_keep_their_meaning() -> None:
    assert load_config(["ensemble.members=[runs/ä/model, b c]"], "attack").ensemble.members == ["runs/ä/model", "b c"]
    assert load_config(["data.train_path='a,b'"], "sft").data.train_path == "a,b"
    assert load_config(["run_dir=runs/${name}/é", "name=n"], "sft").run_dir == "runs/n/é"
    assert "not text in this locale" in message("run_dir=\udce4")


def test_option_in_place_of_a_setting() -> None:
    assert "--model" in message("--model") and "key=value" in message("--model")


def test_list_without_brackets_says_how_to_write_it() -> None:
    assert "ensemble.members=[a,b]" in message("ensemble.members=x,y")


@pytest.mark.parametrize("override", ["~model.num_layers", "~model", "~trainer"])
def test_key_of_the_schema_cannot_be_deleted(override: str) -> None:
    assert "cannot be deleted" in message(override)


@pytest.mark.parametrize("key", [key for key in CHOICES if "*" not in key])
def test_value_that_is_no_choice_names_key_and_nearest(key: str) -> None:
    options = [option for option in CHOICES[key] if option]
    section, _, field = key.rpartition(".")
    cfg = Config()
    setattr(operator.attrgetter(section)(cfg), field, f"{options[-1]}x")
    with pytest.raises(ConfigError) as error:
        check_values(cfg)
    assert f"{key}={options[-1]}x: did you mean {options[-1]}?" in str(error.value)
    assert all(option in str(error.value) for option in options)


def test_choice_of_a_named_run_is_checked() -> None:
    assert "pipeline.rlhf.mine.reward=r2: did you mean r1?" in message("pipeline.rlhf.mine.reward=r2")


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=0",
        "model.optim.lr=0",
        "model.optim.lr=nan",
        "model.optim.lr=inf",
        "model.optim.betas=[0.9,1.0]",
        "trainer.max_steps=-2",
        "model.hidden_dropout=1",
        "data.validation_fraction=1.0",
        "rl.top_p=0",
        "rl.top_p=1.1",
        "rl.temperature=0",
        "rl.top_k=-1",
        "rl.max_new_tokens=0",
        "selection.top_fraction=1.5",
        "rl.group_size=0",
        "pipeline.rlhf.mine.coefficient=-1",
        "rl.unended_penalty=nan",
    ],
)
def test_value_out_of_range_names_the_key(override: str) -> None:
    assert message(override).startswith(override.partition("=")[0] + "=")


def test_a_scoring_by_servers_must_end_before_the_other_processes_stop_waiting() -> None:
    members = "ensemble.members=[runs/rm/model,http://127.0.0.1:8000]"
    told = message(members, "trainer.timeout_minutes=5")
    assert told.startswith("remote.deadline_seconds=300: must be less than trainer.timeout_minutes=5 (300 seconds)")
    for others in (["trainer.timeout_minutes=6"], ["ensemble.members=[runs/rm/model]"]):
        load_config([members, "trainer.timeout_minutes=5", *others])


def test_stage_settings_are_checked_whichever_stage_runs() -> None:
    assert "stage.rlhf" in message("stage.rlhf.model.num_layers=0", stage="train_rm")


def test_unknown_tokenizer_is_an_error() -> None:
    assert "model.tokenizer=bpe" in message("model.tokenizer=bpe")


def test_a_number_that_may_be_absent_is_null_and_no_other_is() -> None:
    assert load_config([]).rl.unended_penalty is None
    assert load_config(["rl.unended_penalty=-7"]).rl.unended_penalty == -7.0
    absent = ["rl.unended_penalty=-7", "stage.rlhf.rl.unended_penalty=null"]
    assert load_config(absent, "rlhf").rl.unended_penalty is None
    assert "rl.unended_penalty" in message("rl.unended_penalty=low")


# A user's own files


def test_own_group_folder_by_searchpath(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "mine.yaml"
    search = f"hydra.searchpath=[{tmp_path}]"
    file.write_text("num_layers: 3\n")
    assert load_config([search, "model=mine"]).model.num_layers == 3
    file.write_text("num_layrs: 3\n")
    assert "model.num_layrs: did you mean model.num_layers?" in message(search, "model=mine")
    file.write_text("num_layers: [3\n")
    assert str(file) in message(search, "model=mine")
    assert "mine" in message(search, "model=mein")


# Tables and files


def test_every_key_has_a_help_line_and_every_number_limits() -> None:
    for root in (Config, AuditConfig, ConvertConfig, ExportPairsConfig):
        for name, key in all_keys(root).items():
            assert key.about.help, name
            numeric = key.annotation in (int, float, int | None, float | None, list[int], list[float])
            assert (key.about.limits is not None) == numeric, name


def test_defaults_pass_the_checks() -> None:
    check_values(Config())


@pytest.mark.long
def test_nearest_key_of_a_valid_key_is_itself() -> None:
    for name in all_keys():
        assert nearest_key(name.replace("*", "mine")) == name.replace("*", "mine")
        assert expected_type(name) is not None


def test_saved_configuration_holds_every_key() -> None:
    cfg = load_config(["experiment=synthetic"], "attack")
    loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(resolved(cfg)))
    assert OmegaConf.to_object(loaded) == cfg


def test_versions_name_the_libraries() -> None:
    found = versions()
    assert {"nemo_advrm", "python", "torch", "megatron-core", "nemo-toolkit", "numpy"} <= set(found)
    assert found["python"].startswith("3.")


def test_import_loads_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "nemo", "lightning", "megatron", "transformers")
    code = f"import sys, nemo_advrm.config; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
