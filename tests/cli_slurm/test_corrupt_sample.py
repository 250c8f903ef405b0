"""A sample that ends every attempt at the same step: the job stops, and says where it lies."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.cli.slurm.main import main
from megatron.cli.train import train
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment
from megatron.ledger.launches_file import read_launches
from megatron.stream.indexed_dataset import IndexedDataset
from tests.cli.bad_runs import CONFIG, write_dataset
from tests.worlds import RankContext, WorldFailed, run_ranks

pytestmark = pytest.mark.distributed

DOCUMENT = 21


def corrupt(prefix: Path) -> int:
    """Give a document a token that the model has no row for; return the byte it lies at."""
    byte = int(IndexedDataset(str(prefix)).pointers[DOCUMENT]) + 2 * 2
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    tokens[byte // 2] = 700  # the character vocabulary has 512
    tokens.flush()
    return byte


def launch(config: Path, folder: Path) -> None:
    resolved = load_config([config], {}, local_slots=lambda: 1)

    def rank(context: RankContext) -> None:
        train(resolved, RankEnvironment(0, 0, 1, context.init_method))

    with pytest.raises(WorldFailed, match="holds token id 700"):
        run_ranks(rank, 1, folder)


def test_three_deaths_in_one_step_stop_the_job_with_its_documents_and_bytes(tmp_path, capsys):
    write_dataset(tmp_path / "text")
    byte = corrupt(tmp_path / "text")
    save = tmp_path / "save"
    keys = {"save": str(save), "load": str(save), "checkpoint_factor": 3, "train_iters": 30}
    config = tmp_path / "config.yml"
    config.write_text(json.dumps(CONFIG | keys | {"data_path": str(tmp_path / "text")}))
    actions = []
    for _ in range(3):
        launch(config, tmp_path)
        status = main(["decide", "--status", "1", str(config)])
        actions.append((status, [one.action for one in read_launches(save)]))
    printed = capsys.readouterr().out
    assert [status for status, _ in actions] == [75, 75, 1], printed
    assert actions[-1][1] == ["requeue", "requeue", "stop"]

    report = printed[printed.index("neox-slurm: stop") :]
    assert report.count("failed: DatasetError") == 3
    [step] = {
        int(line.partition("died in step ")[2].partition(",")[0])
        for line in report.splitlines()
        if "died in step" in line
    }
    assert step > 3, "the run was to have a checkpoint"
    assert f"step {step} reads positions {2 * step - 2}..{2 * step - 1}" in report
    [named] = [line for line in report.splitlines() if f"document {DOCUMENT} of" in line]
    first, _, last = named.rpartition("text.bin bytes ")[2].partition("..")
    assert int(first) <= byte < int(last)

    # somebody has looked at it: the next submission has all its tries again
    assert main(["decide", str(config)]) == 75


def test_a_corrupt_sample_of_the_validation_is_named_as_such(tmp_path, capsys):
    write_dataset(tmp_path / "text")
    document = 33  # of the second part of 8,1,1
    byte = int(IndexedDataset(str(tmp_path / "text")).pointers[document])
    tokens = np.memmap(tmp_path / "text.bin", dtype=np.uint16, mode="r+")
    tokens[byte // 2] = 700
    tokens.flush()
    save = tmp_path / "save"
    keys = {"save": str(save), "load": str(save), "checkpoint_factor": 2, "eval_interval": 2}
    keys |= {"train_iters": 60, "data_path": str(tmp_path / "text")}
    config = tmp_path / "config.yml"
    config.write_text(json.dumps(CONFIG | keys))
    for status in (75, 1):
        launch(config, tmp_path)
        assert main(["decide", "--status", "1", "--tries", "2", str(config)]) == status
    report = capsys.readouterr().out
    report = report[report.index("neox-slurm: stop") :]
    assert report.count("in its validation, failed: DatasetError") == 2
    assert f"document {document} of" in report
    assert "--stream valid" in report
