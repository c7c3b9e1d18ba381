"""The shipped configurations of accelerate, read by accelerate itself; and `mgllava train`."""

from importlib import resources

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from miniature import tiny_recipe, write_data, write_tiny_model
from typer.testing import CliRunner

from mgllava.cli import app

LAUNCH = resources.files("mgllava.training").joinpath("launch")
ENGINES = {
    "ddp.yaml": "MULTI_GPU",
    "fsdp2.yaml": "FSDP",
    "deepspeed_zero2.yaml": "DEEPSPEED",
    "deepspeed_zero3.yaml": "DEEPSPEED",
}


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_every_configuration(name):
    config = load_config_from_file(str(LAUNCH / name))
    assert config.mixed_precision == "bf16"
    assert config.distributed_type == ENGINES[name]


def test_no_configuration_goes_untested():
    assert sorted(entry.name for entry in LAUNCH.iterdir()) == sorted(ENGINES)


def test_the_sharding_that_accelerate_sets_up():
    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCH / "fsdp2.yaml"), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.gpu_ids = None
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_settings_are_known_to_accelerate(stage):
    """Only their names and values: DeepSpeed itself is not there to take them."""
    settings = load_config_from_file(str(LAUNCH / f"deepspeed_zero{stage}.yaml")).deepspeed_config
    known = {action.dest for action in launch_command_parser()._actions}
    assert settings.keys() <= known
    assert settings["zero_stage"] == stage
    assert settings["gradient_clipping"] == 1.0


def test_the_command_trains_and_says_where_the_result_is(tmp_path):
    yaml = pytest.importorskip("yaml")
    recipe = tiny_recipe(
        write_tiny_model(tmp_path / "model"), write_data(tmp_path), tmp_path / "run", stage=1, max_steps=1
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0, done.exception
    assert str(tmp_path / "run" / "neck.safetensors") in done.stdout.replace("\n", "")


def test_a_missing_recipe_is_an_error_of_one_line():
    done = CliRunner().invoke(app, ["train", "nowhere"])
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert message.startswith("error: there is no recipe nowhere; shipped are embedded-language-model")
