"""The command line of ``deepy.py [options] USER_SCRIPT CONFIG [CONFIG ...]``, as in NeoX."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.base.errors import ConfigError

__all__ = ["DeepyCommand", "parse_command_line"]


@dataclass(frozen=True)
class DeepyCommand:
    """What the user asked deepy.py to start."""

    user_script: str  # as typed; exists
    config_paths: tuple[str, ...]  # with directory and suffix
    overrides: dict[str, Any]  # keys that win over the files, user_script among them


def parse_command_line(argv: Sequence[str]) -> DeepyCommand:
    """Read the arguments after ``deepy.py``.

    Raises:
        ConfigError: the user script is not there.
        SystemExit: the arguments can't be understood (status 2), or help was asked for (0).
    """
    options = vars(_parser().parse_args(list(argv)))
    directory = options.pop("conf_dir")
    names = options.pop("conf_file")
    user_script: str = options["user_script"]
    if not os.path.exists(user_script):
        raise ConfigError(
            f"user script {user_script!r} not found in {os.getcwd()}; "
            "the order is: deepy.py [options] train.py config.yml ..."
        )
    return DeepyCommand(
        user_script=user_script,
        config_paths=tuple(_config_path(name, directory) for name in names),
        overrides={name: value for name, value in options.items() if value is not None},
    )


def _config_path(name: str, directory: str | None) -> str:
    if Path(name).suffix not in (".yml", ".json"):
        name += ".yml"
    return os.path.join(directory, name) if directory is not None else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepy.py",
        description="Start a script of this repository on every rank.",
        allow_abbrev=False,
    )
    parser.add_argument("user_script", help="script to start, for instance train.py")
    parser.add_argument(
        "conf_file", nargs="+", help="configuration files; .yml is added to a name without suffix"
    )
    parser.add_argument("-d", "--conf_dir", help="folder of the configuration files")
    parser.add_argument(
        "-H", "--hostfile", help="host file with one 'host slots=N' per line; wins over the files"
    )
    logs = parser.add_argument_group("logging")
    logs.add_argument("--wandb_group", help="Weights & Biases group of the run")
    logs.add_argument("--wandb_run_name", help="Weights & Biases name of the run")
    logs.add_argument("--wandb_team", help="Weights & Biases team that owns the run")
    evaluation = parser.add_argument_group("evaluation and generation")
    evaluation.add_argument("--eval_tasks", nargs="+", help="lm-eval tasks, separated by spaces")
    evaluation.add_argument("--iteration", type=int, help="step whose checkpoint is loaded")
    evaluation.add_argument("--eval_results_prefix", help="start of the result file's name")
    evaluation.add_argument("-i", "--sample_input_file", help="file with prompts")
    evaluation.add_argument("-o", "--sample_output_file", help="file for generated text")
    parser.add_argument(
        "--autotuning",
        dest="autotuning_run",
        choices=("tune", "run"),
        help="DeepSpeed's autotuner: only tune, or also run the best setting found",
    )
    return parser
