"""The whole way: deepy.py, train.py on real ranks, and what stands on the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.bad_runs import config_file, write_dataset

pytestmark = pytest.mark.launcher

REPOSITORY = Path(__file__).parents[2]


def launch(directory: Path, **keys: object) -> subprocess.CompletedProcess[str]:
    (directory / "a.yml").write_text(config_file(**keys))
    command = [sys.executable, str(REPOSITORY / "deepy.py"), str(REPOSITORY / "train.py"), "a.yml"]
    environ = {"DLTS_HOSTFILE": "none", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_missing_dataset_ends_four_ranks_with_one_message(tmp_path):
    write_dataset(tmp_path / "text")
    (tmp_path / "text.bin").unlink()
    ended = launch(tmp_path, num_gpus=4, model_parallel_size=2, pipe_parallel_size=2)
    assert ended.returncode == 1
    message = (
        "rank 0: DatasetError: dataset text: text.bin does not exist; a dataset is named by its "
        "path without .bin and .idx"
    )
    lines = ended.stderr.splitlines()
    # once when it happens, once as the last word
    assert [line for line in lines if "DatasetError" in line] == [message, message]
    report = lines.index("---- deepy: of 4 ranks this one failed first:")
    assert lines[report + 1].startswith("---- rank 0: exit code 1, after ")
    assert lines[report + 2] == message
    assert lines[-1] == "---- the job ends with status 1"
    assert "Traceback" not in ended.stderr
    # of megatron-core, on every rank, about what nobody here needs
    assert "Apex" not in ended.stderr


def test_a_bad_configuration_starts_nothing(tmp_path):
    write_dataset(tmp_path / "text")
    ended = launch(tmp_path, num_layer=2, num_gpus=2, train_batch_size=7)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        "deepy: 2 problems in the configuration:",
        "  - a.yml: unknown key 'num_layer'; did you mean 'num_layers'?",
        "  - train_batch_size=7 (a.yml) must be a multiple of micro batch 2 x data-parallel size 2 "
        "= 4; nearest: 4, 8",
    ]
