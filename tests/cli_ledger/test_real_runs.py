"""Runs that really trained, asked afterwards."""

import json

import numpy as np
import pytest

from megatron.cli.ledger.main import main
from tests.engine.training_runs import neox_config, run_training

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train NeoX's recorded run: 6 steps on one rank, then 4 on two with half the micro batch."""
    folder = tmp_path_factory.mktemp("real")
    config = neox_config(
        folder,
        save=str(folder / "save"),
        load=str(folder / "save"),
        checkpoint_factor=3,
        eval_interval=5,
        train_iters=20,
    )
    run_training(config | {"exit_interval": 6}, folder / "first")
    two = {"num_gpus": 2, "train_micro_batch_size_per_gpu": 2, "exit_interval": 10}
    two["no_load_optim"] = True  # the data goes on exactly all the same
    run_training(config | two, folder / "second")
    return folder


def test_a_trained_run_is_whole(trained, capsys):
    status = main(["verify", "--run", str(trained / "save"), "--all"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "digests    10 steps and 2 evaluations computed from the data" in printed


def test_its_steps_have_neox_digests_and_the_ranks_that_read_them(trained, capsys):
    main(["step", "2", "--run", str(trained / "save"), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["digest"] == "5b29fa540cd875e9"  # the oracle's run a, step 2
    main(["step", "8", "--run", str(trained / "save"), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["attempt"] == 2
    assert {sample["data_parallel_rank"] for sample in answer["samples"]} == {0, 1}


def test_the_plan_of_its_next_launch_goes_on_from_its_checkpoint(trained, capsys):
    # the newest one is of step 9
    status = main(["explain", str(trained / "second" / "config.yml"), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert (status, answer["kind"], answer["next_step"]) == (0, "continue", 10)
    assert answer["streams"]["train"]["next_position"] == 72


def test_its_text_can_be_exported(trained, tmp_path, capsys):
    arguments = [
        "export",
        "1..2",
        "--run",
        str(trained / "save"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--tokenizer", str(trained / "tok.json")]) == 0
    assert np.load(tmp_path / "out/tokens.npy").shape == (16, 65)
    lines = [json.loads(text) for text in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert all(len(line["text"]) > 65 for line in lines)
