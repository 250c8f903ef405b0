"""Every launch keeps the ledger: digests of what was read, lineage across stops and changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.base.errors import RunDirectoryError
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.ledger.attempt_facts import read_attempt_facts
from megatron.ledger.attempts import AttemptLog
from megatron.ledger.digests import batch_digest, digest_text
from megatron.ledger.ledger_file import read_ledger
from megatron.ledger.lineage import lineage_of_checkpoint, lineage_of_run
from megatron.ledger.lineage_check import check_lineage
from megatron.ledger.queries.adopted_geometry import adopted_geometry
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.samples import step_frame
from megatron.stream.indexed_dataset import IndexedDatasetBuilder
from tests.engine.training_runs import ORACLE, neox_config, run_training
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

FIRST_DIGESTS = ["405cec4e22477671", "5b29fa540cd875e9"]  # of the oracle's steps 1 and 2


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    run = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "checkpoint_factor": 4}
    short = {"train_iters": 8, "lr_decay_iters": 20, "eval_interval": 4}
    return neox_config(tmp_path, **(run | short | changes))


@pytest.mark.parametrize(
    "topology",
    [
        {},
        {"pipe_parallel_size": 2, "model_parallel_size": 2},
        {"num_gpus": 2, "gradient_accumulation_steps": 1},
        {
            "pipe_parallel_size": 0,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 8,
        },
        {"num_workers": 2},
    ],
    ids=["one process", "TP2 x PP2", "DP2", "sequential, micro batch 1", "two workers"],
)
def test_digests_are_those_of_the_oracle_whatever_the_topology(
    topology: dict[str, Any], tmp_path: Path
):
    trained = run_training(config(tmp_path, train_iters=4, **topology), tmp_path)
    assert [record.digest for record in trained.records[:2]] == FIRST_DIGESTS


def test_a_checkpoint_tells_its_lineage(tmp_path: Path):
    run_training(config(tmp_path), tmp_path)
    ledger = read_ledger(tmp_path / "run" / "global_step8")
    assert ledger is not None
    assert ledger.step == 8
    assert ledger.streams["train"].next_position == 64
    # Saved before the evaluation due at step 8; the one at step 4 consumed 16 samples.
    assert ledger.evaluation_due
    assert ledger.streams["valid"].next_position == 16
    lineage = lineage_of_checkpoint(tmp_path / "run" / "global_step8")
    assert check_lineage(lineage).findings == ()
    facts = read_attempt_facts(tmp_path / "run", 1)
    assert facts is not None
    assert facts.stop is not None
    assert facts.stop.reason == "finished"


def test_steps_done_again_read_the_same(tmp_path: Path):
    stopped = run_training(config(tmp_path, exit_interval=6), tmp_path / "first")
    resumed = run_training(config(tmp_path), tmp_path / "second")
    assert [record.step for record in stopped.records] == [1, 2, 3, 4, 5, 6]
    assert [record.step for record in resumed.records] == [5, 6, 7, 8]
    again = resumed.records[:2]
    assert [one.digest for one in again] == [one.digest for one in stopped.records[4:]]
    assert [one.loss for one in again] == [one.loss for one in stopped.records[4:]]
    assert check_lineage(lineage_of_run(tmp_path / "run")).findings == ()


def test_another_batch_size_goes_on_at_the_same_sample(tmp_path: Path):
    run_training(config(tmp_path, train_iters=4), tmp_path / "first")
    larger = {"gradient_accumulation_steps": 4, "train_iters": 8}
    resumed = run_training(config(tmp_path, **larger), tmp_path / "second")
    assert [(one.position, one.samples) for one in resumed.records] == [
        (32 + 16 * number, 16) for number in range(4)
    ]
    assert check_lineage(lineage_of_run(tmp_path / "run")).findings == ()
    ledger = read_ledger(tmp_path / "run" / "global_step8")
    assert ledger is not None
    assert [one.batch_size for one in ledger.streams["train"].segments] == [8, 16]


def test_a_longer_run_consumes_what_an_undisturbed_one_does(tmp_path: Path):
    # 60 steps are within one epoch, 150 are not: NeoX would shuffle anew.
    undisturbed = run_training(
        config(tmp_path, save=str(tmp_path / "whole"), load=str(tmp_path / "whole"), train_iters=6),
        tmp_path / "whole-world",
    )
    run_training(config(tmp_path, train_iters=3, checkpoint_factor=3), tmp_path / "first")
    longer = run_training(config(tmp_path, train_iters=150), tmp_path / "second")
    assert [one.digest for one in longer.records[:3]] == [
        one.digest for one in undisturbed.records[3:]
    ]
    assert check_lineage(lineage_of_run(tmp_path / "run")).findings == ()


def test_another_seed_is_refused_with_numbers_and_goes_on_when_accepted(tmp_path: Path):
    run_training(config(tmp_path, train_iters=4), tmp_path / "first")
    with pytest.raises(WorldFailed, match=r"seed") as refused:
        run_training(config(tmp_path, seed=4321), tmp_path / "refused")
    assert "accept_data_change" in str(refused.value)
    accepted = config(tmp_path, seed=4321, accept_data_change=["seed"])
    resumed = run_training(accepted, tmp_path / "accepted")
    assert [one.step for one in resumed.records] == [5, 6, 7, 8]
    ledger = read_ledger(tmp_path / "run" / "global_step8")
    assert ledger is not None
    assert [change.keys for change in ledger.accepted] == [("seed",)]


def test_neoxs_checkpoint_is_adopted_and_read_on_where_neox_would(tmp_path: Path):
    adopted = config(
        tmp_path,
        load=str(ORACLE / "ckpt_a"),
        train_iters=20,
        eval_interval=10,
        checkpoint_factor=20,
    )
    trained = run_training(adopted, tmp_path)
    assert [one.position for one in trained.records] == list(range(80, 160, 8))
    ledger = read_ledger(tmp_path / "run" / "global_step20")
    assert ledger is not None
    assert ledger.adopted is not None
    assert ledger.adopted.step == 10
    run = open_run(tmp_path / "run")
    for stream, one in (("train", 3), ("valid", 1)):
        frame = step_frame(run, one, stream)
        assert (frame.stage, frame.geometry) == ("adopted", BatchGeometry(4, 1, 2))
    elsewhere = replace(ledger.adopted, source=str(tmp_path / "gone"))
    assert adopted_geometry(replace(ledger, adopted=elsewhere)) == BatchGeometry(4, 1, 2)
    first_release = replace(elsewhere, geometry=None)  # then as in the launch that adopted it
    assert adopted_geometry(replace(ledger, adopted=first_release)) == BatchGeometry(4, 1, 2)


def test_a_roll_back_leaves_a_branch_behind(tmp_path: Path):
    first = run_training(config(tmp_path), tmp_path / "first")
    back = run_training(config(tmp_path, iteration=4), tmp_path / "back")
    assert [one.step for one in back.records] == [5, 6, 7, 8]
    assert [one.digest for one in back.records] == [one.digest for one in first.records[4:]]
    # The same command again goes on instead of rolling back once more.
    again = run_training(config(tmp_path, iteration=4, train_iters=10), tmp_path / "again")
    assert [one.step for one in again.records] == [9, 10]


def test_preshuffled_rows_are_read_one_after_the_other(tmp_path: Path):
    rows = np.random.default_rng(0).integers(2, 300, size=(64, 65)).astype(np.uint16)
    builder = IndexedDatasetBuilder(str(tmp_path / "rows.bin"), np.uint16)
    for row in rows:
        builder.add_item(row)
        builder.end_document()
    builder.finalize(str(tmp_path / "rows.idx"))
    sequential = config(
        tmp_path, train_iters=3, data_order="sequential", split="1,0,0", eval_interval=100
    ) | {"data_path": str(tmp_path / "rows")}
    check_launch(load_config([], sequential, local_slots=lambda: 1))
    trained = run_training(sequential, tmp_path)
    assert [record.digest for record in trained.records] == [
        digest_text(batch_digest(rows[start : start + 8], range(start, start + 8)))
        for start in (0, 8, 16)
    ]


@pytest.mark.parametrize(("checkpoint_factor", "steps"), [(2, 2), (8, 3)])
def test_lines_that_cannot_be_written_stop_every_rank_before_a_save_or_at_the_next_gather(
    checkpoint_factor: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each step is flushed; the second time rank 0 fails. Nothing of step 2 is published."""
    written = []
    append = AttemptLog.append_chained

    def full_at_the_second(self: AttemptLog, records: Any, previous: str) -> str:
        written.append(None)
        if len(written) == 2:
            raise RunDirectoryError("no room for lines")
        return append(self, records, previous)

    monkeypatch.setattr(AttemptLog, "append_chained", full_at_the_second)
    changes = {"checkpoint_factor": checkpoint_factor, "log_interval": 1, "num_gpus": 2}
    keys = config(tmp_path, gradient_accumulation_steps=1, eval_interval=100, **changes)
    with pytest.raises(WorldFailed, match="RunDirectoryError: no room for lines") as failed:
        run_training(keys, tmp_path)
    assert "PeerFailedError: rank 0 failed: RunDirectoryError: no room" in str(failed.value)
    assert list((tmp_path / "run").glob("global_step*")) == []
    facts = read_attempt_facts(tmp_path / "run", 1)
    assert facts is not None
    assert facts.stop is not None
    assert facts.stop.reason == "failed: RunDirectoryError"
    assert (facts.stop.step, facts.stop.done_step) == (1, steps)
