"""Where a launch looks for what it loads. Runs with histories: engine/test_damaged_checkpoints."""

from pathlib import Path

import pytest

from megatron.base.errors import CheckpointError
from megatron.ledger.checkpoint_choice import choose as choose_first
from megatron.ledger.checkpoint_choice import search_for
from tests.checkpoint.test_run_directory import make_run


def choose(load: Path | None, save: Path | None, **options: object) -> Path | None:
    """Return what is loaded if nothing is wrong with it."""
    search = search_for(load, save, **{"iteration": None, "finetune": False, **options})
    if search is None:
        return None
    return choose_first(search, search.candidates(), lambda candidate: None).checkpoint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", r"latest is empty"),
        ("global_step999", r"names global_step999, which is not there"),
        ("../evil", r"holds '../evil', not global_stepN"),
    ],
)
def test_beside_checkpoints_that_nothing_tells_of_a_damaged_latest_is_an_error_that_lists_them(
    tmp_path, content, problem
):
    make_run(tmp_path, 10, 20)
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match=problem) as raised:
        choose(tmp_path, tmp_path)
    assert "not tried: global_step20, global_step10" in str(raised.value)
    assert "iteration: 20" in str(raised.value)


def test_a_missing_latest_beside_checkpoints_is_never_a_start_at_0(tmp_path):
    make_run(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"latest is missing\n.*global_step10"):
        choose(tmp_path, tmp_path)


def test_the_first_launch_of_a_continued_run_starts_at_0(tmp_path):
    assert choose(tmp_path / "new", tmp_path / "new") is None
    (tmp_path / "new").mkdir()
    assert choose(tmp_path / "new", tmp_path / "other" / ".." / "new") is None


def test_the_same_command_continues_from_latest(tmp_path):
    make_run(tmp_path, 10, 20, latest=10)
    assert choose(tmp_path, tmp_path) == tmp_path / "global_step10"


def test_a_named_iteration_wins_over_latest(tmp_path):
    make_run(tmp_path, 0, 10, 20, latest=20)
    assert choose(tmp_path, tmp_path, iteration=10) == tmp_path / "global_step10"
    assert choose(tmp_path, None, iteration=0) == tmp_path / "global_step0"


def test_an_absent_iteration_lists_the_available_ones(tmp_path):
    make_run(tmp_path, 10, 20, latest=20)
    with pytest.raises(CheckpointError, match=r"iteration: 7 .*global_step20, global_step10"):
        choose(tmp_path, tmp_path, iteration=7)


@pytest.mark.parametrize("exists", [False, True])
def test_loading_elsewhere_needs_a_checkpoint(tmp_path, exists):
    load = tmp_path / "typo"
    if exists:
        load.mkdir()
    with pytest.raises(CheckpointError, match=r"does not exist|holds no checkpoint"):
        choose(load, tmp_path / "save")


def test_a_save_with_checkpoints_is_not_overwritten_by_a_run_that_does_not_load_it(tmp_path):
    save = make_run(tmp_path / "save", 10, latest=10)
    other = make_run(tmp_path / "other", 5, latest=5)
    with pytest.raises(CheckpointError, match=r"load is not set.*overwrite.*set load: "):
        choose(None, save)
    with pytest.raises(CheckpointError, match=r"load is .*other.*overwrite"):
        choose(other, save, finetune=True)


def test_finetuning_needs_its_own_save(tmp_path):
    make_run(tmp_path, 10, latest=10)
    with pytest.raises(CheckpointError, match="finetune: true starts a new run"):
        choose(tmp_path, tmp_path, finetune=True)
    assert choose(tmp_path, tmp_path / "mine", finetune=True) == tmp_path / "global_step10"


def test_asking_for_a_checkpoint_without_load_is_an_error(tmp_path):
    assert choose(None, tmp_path / "save") is None
    with pytest.raises(CheckpointError, match="iteration: 3 is set but load is not"):
        choose(None, tmp_path / "save", iteration=3)
    with pytest.raises(CheckpointError, match="finetune: true is set but load is not"):
        choose(None, None, finetune=True)
