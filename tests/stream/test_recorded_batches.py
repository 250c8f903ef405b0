"""Every micro batch that real NeoX runs read is what our streams give for its position."""

import numpy as np
import pytest

from megatron.config.batch_geometry import BatchGeometry
from megatron.stream.sample_counts import requested_samples
from megatron.stream.streams import StreamSettings, open_streams
from tests.stream.recorded import BATCHES, DATA, copy_datasets, digest

_TEST_ENTRIES = 4  # eval_iters * gas


def open_run(folder, run):
    """Open a recorded run's streams on a fresh copy of its corpora."""
    copy_datasets(DATA / "oracle", folder)
    keys = {}
    for key, value in run["data"].items():
        if key == "data_path":
            keys[key] = str(folder / value)
        elif key.endswith("_paths"):
            keys[key] = tuple(str(folder / name) for name in value)
        else:
            keys[key] = value
    batch = run["batch"]
    requested = requested_samples(
        train_iters=batch["train_iters"],
        train_batch_size=geometry_of(run, 1).global_batch_size,
        eval_interval=batch["eval_interval"],
        eval_iters=batch["eval_iters"],
    )
    return open_streams(StreamSettings(**keys), requested, is_builder=True, barrier=lambda: None)


def geometry_of(run, data_parallel_size):
    batch = run["batch"]
    return BatchGeometry(
        batch["train_micro_batch_size_per_gpu"] // data_parallel_size,
        data_parallel_size,
        batch["gradient_accumulation_steps"],
    )


def micro_batch(stream, geometry, micro_step, rank=0):
    first = geometry.first_position(micro_step, rank)
    return stream.read(np.arange(first, first + geometry.micro_batch_size))


@pytest.mark.parametrize(
    ("name", "rank"),
    [(name, rank) for name, run in BATCHES["main"].items() for rank in run["ranks"]],
)
def test_a_run_of_neox_read_these_micro_batches(tmp_path, name, rank):
    run = BATCHES["main"][name]
    entries = run["ranks"][rank]
    streams = open_run(tmp_path, run)
    geometry = geometry_of(run, 1)
    # Where each split goes on in a resumed run: steps and evaluations done times micro steps.
    steps_done = 10 if "resume" in name else 0
    gas = geometry.gradient_accumulation_steps
    evaluations_done = steps_done // run["batch"]["eval_interval"]
    counters = {
        "train": steps_done * gas,
        "valid": evaluations_done * run["batch"]["eval_iters"] * gas,
        "test": 0,
    }
    evaluated = [index for index, entry in enumerate(entries) if entry[0] == "eval"]
    for index, (mode, _, expected) in enumerate(entries):
        split = "train"
        if mode == "eval":
            split = "test" if index in evaluated[-_TEST_ENTRIES:] else "valid"
        tokens = micro_batch(getattr(streams, split), geometry, counters[split])
        assert tokens.dtype == np.uint16
        assert digest(tokens) == expected, f"{split} micro step {counters[split]}"
        counters[split] += 1
    assert counters["train"] == 20 * gas


@pytest.mark.parametrize("case", BATCHES["v1.0"])
def test_v1_loaders_gave_these_micro_batches(tmp_path, case):
    kind, data_parallel, rank = case.split("/")
    run = BATCHES["main"]["a" if kind == "single" else "bl_a"]
    streams = open_run(tmp_path, run)
    geometry = geometry_of(run, int(data_parallel[2:]))
    for split, expected in BATCHES["v1.0"][case].items():
        stream = getattr(streams, split)
        for micro_step, recorded in enumerate(expected):
            tokens = micro_batch(stream, geometry, micro_step, int(rank[4:]))
            assert digest(tokens) == recorded, f"{split} micro step {micro_step}"


@pytest.mark.parametrize("name", ["a", "bl_a"])
def test_opening_a_run_writes_neoxs_files(tmp_path, name):
    open_run(tmp_path, BATCHES["main"][name])
    written = sorted(tmp_path.glob("*.npy"))
    assert len(written) == {"a": 9, "bl_a": 12}[name]
    for path in written:
        assert path.read_bytes() == (DATA / "oracle" / path.name).read_bytes(), path.name
