"""Which checkpoints there are, when one is due, what killed saves left."""

from pathlib import Path

import pytest

from megatron.base.errors import CheckpointError
from megatron.ledger.run_directory import (
    checkpoint_path,
    commit_checkpoint,
    delete_replaced,
    is_save_step,
    list_checkpoints,
    read_latest,
    remove_leftovers,
    temporary_name,
    write_latest,
)


def make_run(directory: Path, *steps: int, latest: int | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for step in steps:
        checkpoint_path(directory, step).mkdir()
        (checkpoint_path(directory, step) / "mp_rank_00_model_states.pt").write_text(f"step {step}")
    if latest is not None:
        write_latest(directory, latest)
    return directory


def test_only_directories_named_exactly_global_step_are_checkpoints(tmp_path):
    make_run(tmp_path, 10, 9, 100)
    for other in ("global_step7_backup", "xglobal_step8", ".tmp-global_step6-ab", "global_step010"):
        (tmp_path / other).mkdir()
    (tmp_path / "global_step11").write_text("a file")
    assert list_checkpoints(tmp_path) == [9, 10, 100]


def test_latest_is_read_as_neox_writes_it(tmp_path):
    make_run(tmp_path, 20)
    (tmp_path / "latest").write_text("global_step20")
    assert read_latest(tmp_path) == 20
    write_latest(tmp_path, 20)
    assert (tmp_path / "latest").read_text() == "global_step20"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"latest is empty$"),
        ("global_step999", r"latest names global_step999, which is not there$"),
        ("../evil", r"latest holds '../evil', not global_stepN$"),
    ],
)
def test_a_damaged_latest_is_an_error(tmp_path, content, message):
    make_run(tmp_path, 10, 20)
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_latest(tmp_path)


def test_linear_and_log_saves():
    def due(factor, scale, extra=()):
        return [
            step
            for step in range(21)
            if is_save_step(
                step, checkpoint_factor=factor, checkpoint_scale=scale, extra_save_iters=extra
            )
        ]

    assert due(5, "linear") == [5, 10, 15, 20]
    assert due(5.0, "linear", extra=(0, 7)) == [0, 5, 7, 10, 15, 20]
    assert due(2, "log") == [1, 2, 4, 8, 16]
    assert due(1.5, "log") == [1, 2, 3, 5, 7, 11, 17]  # int of 1, 1.5, 2.25, 3.375, 5.06, ...
    assert due(None, "linear", extra=(3,)) == [3]
    with pytest.raises(ValueError, match="whole number"):
        due(2.5, "linear")
    with pytest.raises(ValueError, match="must exceed 1"):
        due(1, "log")


def test_committing_replaces_an_older_checkpoint_of_the_same_step(tmp_path):
    make_run(tmp_path, 10)
    temporary = tmp_path / temporary_name(10)
    temporary.mkdir()
    (temporary / "new").touch()
    assert list_checkpoints(tmp_path) == [10]
    assert commit_checkpoint(temporary, 10) == tmp_path / "global_step10"
    delete_replaced(tmp_path / "global_step10")
    assert [path.name for path in (tmp_path / "global_step10").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["global_step10"]


def test_leftovers_of_a_killed_save_go_and_a_half_swapped_checkpoint_returns(tmp_path):
    make_run(tmp_path, 5, 10, latest=10)
    (tmp_path / temporary_name(15)).mkdir()
    half_swapped = tmp_path / temporary_name(10)
    half_swapped.mkdir()
    (tmp_path / "global_step10").rename(half_swapped / ".replaced")
    (tmp_path / "global_step5" / ".replaced").mkdir()
    (tmp_path / ".deleted-global_step4-0123456789ab").mkdir()
    (tmp_path / ".latest.0123456789ab.new").write_text("global_step15")
    assert len(remove_leftovers(tmp_path)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "global_step10",
        "global_step5",
        "latest",
    ]
    assert (tmp_path / "global_step10" / "mp_rank_00_model_states.pt").exists()
    assert not (tmp_path / "global_step5" / ".replaced").exists()
