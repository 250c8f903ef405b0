"""Interrupted, changed, launched again: what was read against an oracle that is slow and plain."""

import itertools
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.interrupted_runs import SEED, SEQ_LENGTH, InterruptedRun
from tests.engine.slow_orders import (
    SlowDataset,
    SlowStream,
    difference,
    requested,
    split_documents,
    write_dataset,
    write_files,
)
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

SPLIT = "80,10,10"
BATCH = 8
TRAIN_ITERS = 12
MIDDLE, AT_SAVE = 5, 6  # killed after these steps: 3 and 6 are saved, 6 is evaluated too
SAVED = {MIDDLE: 3, AT_SAVE: 6}


KILLED = pytest.mark.parametrize(
    "killed_after",
    [pytest.param(MIDDLE, marks=pytest.mark.matrix), AT_SAVE],
    ids=["between saves", "at a save"],
)


@dataclass(frozen=True)
class Phase:
    """Steps of the final lineage that were taken under the same settings."""

    last_step: int
    batch: int = BATCH
    eval_interval: int = 6
    eval_iters: int = 1


def split_run(folder: Path, **changes: Any) -> InterruptedRun:
    """Return a run of one dataset and a split."""
    prefix = write_dataset(folder / "data" / "a", 1)
    return InterruptedRun(folder, {"data_path": str(prefix), "split": SPLIT}, **changes)


def split_streams(
    prefix: Path, *, train_iters: int = TRAIN_ITERS, seq_length: int = SEQ_LENGTH, seed: int = SEED
) -> tuple[SlowStream, SlowStream]:
    train, valid, _ = split_documents(SPLIT, 40)
    wanted = train_iters * BATCH, (train_iters // 6 + 1) * BATCH
    streams = [
        SlowStream([SlowDataset(prefix, seq_length, seed, samples, documents)])
        for samples, documents in zip(wanted, (train, valid), strict=True)
    ]
    return streams[0], streams[1]


def assert_read(run: InterruptedRun, train: SlowStream, valid: SlowStream, *phases: Phase) -> None:
    """Compare every step and evaluation of the lineage with the oracle's."""
    expected: dict[int, tuple[int, int, str]] = {}
    evaluations = []
    step = 0
    for phase, following in zip(phases, [*phases[1:], phases[-1]], strict=True):
        while step < phase.last_step:
            step += 1
            expected[step] = train.step(phase.batch)
            if step % phase.eval_interval == 0:
                # The checkpoint lies before it: whoever goes on from there makes it.
                by = following if step == phase.last_step else phase
                evaluations.append((step, valid.step(by.eval_iters * by.batch)))
    read = run.read()
    assert read.steps == expected
    assert read.evaluations == evaluations
    last = phases[-1]
    assert read.at_end["valid"] == valid.preview(last.eval_iters * last.batch)


def assert_verified(run: InterruptedRun, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = run.verify(capsys)
    assert status == 0, printed


DIVISIONS = {
    "micro batch": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
    "gradient accumulation": {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
    },
    "DP 2": {"num_gpus": 2, "gradient_accumulation_steps": 1},
    "two workers": {"num_workers": 2},
}
BATCHES = {"a larger batch": (4, 16), "a smaller batch": (1, 4)}


@KILLED
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=() if change in ("DP 2",) else pytest.mark.matrix)
        for change in DIVISIONS
    ],
)
def test_dividing_a_batch_otherwise_changes_no_sample(
    change: str, killed_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=killed_after)
    run.launch(**DIVISIONS[change])
    assert_read(run, *split_streams(tmp_path / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_one_rank_then_two_then_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = split_run(tmp_path)
    run.launch_killed(after=MIDDLE)
    run.launch_killed(after=8, num_gpus=2, gradient_accumulation_steps=1)
    four = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    run.launch(num_gpus=4, **four)
    assert_read(run, *split_streams(tmp_path / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


def test_killed_between_a_save_and_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run = split_run(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("megatron.engine.loop._evaluate_validation", die)
        with pytest.raises(WorldFailed, match="died without an answer"):
            run.launch()
    assert (run.save / "latest").read_text().strip() == f"global_step{AT_SAVE}"
    run.launch()
    assert_read(run, *split_streams(tmp_path / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


@KILLED
@pytest.mark.parametrize(
    "change",
    ["a larger batch", pytest.param("a smaller batch", marks=pytest.mark.matrix)],
)
def test_another_batch_size_goes_on_at_the_next_sample(
    change: str, killed_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    accumulation, batch = BATCHES[change]
    run = split_run(tmp_path)
    run.launch_killed(after=killed_after)
    run.launch(gradient_accumulation_steps=accumulation)
    phases = Phase(SAVED[killed_after]), Phase(TRAIN_ITERS, batch)
    assert_read(run, *split_streams(tmp_path / "data" / "a"), *phases)
    assert_verified(run, capsys)


@pytest.mark.parametrize(
    "lengths",
    [(3, 18), pytest.param((3, 6, 12, 17), marks=pytest.mark.matrix)],
    ids=["one extension", "three extensions"],
)
def test_a_run_extended_over_two_and_a_half_epochs(
    lengths: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    for train_iters in lengths:
        run.launch(train_iters=train_iters)
    train, valid = split_streams(tmp_path / "data" / "a", train_iters=lengths[0])
    epoch = train.datasets[0].samples_per_epoch / BATCH
    assert lengths[0] <= 0.6 * epoch
    assert lengths[-1] >= 2.6 * epoch
    assert_read(run, train, valid, Phase(lengths[-1]))
    assert_verified(run, capsys)


def test_a_run_that_is_killed_and_extended_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=MIDDLE, train_iters=8)
    run.launch(train_iters=23)
    streams = split_streams(tmp_path / "data" / "a", train_iters=8)
    assert_read(run, *streams, Phase(23))
    assert_verified(run, capsys)


class BlendedRun(InterruptedRun):
    """A run that draws from datasets a, b, ... and validates on v."""

    def __init__(self, folder: Path, names: str, weights: list[float]) -> None:
        for number, name in enumerate("abctv"):
            write_dataset(folder / "data" / name, 10 + number)
        super().__init__(folder, {})
        self.config |= self.drawing(names, weights)
        self.config |= {
            f"{split}_data_paths": [str(folder / "data" / split[0])] for split in ("valid", "test")
        }
        total = sum(weights)
        self.slow = {
            name: SlowDataset(
                folder / "data" / name,
                SEQ_LENGTH,
                SEED,
                requested(TRAIN_ITERS * BATCH, weight / total),
            )
            for name, weight in zip(names, weights, strict=True)
        }
        self.train = SlowStream([self.slow[name] for name in names], weights)
        wanted = requested((TRAIN_ITERS // 6 + 1) * BATCH, 1.0)
        self.valid = SlowStream([SlowDataset(folder / "data" / "v", SEQ_LENGTH, SEED, wanted)])

    def drawing(self, names: str, weights: list[float]) -> dict[str, Any]:
        """Return the keys that draw from datasets in these proportions."""
        paths = [str(self.folder / "data" / name) for name in names]
        return {"train_data_paths": paths, "train_data_weights": weights}

    def draws(self, names: str, weights: list[float]) -> None:
        """Tell the oracle that it draws so from now on."""
        for name in names:
            if name not in self.slow:  # added later: no head
                self.slow[name] = SlowDataset(self.folder / "data" / name, SEQ_LENGTH, SEED, None)
        self.train.change([self.slow[name] for name in names], weights)


BLENDS = {
    "1:1, 2:1, 1:1": [("ab", [1.0, 1.0]), ("ab", [2.0, 1.0]), ("ab", [1.0, 1.0])],
    "added, removed, returned": [
        ("ab", [1.0, 1.0]),
        ("abc", [1.0, 1.0, 2.0]),
        ("ac", [3.0, 1.0]),
        ("cab", [1.0, 1.0, 1.0]),
    ],
}


@pytest.mark.parametrize(
    "blends",
    [
        pytest.param(BLENDS["1:1, 2:1, 1:1"], marks=pytest.mark.matrix),
        BLENDS["added, removed, returned"],
    ],
    ids=list(BLENDS),
)
def test_every_dataset_of_a_changed_blend_goes_on_where_it_was(
    blends: list[tuple[str, list[float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = BlendedRun(tmp_path, *blends[0])
    killed_after = [5, 8, 10]  # saved: 3, 6, 9
    saved = [3, 6, 9]
    for blend, step in zip(blends[:-1], killed_after, strict=False):
        run.launch_killed(after=step, **run.drawing(*blend))
    run.launch(**run.drawing(*blends[-1]))
    expected = {}
    ends = [*saved[: len(blends) - 1], TRAIN_ITERS]
    for blend, end in zip(blends, ends, strict=True):
        if expected:
            run.draws(*blend)
        while len(expected) < end:
            expected[len(expected) + 1] = run.train.step(BATCH)
    assert run.read().steps == expected
    evaluations = [(step, run.valid.step(BATCH)) for step in (6, 12)]
    assert run.read().evaluations == evaluations
    assert_verified(run, capsys)


def test_a_blend_removed_whole_and_returned_in_another_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = BlendedRun(tmp_path, "ab", [1.0, 1.0])
    run.launch_killed(after=AT_SAVE)
    run.launch_killed(after=10, **run.drawing("c", [1.0]))
    run.launch(**run.drawing("ba", [1.0, 1.0]))
    expected = [run.train.step(BATCH) for _ in range(6)]
    run.draws("c", [1.0])
    expected += [run.train.step(BATCH) for _ in range(3)]
    run.draws("ba", [1.0, 1.0])
    expected += [run.train.step(BATCH) for _ in range(3)]
    assert run.read().steps == dict(enumerate(expected, 1))
    assert_verified(run, capsys)


def reshard(prefix: Path) -> None:
    """Cut the token file in three, the second cut inside a token."""
    content = Path(f"{prefix}.bin").read_bytes()
    cuts = [0, 500, 1001, len(content)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        Path(f"{prefix}-{number:05d}-of-00002.bin").write_bytes(content[start:stop])
    Path(f"{prefix}.bin").unlink()


@pytest.mark.parametrize(
    "is_sharded", [pytest.param(False, marks=pytest.mark.matrix), True], ids=["whole", "sharded"]
)
def test_a_dataset_renamed_and_moved_is_the_same(
    is_sharded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    streams = split_streams(tmp_path / "data" / "a")
    run.launch_killed(after=MIDDLE)
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    for suffix in ("bin", "idx"):
        Path(f"{tmp_path / 'data' / 'a'}.{suffix}").rename(f"{moved}.{suffix}")
    if is_sharded:
        reshard(moved)
    run.launch(data_path=str(moved))
    assert_read(run, *streams, Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


def test_a_roll_back_a_save_a_crash_and_the_same_command_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=10)
    run.launch_killed(after=7, iteration=3, gradient_accumulation_steps=4)
    again = run.launch(iteration=3, gradient_accumulation_steps=4)
    assert again.records[0].step == 7  # from the save at 6, not rolled back once more
    streams = split_streams(tmp_path / "data" / "a")
    assert_read(run, *streams, Phase(3), Phase(TRAIN_ITERS, 16))
    assert_verified(run, capsys)


def test_a_finetuned_run_begins_anew_and_survives_a_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parent = split_run(tmp_path / "parent")
    parent.launch_killed(after=AT_SAVE)
    run = split_run(tmp_path / "child", load=str(parent.save), finetune=True)
    run.launch_killed(after=MIDDLE)
    again = run.launch()
    assert again.records[0].step == 4
    assert_read(run, *split_streams(tmp_path / "child" / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)
    assert_verified(parent, capsys)


VALIDATIONS = {
    "more at a time": Phase(TRAIN_ITERS, eval_iters=3),
    "more often": Phase(TRAIN_ITERS, eval_interval=2),
}


@KILLED
@pytest.mark.parametrize(
    "change", ["more at a time", pytest.param("more often", marks=pytest.mark.matrix)]
)
def test_other_validation_settings_go_on_from_its_cursor(
    change: str, killed_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    after = VALIDATIONS[change]
    run = split_run(tmp_path)
    run.launch_killed(after=killed_after)
    run.launch(eval_interval=after.eval_interval, eval_iters=after.eval_iters)
    streams = split_streams(tmp_path / "data" / "a")
    assert_read(run, *streams, Phase(SAVED[killed_after]), after)
    assert_verified(run, capsys)


@KILLED
def test_three_changes_at_once(
    killed_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = BlendedRun(tmp_path, "ab", [1.0, 1.0])
    run.launch_killed(after=killed_after)
    blend = "bca", [2.0, 1.0, 1.0]
    run.launch(
        **run.drawing(*blend),
        train_iters=30,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=12,
        num_workers=2,
    )
    saved = SAVED[killed_after]
    expected = [run.train.step(BATCH) for _ in range(saved)]
    run.draws(*blend)
    expected += [run.train.step(12) for _ in range(30 - saved)]
    assert run.read().steps == dict(enumerate(expected, 1))
    assert_verified(run, capsys)


def change_data(run: InterruptedRun, what: str) -> dict[str, Any]:
    """Change one token, or one document's size, where it lies; keep the original elsewhere."""
    prefix, kept = run.folder / "data" / "a", run.folder / "data" / "kept"
    dataset = SlowDataset(prefix, SEQ_LENGTH, SEED, None)
    write_files(kept, dataset.tokens, dataset.sizes)
    tokens, sizes = dataset.tokens.copy(), dataset.sizes.copy()
    document = 7  # of the training share
    if what == "token":
        tokens[dataset.starts[document]] ^= 1
    else:
        tokens = np.delete(tokens, dataset.starts[document])
        sizes[document] -= 1
    write_files(prefix, tokens, sizes)
    return {}


def other_tokenizer(run: InterruptedRun) -> dict[str, Any]:
    text = (run.folder / "tok.json").read_text()
    (run.folder / "other.json").write_text(text + "\n")
    return {"vocab_file": str(run.folder / "other.json")}


@dataclass(frozen=True)
class Break:
    """A change after which no exact continuation exists, as the oracle sees it."""

    accepts: str
    keys: Callable[[InterruptedRun], dict[str, Any]]
    seq_length: int = SEQ_LENGTH
    seed: int = SEED
    split: str = SPLIT

    def stream(self, folder: Path) -> SlowStream:
        """Return the new order where it is entered: after as many tokens as were consumed."""
        documents = split_documents(self.split, 40)[0]
        dataset = SlowDataset(
            folder / "data" / "a",
            self.seq_length,
            self.seed,
            TRAIN_ITERS * BATCH,
            documents,
        )
        dataset.drawn = 3 * BATCH * SEQ_LENGTH // self.seq_length
        return SlowStream([dataset], position=3 * BATCH)


BREAKS = {
    "seed": Break("seed", lambda run: {"seed": 7}, seed=7),
    "seq_length": Break("seq_length", lambda run: {"seq_length": 8}, seq_length=8),
    "split": Break("split", lambda run: {"split": "60,20,20"}, split="60,20,20"),
    "token": Break("data", lambda run: change_data(run, "token")),
    "document size": Break("data", lambda run: change_data(run, "size")),
    "tokenizer": Break("tokenizer", other_tokenizer),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("seq_length", "token") else pytest.mark.matrix)
        for name in BREAKS
    ],
)
def test_what_has_no_exact_continuation_is_refused_with_counts(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    change = BREAKS[name]
    is_other_data = change.accepts == "data"
    run = split_run(tmp_path)
    run.launch_killed(after=MIDDLE)
    train, _ = split_streams(tmp_path / "data" / "a")
    before = [train.step(BATCH) for _ in range(3)]
    keys = change.keys(run)
    after, steps = change.stream(tmp_path), TRAIN_ITERS - 3
    costs = difference(
        [train.draw() for _ in range(steps * BATCH)],
        [after.draw() for _ in range(steps * BATCH)],
        is_same_content=not is_other_data,
    )

    message = run.refused("cannot go on exactly after step 3", monkeypatch, **keys)
    for kind, amount in costs.items():
        documents = str(amount.documents)
        if is_other_data and kind == "skipped":
            documents = "an unknown number of"  # the old data isn't there any more
        counts = rf"{amount.tokens:,} tokens of {documents} documents?"
        assert re.search(rf"{kind}: +[\d.,]+ samples \({counts}\)", message), (counts, message)
    assert f"accept_data_change: [{change.accepts}]" in message

    run.launch(accept_data_change=[change.accepts], **keys)
    after = change.stream(tmp_path)
    expected = [*before, *(after.step(BATCH) for _ in range(steps))]
    assert run.read().steps == dict(enumerate(expected, 1))
    if is_other_data:
        status, printed = run.verify(capsys)
        assert (status, "is not what the run read" in printed) == (2, True), printed
        status, printed = run.verify(capsys, "--data", str(tmp_path / "data" / "kept"))
    else:
        status, printed = run.verify(capsys)
    assert status == 0, printed
    assert f"digests    {TRAIN_ITERS} steps" in printed
    assert (
        f"break      after step 3, as accepted ({change.accepts}): up to step {TRAIN_ITERS} "
        f"{costs['repeated'].tokens:,} tokens repeated, {costs['skipped'].tokens:,} skipped, "
        f"{costs['new'].tokens:,} new"
    ) in printed


def edit_a_line(lines: list[str]) -> list[str]:
    lines[4] = lines[4].replace('"samples": 8', '"samples": 9')
    return lines


TAMPERINGS = {
    "edited": (edit_a_line, 5),
    "dropped": (lambda lines: lines[:4] + lines[5:], 5),
    "swapped": (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], 5),
}


@pytest.mark.parametrize("name", list(TAMPERINGS))
def test_verify_names_the_first_step_that_was_tampered_with(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_once: InterruptedRun
):
    tamper, step = TAMPERINGS[name]
    path = trained_once.save / "attempts" / "0001.jsonl"
    original = path.read_bytes()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(tamper(lines)))
    try:
        status, printed = trained_once.verify(capsys)
    finally:
        path.write_bytes(original)
    assert status == 1, printed
    assert "PROBLEM" in printed
    assert f"first at step {step}\n" in printed
    assert "0001.jsonl:5" in printed
    assert trained_once.verify(capsys)[0] == 0


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> InterruptedRun:
    """Return a run that went to its end at once."""
    run = split_run(tmp_path_factory.mktemp("once"))
    run.launch()
    return run
