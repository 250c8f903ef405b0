"""A damaged checkpoint is found by all ranks before anything is built, and its parent is used."""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.base.errors import MegatronError
from megatron.cli.ledger.main import main
from megatron.cli.saved_state import Checkpoints
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment, connect
from megatron.ledger.attempts import StepRecord
from megatron.ledger.manifest import Manifest, read_manifest
from megatron.ledger.shared_directory import answer_mark
from tests.checkpoint.damages import (
    DAMAGES,
    Surroundings,
    files_by_kind,
    flip_a_bit,
    obey_permissions,
)
from tests.engine.interrupted_runs import MODEL, SCHEDULE
from tests.engine.training_runs import ORACLE, neox_config, run_training, world_size
from tests.worlds import RankContext, run_ranks

pytestmark = pytest.mark.distributed

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "tp2pp2": {"model_parallel_size": 2, "pipe_parallel_size": 2, "num_gpus": 4},
    "dp2": {"model_parallel_size": 1, "pipe_parallel_size": 1, "num_gpus": 2},
}
STEPS = 3  # each is saved


@dataclass(frozen=True)
class SavedRun:
    """A run with a checkpoint of each of its steps."""

    folder: Path
    config: dict[str, Any]

    def copy(self, folder: Path) -> Path:
        """Return a copy of its save directory."""
        shutil.copytree(self.folder / "save", folder / "save")
        return folder / "save"


@dataclass(frozen=True)
class Opening:
    """How the opening of a launch ended on one rank."""

    loaded: int | None  # step
    reason: str
    error: str
    printed: str


@pytest.fixture(scope="module", params=list(TOPOLOGIES))
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    changes = MODEL | SCHEDULE | TOPOLOGIES[request.param]
    changes |= {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1}
    changes |= {"train_iters": STEPS, "checkpoint_factor": 1, "eval_iters": 0}
    changes |= {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    save = str(folder / "save")
    config = neox_config(folder, **changes, save=save, load=save)
    run_training(config, folder / "launch")
    return SavedRun(folder, config)


def open_runs(
    config: dict[str, Any],
    saves: Sequence[Path],
    folder: Path,
    *,
    rank_folders: Path | None = None,
    **changes: Any,
) -> list[list[Opening]]:
    """Do what a launch does before it builds anything; return how it ended, by run and rank."""
    folder.mkdir(exist_ok=True)
    resolved = []
    for number, save in enumerate(saves):
        path = folder / f"{number}.yml"
        path.write_text(yaml.safe_dump(config | {"save": str(save), "load": str(save)} | changes))
        resolved.append(load_config([path], {}, local_slots=lambda: world_size(config)))

    def rank_main(context: RankContext) -> list[Opening]:
        obey_permissions()
        local_rank = context.rank
        if rank_folders is not None:
            (rank_folders / str(context.rank) / "save").mkdir(parents=True)
            os.chdir(rank_folders / str(context.rank))
            local_rank = 0
        me = RankEnvironment(context.rank, local_rank, context.world_size, context.init_method)
        groups = connect(me, resolved[0].topology, backend="gloo")
        openings = []
        for one in resolved:
            printed = io.StringIO()
            loaded, reason, message = None, "", ""
            with contextlib.redirect_stdout(printed):
                try:
                    checkpoints = Checkpoints.open(one, groups)
                    source = checkpoints.launch.source
                    loaded, reason = checkpoints.launch.plan.step, source.reason
                    assert source.checkpoint is None or source.checkpoint.name.endswith(str(loaded))
                    checkpoints.close()
                except MegatronError as error:
                    message = str(error)
            openings.append(Opening(loaded, reason, message, printed.getvalue()))
        return openings

    of_ranks = run_ranks(rank_main, world_size(config), folder)
    return [list(of_run) for of_run in zip(*of_ranks, strict=True)]


def tree(save: Path) -> dict[str, tuple[int, int]]:
    """Return the files of a directory with what would change if they were written."""
    return {
        str(path.relative_to(save)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(save.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }


def require_rolled_back(openings: list[Opening], step: int, pattern: str, told: str) -> None:
    """Check that every rank loads the checkpoint of ``step``, and that the plan says why."""
    assert {one.loaded for one in openings} == {step}, f"{told}: {openings}"
    assert len({one.reason for one in openings}) == 1
    reason = openings[0].reason
    assert reason.startswith(
        f"rolled back from step {STEPS} to step {step} because global_step{STEPS} is damaged: "
    )
    assert re.search(pattern, reason), f"{told}: {reason}"
    assert "NOT LOADED: " in openings[0].printed
    assert f"note       {reason}" in openings[0].printed


def the_one_error(openings: list[Opening]) -> str:
    """Return what all ranks stop with."""
    assert {one.loaded for one in openings} == {None}, openings
    told = [one.error for one in openings if "rank 0 failed" not in one.error]
    assert len(set(told)) == 1
    return told[0]


@pytest.mark.parametrize(
    "repetitions",
    [pytest.param(1, id="once"), pytest.param(12, id="often", marks=pytest.mark.matrix)],
)
def test_damage_of_any_kind_to_any_kind_of_file_is_found_and_the_parent_is_used(
    run, repetitions, tmp_path
):
    chance = random.Random(repetitions)
    cases: list[tuple[str, Path, str]] = []
    kinds = files_by_kind(run.folder / "save" / f"global_step{STEPS}")
    assert len(kinds) >= 6
    for names, damage_name in itertools.product(kinds.values(), [*DAMAGES] * repetitions):
        save = run.copy(tmp_path / f"{len(cases)}")
        checkpoint = save / f"global_step{STEPS}"
        name = chance.choice(names)
        around = Surroundings(checkpoint, save / f"global_step{STEPS - 1}", chance)
        pattern = DAMAGES[damage_name](checkpoint / name, around)
        if pattern is None:
            shutil.rmtree(save.parent)
        else:
            cases.append((f"{name} {damage_name}", save, pattern))
    before = [tree(save) for _, save, _ in cases]
    openings = open_runs(run.config, [save for _, save, _ in cases], tmp_path / "openings")
    for (told, save, pattern), of_ranks, left in zip(cases, openings, before, strict=True):
        require_rolled_back(of_ranks, STEPS - 1, pattern, told)
        assert tree(save) == left, told


def damaged_copy(run: SavedRun, folder: Path, *damages: Callable[[Path], object]) -> Path:
    save = run.copy(folder)
    for damage in damages:
        damage(save)
    return save


def without_a_file_of(*steps: int) -> Callable[[Path], None]:
    def damage(save: Path) -> None:
        for step in steps:
            sorted((save / f"global_step{step}").glob("*optim_states.pt"))[-1].unlink()

    return damage


def latest_says(content: str) -> Callable[[Path], object]:
    return lambda save: (save / "latest").write_text(content)


def latest_is_a_fifo(save: Path) -> None:
    (save / "latest").unlink()
    os.mkfifo(save / "latest")


LATEST: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (latest_says(""), "latest is empty"),
    "torn": (latest_says("global_st"), "latest holds 'global_st', not global_stepN"),
    "binary": (lambda save: (save / "latest").write_bytes(b"\xff\x00"), "latest is not UTF-8 text"),
    "of a step that isn't there": (
        latest_says("global_step77"),
        "latest names global_step77, which is not there",
    ),
    "missing": (lambda save: (save / "latest").unlink(), "latest is missing"),
    "a FIFO": (latest_is_a_fifo, "latest is a FIFO, not a file"),
    "without permission": (
        lambda save: (save / "latest").chmod(0),
        "latest cannot be opened: Permission denied",
    ),
}


def test_a_latest_that_tells_nothing_is_replaced_by_the_newest_commit(run, tmp_path):
    saves = [damaged_copy(run, tmp_path / name, damage) for name, (damage, _) in LATEST.items()] + [
        damaged_copy(run, tmp_path / f"{name} and damaged", damage, without_a_file_of(STEPS))
        for name, (damage, _) in LATEST.items()
    ]
    openings = open_runs(run.config, saves, tmp_path / "openings")
    patterns = [pattern for _, pattern in LATEST.values()]
    for pattern, whole, damaged in zip(
        patterns, openings[: len(LATEST)], openings[len(LATEST) :], strict=True
    ):
        assert {one.loaded for one in whole} == {STEPS}, whole
        assert pattern in whole[0].reason
        assert "the newest commit stands for it" in whole[0].reason
        assert {one.loaded for one in damaged} == {STEPS - 1}, damaged
        assert f"rolled back from step {STEPS} to step {STEPS - 1}" in damaged[0].reason


def half_swapped(save: Path) -> None:
    """Leave what a kill between the two renames of a save of the same step leaves."""
    temporary = save / f".tmp-global_step{STEPS}-0123456789ab"
    shutil.copytree(save / f"global_step{STEPS}", temporary)
    (save / f"global_step{STEPS}").rename(temporary / ".replaced")


def swapped(save: Path) -> None:
    """Leave what a kill right after them leaves."""
    shutil.copytree(save / f"global_step{STEPS - 1}", save / f"global_step{STEPS}" / ".replaced")


def remove(*names: str) -> Callable[[Path], None]:
    def damage(save: Path) -> None:
        for name in names:
            path = save / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def spoil(*names: str) -> Callable[[Path], None]:
    def damage(save: Path) -> None:
        for name in names:
            (save / name).write_text("{")

    return damage


NEWEST = f"global_step{STEPS}"
WHERE_TO_GO_ON: dict[str, tuple[list[Callable[[Path], object]], int, str]] = {
    "half a swap": ([half_swapped], STEPS, "^$"),
    "a swap whose old checkpoint is still there": ([swapped], STEPS, "^$"),
    "the two newest are damaged": (
        [without_a_file_of(3, 2)],
        1,
        "global_step2 too: zero_.* is m",
    ),
    "the newest lacks its manifest": (
        [remove(f"{NEWEST}/manifest.json")],
        2,
        "manifest.json is missing: without it nothing shows that it is complete",
    ),
    "the newest lacks manifest and ledger": (
        [remove(f"{NEWEST}/manifest.json", f"{NEWEST}/ledger.json")],
        2,
        "manifest.json is missing",
    ),
    "nothing tells of the newest": (
        [
            spoil(f"{NEWEST}/manifest.json", f"{NEWEST}/ledger.json"),
            remove("attempts/0001.json"),
        ],
        2,
        "manifest.json is not a manifest.*nothing readable tells how step 2 came about",
    ),
    "the newest is gone": ([remove(NEWEST)], 2, "latest names global_step3, which is not there"),
    "the newest is gone and the next is damaged": (
        [remove(NEWEST), without_a_file_of(2)],
        1,
        "rolled back from step 2 to step 1",
    ),
    "a parent is gone": ([without_a_file_of(3), remove("global_step2")], 1, "step 3 to step 1"),
    "the directory was renamed": (
        [remove("global_step2"), lambda save: (save / NEWEST).rename(save / "global_step2")],
        1,
        "names global_step3, which is not there.*its manifest is that of step 3",
    ),
}


def test_a_launch_goes_on_from_the_newest_good_ancestor(run, tmp_path):
    saves = [
        damaged_copy(run, tmp_path / str(number), *damages)
        for number, (damages, _, _) in enumerate(WHERE_TO_GO_ON.values())
    ]
    openings = open_runs(run.config, saves, tmp_path / "openings")
    for (name, (_, step, pattern)), of_ranks in zip(WHERE_TO_GO_ON.items(), openings, strict=True):
        assert {one.loaded for one in of_ranks} == {step}, f"{name}: {of_ranks}"
        assert re.search(pattern, of_ranks[0].reason), f"{name}: {of_ranks[0].reason}"
    for save in saves:
        assert not [path.name for path in save.glob(".*")]


def test_without_a_good_checkpoint_every_rank_stops_and_nothing_is_deleted(run, tmp_path):
    save = damaged_copy(run, tmp_path, without_a_file_of(1, 2, 3))
    before = tree(save)
    [openings] = open_runs(run.config, [save], tmp_path / "openings")
    message = the_one_error(openings)
    assert message.startswith(f"{save}: no checkpoint of the run can be loaded, and nothing is del")
    for step in (1, 2, 3):
        assert re.search(rf"global_step{step}: zero_\S+ is missing", message)
    assert tree(save) == before


def test_a_run_whose_checkpoints_are_all_gone_does_not_begin_anew(run, tmp_path):
    save = damaged_copy(run, tmp_path, remove("global_step1", "global_step2", "global_step3"))
    [openings] = open_runs(run.config, [save], tmp_path / "openings")
    message = the_one_error(openings)
    assert "holds no checkpoint, but its attempts have saved some, up to step 3" in message


def test_a_named_checkpoint_is_loaded_or_nothing_is(run, tmp_path):
    save = damaged_copy(run, tmp_path, without_a_file_of(2))
    [openings] = open_runs(run.config, [save], tmp_path / "openings", iteration=2)
    message = the_one_error(openings)
    assert "iteration: 2 was asked for" in message
    assert re.search(r"global_step2 cannot be loaded: zero_\S+ is missing", message)


def test_elsewhere_ancestors_are_tried_and_that_is_said(run, tmp_path):
    elsewhere = damaged_copy(run, tmp_path / "elsewhere", without_a_file_of(3))
    [openings] = open_runs(
        run.config, [tmp_path / "new"], tmp_path / "openings", load=str(elsewhere)
    )
    assert {one.loaded for one in openings} == {2}
    assert "rolled back from step 3 to step 2" in openings[0].printed
    assert not list(elsewhere.glob(".*")), "a reader's mark is left"


def test_what_is_done_again_after_a_roll_back_is_what_an_undisturbed_run_does(run, tmp_path):
    """Data, random state, schedule and optimizer are those of the checkpoint that is loaded."""
    save = run.copy(tmp_path)
    name = sorted(path.name for path in (save / NEWEST).glob("layer_*"))[-1]
    flip_a_bit(save / NEWEST / name, Surroundings(save / NEWEST, save, random.Random(0)))
    longer = run.config | {"train_iters": STEPS + 2}
    undisturbed = run_training(
        longer | {"save": str(tmp_path / "new"), "load": str(tmp_path / "new")}, tmp_path / "a"
    )
    disturbed = run_training(longer | {"save": str(save), "load": str(save)}, tmp_path / "b")
    assert f"because global_step{STEPS} is damaged: {name} holds other bytes" in disturbed.printed
    assert [untimed(one) for one in disturbed.records] == [
        untimed(one) for one in undisturbed.records[STEPS - 1 :]
    ]
    newest = read_manifest(save / f"global_step{STEPS + 2}")
    assert newest is not None
    assert newest.sequence == STEPS + 3, "the damaged commit keeps its number"
    assert lineage_of(save, newest) == [STEPS + 2, STEPS + 1, STEPS, STEPS - 1, 1]


def untimed(record: StepRecord) -> StepRecord:
    return replace(record, seconds=0.0)


def lineage_of(save: Path, newest: Manifest) -> list[int]:
    """Follow the parents that manifests name; return the steps."""
    manifests = [read_manifest(path) for path in save.glob("global_step*")]
    by_sequence = {one.sequence: one for one in manifests if one is not None}
    steps = [newest.step]
    while newest.parent is not None:
        newest = by_sequence[newest.parent]
        steps.append(newest.step)
    return steps


def test_a_roll_back_is_obeyed_once_though_its_attempt_was_killed_before_it_knew_of_its_save(
    run, tmp_path
):
    save = run.copy(tmp_path)
    config = run.config | {"save": str(save), "load": str(save), "iteration": 1, "train_iters": 2}
    run_training(config, tmp_path / "rolled back")
    path = save / "attempts" / "0002.json"
    facts = json.loads(path.read_text())
    assert [one["step"] for one in facts["committed"]] == [2]
    path.write_text(json.dumps(facts | {"committed": [], "stop": None}))
    [openings] = open_runs(run.config, [save], tmp_path / "openings", iteration=1)
    assert {one.loaded for one in openings} == {2}
    assert "done by attempt 2, which has saved since (newest: step 2)" in openings[0].printed


def test_explain_finds_what_names_and_sizes_tell(run, tmp_path, capsys):
    save = damaged_copy(run, tmp_path, without_a_file_of(3))
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(run.config | {"save": str(save), "load": str(save)}))
    assert main(["explain", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["source"] == str(save / "global_step2")
    assert plan["reason"].startswith("rolled back from step 3 to step 2 because global_step3 is d")


def test_a_checkpoint_of_an_abandoned_branch_is_no_candidate(run, tmp_path):
    """Step 3 was left behind by a roll-back to 1, from which another 2 was saved."""
    save = run.copy(tmp_path)
    config = run.config | {"save": str(save), "load": str(save)}
    run_training(config | {"iteration": 1, "train_iters": 2}, tmp_path / "rolled back")
    without_a_file_of(2)(save)
    [openings] = open_runs(run.config, [save], tmp_path / "openings")
    assert {one.loaded for one in openings} == {1}
    assert "rolled back from step 2 to step 1" in openings[0].reason


def test_nodes_with_directories_of_their_own_are_found_out(run, tmp_path, monkeypatch):
    """``save`` is a relative path, and every rank is a node in a directory of its own."""
    impatient = functools.partial(answer_mark, timeout_s=0.2)
    monkeypatch.setattr("megatron.cli.saved_state.answer_mark", impatient)
    [openings] = open_runs(
        run.config, [Path("save")], tmp_path / "openings", rank_folders=tmp_path / "nodes"
    )
    message = the_one_error(openings)
    assert "save: save must be one directory that every node reads and writes, but rank 1 on" in (
        message
    )
    assert "does not see what rank 0 wrote there" in message


def test_neoxs_checkpoint_that_a_run_adopted_in_place_is_its_ancestor(tmp_path):
    save = tmp_path / "save"
    shutil.copytree(ORACLE / "ckpt_a", save, copy_function=shutil.copyfile)
    config = neox_config(tmp_path, "a", save=str(save), load=str(save), checkpoint_factor=2)
    run_training(config | {"train_iters": 12, "lr_decay_iters": 20}, tmp_path / "launch")
    (save / "global_step12" / "mp_rank_00_model_states.pt").unlink()
    [openings] = open_runs(config, [save], tmp_path / "openings", lr_decay_iters=20)
    assert {one.loaded for one in openings} == {10}, openings
    assert "rolled back from step 12 to step 10" in openings[0].reason
