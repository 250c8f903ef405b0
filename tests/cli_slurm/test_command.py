"""neox-slurm as batch scripts call it: what it loads, prints and ends with."""

import json
import os
import subprocess
import sys
import tomllib

import pytest

from megatron.cli.slurm.main import main
from megatron.ledger.launches_file import read_launches
from tests.architecture.source_tree import ROOT
from tests.ledger.queries.simulated_run import SimulatedRun, write_corpus

HEAVY = {"torch", "deepspeed", "transformers", "tokenizers", "wandb", "pydantic", "numpy"}


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path):
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    config = {"save": str(run.save), "train-iters": 20}
    (tmp_path / "config.yml").write_text(json.dumps(config))
    return run


def decide(tmp_path, *options):
    return main(["decide", *options, str(tmp_path / "config.yml")])


def test_text_and_status_of_each_verdict(run, tmp_path, capsys):
    assert decide(tmp_path) == 75
    assert capsys.readouterr().out == "neox-slurm: launch: the run goes on from the start of 20\n"
    run.launch(7, saves=[7], stop="signal SIGUSR1", train_iters=20)
    assert decide(tmp_path, "--status", "75") == 75
    assert capsys.readouterr().out == ("neox-slurm: requeue: told to stop after step 7 of 20\n")
    assert decide(tmp_path, "--status", "2") == 1
    assert capsys.readouterr().out.startswith("neox-slurm: stop: exit status 2: ")
    run.launch(20, saves=[20], train_iters=20)
    assert decide(tmp_path, "--status", "0") == 0
    assert [one.action for one in read_launches(run.save)] == ["requeue", "stop", "done"]


def test_json_has_the_batch_of_the_step_it_died_in(run, tmp_path, capsys):
    for status in ("75", "75", "1"):
        run.launch(7, saves=[5], stop="failed: DatasetError", train_iters=20)
        capsys.readouterr()
        assert decide(tmp_path, "--status", "1", "--json") == int(status)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["action"], answer["step"], answer["train_iters"]) == ("stop", 7, 20)
    assert [one["died_in"] for one in answer["attempts_without_progress"]] == [[8, 8]] * 3
    [batch] = answer["batches"]
    assert (batch["step"], batch["positions"]) == (8, [56, 64])
    assert [sample["position"] for sample in batch["samples"]] == list(range(56, 64))
    for sample in batch["samples"]:
        for document in sample["documents"]:
            [piece] = document["bytes"]
            start, stop = piece["bytes"]
            assert piece["file"] == str(tmp_path / "corpus.bin")
            assert stop - start == 2 * (document["tokens"][1] - document["tokens"][0])


def test_a_job_that_gives_up_before_a_launch_notes_it(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for restarts in range(3):
        job = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
        run.launch(7, saves=[5], stop=None, train_iters=20, environment={"job": job})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert decide(tmp_path) == 1
    assert "died in one of the steps 6..15, killed" in capsys.readouterr().out
    [noted] = read_launches(run.save)
    assert (noted.status, noted.action, noted.job) == (None, "stop", "17")
    assert decide(tmp_path) == 75  # requeued by hand after that, it tries again


def test_data_that_is_gone_is_said_and_the_job_stops_all_the_same(run, tmp_path, capsys):
    for launch in range(3):
        run.launch(7, saves=[5], stop="failed: OSError", train_iters=20)
        if launch < 2:
            assert decide(tmp_path, "--status", "1") == 75
    (tmp_path / "corpus.bin").unlink()
    (tmp_path / "corpus.idx").unlink()
    assert decide(tmp_path, "--status", "1") == 1
    printed = capsys.readouterr().out
    assert "step 8 reads positions 56..63" in printed
    assert "documents and bytes are not known" in printed


def test_several_files_and_the_folder_option_are_deepys(run, tmp_path, capsys):
    (tmp_path / "a.yml").write_text(json.dumps({"train_iters": 20}))
    (tmp_path / "b.yml").write_text(json.dumps({"save": str(run.save)}))
    assert main(["decide", "--", "-d", str(tmp_path), "a", "b.yml"]) == 75
    assert "of 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.yml: cannot be read"),
        ({"config.yml": "save: s\nsave: t\n"}, "stands twice"),
        ({"config.yml": "save: s\ntrain_iters: many\n"}, "train_iters='many'"),
    ],
)
def test_what_cannot_be_read_is_told_with_status_2(files, message, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert decide(tmp_path, "--status", "1") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_launch_that_went_well_loads_neither_torch_nor_numpy(run, tmp_path):
    run.launch(7, saves=[7], stop="signal SIGUSR1", train_iters=20)
    code = (
        "import sys\n"
        "from megatron.cli.slurm.main import main\n"
        f"main(['decide', '--status', '75', {str(tmp_path / 'config.yml')!r}])\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    printed = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert set(printed.splitlines()[-1].split()) & HEAVY == set()


def test_the_console_script_and_the_module_are_this_command(tmp_path):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["neox-slurm"] == "megatron.cli.slurm.main:main"
    done = subprocess.run(
        [sys.executable, "-m", "megatron.cli.slurm", "decide", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "once more" in done.stdout
