"""``deepy.py [options] USER_SCRIPT CONFIG...``, as NeoX's users type it."""

import pytest

from megatron.base.errors import ConfigError
from megatron.config.command_line import parse_command_line


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_script(tmp_path, monkeypatch):
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)


def test_the_documented_form():
    command = parse_command_line(["train.py", "-d", "configs", "a.yml", "b.yml"])
    assert command.user_script == "train.py"
    assert command.config_paths == ("configs/a.yml", "configs/b.yml")
    assert command.overrides == {"user_script": "train.py"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("125M", "125M.yml"),
        ("1.5B.yml", "1.5B.yml"),
        ("a.json", "a.json"),
        ("a.yaml", "a.yaml.yml"),  # as in NeoX
        ("v1.0", "v1.0.yml"),
    ],
)
def test_yml_is_added_to_a_name_without_it(name, path):
    assert parse_command_line(["train.py", name]).config_paths == (path,)


@pytest.mark.parametrize(
    "argv",
    [
        ["-H", "hosts", "train.py", "a"],
        ["train.py", "a", "--hostfile=hosts"],
        ["train.py", "--hostfile", "hosts", "a"],
    ],
)
def test_options_stand_anywhere(argv):
    command = parse_command_line(argv)
    assert command.overrides == {"user_script": "train.py", "hostfile": "hosts"}
    assert command.config_paths == ("a.yml",)


def test_every_option_overrides_its_key():
    logs = ["--wandb_group", "g", "--wandb_run_name", "n", "--wandb_team", "t"]
    evaluation = ["--iteration", "5", "--eval_results_prefix", "p", "-i", "in", "-o", "out"]
    last = ["--autotuning", "run", "--eval_tasks", "x", "y"]
    command = parse_command_line(["train.py", "a", *logs, *evaluation, *last])
    assert command.overrides == {
        "user_script": "train.py",
        "wandb_group": "g",
        "wandb_run_name": "n",
        "wandb_team": "t",
        "iteration": 5,
        "eval_results_prefix": "p",
        "sample_input_file": "in",
        "sample_output_file": "out",
        "autotuning_run": "run",
        "eval_tasks": ["x", "y"],
    }


def test_a_missing_script_is_named():
    with pytest.raises(ConfigError, match=r"user script 'trian.py' not found in .*; the order is"):
        parse_command_line(["trian.py", "a"])


@pytest.mark.parametrize("argv", [[], ["train.py"], ["train.py", "a", "--conf", "x"]])
def test_incomplete_or_abbreviated_arguments_end_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(argv)
    assert caught.value.code == 2
    assert "usage: deepy.py" in capsys.readouterr().err
