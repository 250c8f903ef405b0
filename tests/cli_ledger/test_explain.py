"""A launch planned from its configuration: what goes on, what is adopted, what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from megatron.cli.ledger.main import main
from megatron.cli.resume_plan import plan_launch
from megatron.cli.wanted_launch import numerics_of
from megatron.config.load import load_config
from tests.architecture.source_tree import ROOT
from tests.cli_ledger.test_start import HEAVY

DATA = ROOT / "tests" / "data"
ORACLE = DATA / "oracle"


@pytest.fixture
def write_config(tmp_path):
    """Write the configuration of the recorded NeoX run ``a``, on a copy of its corpus."""
    for suffix in ("bin", "idx"):
        shutil.copy(DATA / "stream/oracle" / f"corpus_a_text_document.{suffix}", tmp_path)
    shutil.copy(DATA / "tokenizer/tok.json", tmp_path)
    config = yaml.safe_load((ORACLE / "ckpt_a/global_step10/configs/a.yml").read_text())
    config |= {
        "data_path": str(tmp_path / "corpus_a_text_document"),
        "vocab_file": str(tmp_path / "tok.json"),
        "num_gpus": 1,
        "save": str(tmp_path / "save"),
        "load": str(tmp_path / "save"),
    }

    def write(**changes):
        path = tmp_path / "my.yml"
        written = {key: value for key, value in (config | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(written))
        return path

    return write


def planned(path):
    return plan_launch(load_config([path], local_slots=lambda: 1))


def explained(path, capsys, *options):
    status = main(["explain", str(path), *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_new_run_begins_at_position_0(write_config, capsys):
    status, out, _ = explained(write_config(), capsys)
    assert status == 0
    assert out.startswith("plan       a new run, steps 1..20\n")
    assert "exact: every position is consumed once, from 0" in out


def test_neox_checkpoint_is_adopted_with_what_had_to_be_assumed(write_config, capsys):
    path = write_config(load=str(ORACLE / "ckpt_a"))
    status, out, _ = explained(path, capsys)
    assert status == 0
    assert "which has no ledger, and goes on with steps 11..20" in out
    assert "step 11 begins at position 80, sample 80 of order" in out
    assert "its data lies where this launch names it: data_path, vocab_file" in out
    plan = planned(path).plan
    # NeoX evaluated once, after step 10: 2 batches of 4 samples, twice for accumulation
    assert plan.streams["valid"].state.next_position == 16


def test_a_checkpoint_without_its_configuration_is_adopted_by_this_launchs(
    write_config, tmp_path, capsys
):
    checkpoint = tmp_path / "theirs" / "global_step10"
    shutil.copytree(ORACLE / "ckpt_a/global_step10", checkpoint)
    shutil.rmtree(checkpoint / "configs")
    (tmp_path / "theirs" / "latest").write_text("global_step10")
    status, out, _ = explained(write_config(load=str(tmp_path / "theirs")), capsys)
    assert status == 0
    assert "its data keys are this launch's: no configuration was saved with it" in out


def test_another_seed_is_refused_with_counts(write_config, capsys):
    path = write_config(load=str(ORACLE / "ckpt_a"), seed=7)
    status, out, _ = explained(path, capsys)
    assert status == 1
    assert "seed 1234 -> 7: no exact continuation" in out
    assert "accept_data_change: [seed]" in out
    status, out, _ = explained(path, capsys, "--json")
    answer = json.loads(out)
    assert (status, answer["kind"], answer["exit_status"]) == (1, "refuse", 1)
    assert answer["data_break"]["counts"]["repeated"]["tokens"] > 0


def test_another_schedule_is_refused_with_rates(write_config, capsys):
    path = write_config(load=str(ORACLE / "ckpt_a"), lr_decay_iters=None, train_iters=40)
    status, out, _ = explained(path, capsys)
    assert status == 1
    assert "end_iter 20 in the checkpoint, 40 configured" in out


def test_what_the_launcher_would_refuse_is_refused(write_config, tmp_path, capsys):
    status, _, err = explained(write_config(num_layerz=3), capsys)
    assert status == 1
    assert "refused: " in err
    assert "num_layerz" in err
    status, _, err = explained(write_config(load=str(tmp_path / "nowhere")), capsys)
    assert status == 1
    assert "nowhere does not exist" in err


def test_data_that_is_not_there_leaves_the_plan_unknown(write_config, tmp_path, capsys):
    path = write_config()
    (tmp_path / "corpus_a_text_document.bin").unlink()
    status, _, err = explained(path, capsys)
    assert status == 2
    assert "does not exist; a dataset is named by its path" in err


def test_more_ranks_can_be_named_on_a_login_node(write_config, capsys):
    _, out, _ = explained(write_config(num_gpus=None), capsys, "--world-size", "4")
    assert "32 samples per step" in out


def test_an_elastic_batch_at_another_number_of_ranks(write_config, capsys):
    path = write_config(
        num_gpus=None,
        elastic_batch=True,
        train_batch_size=12,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
    )
    status, out, err = explained(path, capsys, "--world-size", "4")
    assert status == 0
    assert "12 samples per step" in out
    assert (
        "elastic_batch: 12 samples = micro batch 1 x accumulation 3 x 4 data-parallel ranks" in out
    )
    assert "a rank takes at most 2 at a time (my.yml)" in err
    status, _, err = explained(path, capsys, "--world-size", "5")
    assert status == 1
    assert "elastic_batch works with 4 or 6 ranks" in err


def test_ranks_named_on_a_login_node_win_over_a_host_file(write_config, tmp_path, capsys):
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    path = write_config(num_gpus=None, hostfile=str(tmp_path / "hosts"))
    _, out, _ = explained(path, capsys, "--world-size", "8")
    assert "64 samples per step" in out


def test_the_five_lines_of_the_launcher_are_the_first_ones(write_config, capsys):
    path = write_config()
    _, out, _ = explained(path, capsys)
    lines = planned(path).lines
    assert len(lines) == 5
    assert out.splitlines()[:5] == lines


def test_planning_loads_no_torch(write_config):
    code = (
        "import sys\n"
        "from megatron.cli.ledger.main import main\n"
        f"main(['explain', {str(write_config(load=str(ORACLE / 'ckpt_a')))!r}])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert modules & (HEAVY - {"yaml"}) == set()


def test_one_stage_with_and_without_the_pipeline_engine_are_told_apart(write_config):
    stages = [
        numerics_of(config.topology, config.geometry, config.flat(), {})["pipe_parallel_size"]
        for config in (
            load_config([write_config(pipe_parallel_size=size)], local_slots=lambda: 1)
            for size in (0, 1)
        )
    ]
    assert stages == [0, 1]
