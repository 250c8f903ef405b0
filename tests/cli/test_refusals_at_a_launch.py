"""The whole way: deepy.py, train.py on real ranks, and what stands on the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.base.exit_codes import CANNOT_LAUNCH
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
    assert ended.returncode == CANNOT_LAUNCH
    message = (
        "rank 0: DatasetError: dataset text: text.bin does not exist; a dataset is named by its "
        "path without .bin and .idx"
    )
    lines = ended.stderr.splitlines()
    # once when it happens, once as the last word
    assert [line for line in lines if "DatasetError" in line] == [message, message]
    report = lines.index("---- deepy: of 4 ranks this one failed first:")
    assert lines[report + 1].startswith("---- rank 0: exit code 2, after ")
    assert lines[report + 2] == message
    assert lines[-1] == "---- the job ends with status 2"
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


def test_a_damaged_checkpoint_is_told_and_without_a_good_one_the_job_ends_with_a_status(tmp_path):
    write_dataset(tmp_path / "text")
    run = {
        "num_gpus": 2,
        "model_parallel_size": 2,
        "pipe_parallel_size": 1,
        "save": str(tmp_path / "saved"),
        "load": str(tmp_path / "saved"),
        "checkpoint_factor": 1,
        "eval_iters": 0,
        "lr_decay_iters": 10,
    }
    assert launch(tmp_path, **run, train_iters=2).returncode == 0
    newest = tmp_path / "saved" / "global_step2"
    content = bytearray((newest / "layer_02-model_01-model_states.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "layer_02-model_01-model_states.pt").write_bytes(content)

    ended = launch(tmp_path, **run, train_iters=3)
    assert ended.returncode == 0, ended.stderr
    problem = "layer_02-model_01-model_states.pt holds other bytes than were written"
    assert f"NOT LOADED: {newest}: {problem}" in ended.stdout
    told = f"rolled back from step 2 to step 1 because global_step2 is damaged: {problem}"
    assert told in ended.stdout
    assert f"loaded {tmp_path}/saved/global_step1, iteration 1" in ended.stdout

    checkpoints = sorted((tmp_path / "saved").glob("global_step*"))
    for checkpoint in checkpoints:
        (checkpoint / "mp_rank_01_model_states.pt").unlink()
    before = sorted((tmp_path / "saved").rglob("*"))
    ended = launch(tmp_path, **run, train_iters=4)
    assert ended.returncode == CANNOT_LAUNCH
    assert "no checkpoint of the run can be loaded, and nothing is deleted" in ended.stderr
    for checkpoint in checkpoints:
        assert f"{checkpoint}: mp_rank_01_model_states.pt is missing" in ended.stderr
    assert sorted((tmp_path / "saved").rglob("*")) == before
    assert "Traceback" not in ended.stderr
