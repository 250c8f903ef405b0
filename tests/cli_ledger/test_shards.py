"""``neox-ledger shards``: which files steps need, asked before any of them is there."""

import json
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron.cli.ledger.main import main
from megatron.cli.resume_plan import plan_launch
from megatron.config.load import load_config
from megatron.data.shard_files import cut_dataset
from megatron.stream.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.stream.shard_layout import find_shards
from tests.cli.bad_runs import CONFIG
from tests.ledger.queries.histories import eventful_run

SEQ_LENGTH, BATCH = 8, 2


def write_corpus(prefix, sizes, seed=0):
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for size in sizes:
        builder.add_item(random.integers(1, 256, size=size).astype(np.uint16))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def corpus(tmp_path):
    """The prefix of 60 documents in shards of 101 bytes, and the whole of it elsewhere."""
    sizes = np.random.default_rng(1).integers(5, 30, size=60)
    write_corpus(tmp_path / "whole", sizes)
    cut_dataset(tmp_path / "whole", tmp_path / "cut", 101)
    return tmp_path / "cut"


@pytest.fixture
def write_config(tmp_path):
    def write(prefix, **changes):
        paths = {f"{split}_data_paths": [str(prefix)] for split in ("train", "valid", "test")}
        config = {**CONFIG, "data_path": None, **paths, "train_iters": 40, **changes}
        path = tmp_path / "my.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
        return path

    return write


@pytest.fixture
def ask(capsys):
    def ask(*arguments):
        capsys.readouterr()
        status = main(["shards", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return ask


def files_of(ask, *arguments):
    status, out, _ = ask("required-for", *arguments, "--json")
    return status, json.loads(out)["files"]


def brute_force(config, prefix, steps):
    """Collect the files of steps from NumPy's own maps, byte by byte."""
    dataset = IndexedDataset(prefix)
    maps = numpy_maps(dataset.sizes, 40 * BATCH)
    used = defaultdict(set)
    samples = defaultdict(set)
    for position in range((steps[0] - 1) * BATCH, steps[1] * BATCH):
        for byte in sample_bytes(dataset, maps, maps[2][position]):
            shard = next(one for one in dataset.tokens.shards if one.start <= byte < one.stop)
            used[str(shard.path)].add(byte - shard.start)
            samples[str(shard.path)].add(position)
    return used, samples


def numpy_maps(sizes, num_samples, seed=1234):
    """Build index maps as NeoX v1.0 did, the slow and obvious way."""
    tokens, epochs = int(sizes.sum()), 1
    num_samples = math.ceil(num_samples * 1.005)
    while (epochs * tokens - 1) // SEQ_LENGTH < num_samples:
        epochs += 1
    random = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    random.shuffle(doc_idx)
    total = (epochs * tokens - 1) // SEQ_LENGTH
    ends = np.cumsum(sizes[doc_idx])
    firsts = np.arange(total + 1) * SEQ_LENGTH
    index = np.searchsorted(ends, firsts, side="right")
    begins = ends - sizes[doc_idx]
    sample_idx = np.stack([index, firsts - begins[index]], axis=1).astype(np.int32)
    shuffle_idx = np.arange(total, dtype=np.uint32)
    random.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def sample_bytes(dataset, maps, sample):
    doc_idx, sample_idx, _ = maps
    (place, offset), needed = sample_idx[sample], SEQ_LENGTH + 1
    while needed:
        document = doc_idx[place]
        length = min(needed, int(dataset.sizes[document]) - offset)
        start = int(dataset.pointers[document]) + 2 * int(offset)
        yield from range(start, start + 2 * int(length))
        needed, place, offset = needed - length, place + 1, 0


@pytest.mark.parametrize("steps", [(1, 1), (7, 12), (1, 40)])
def test_exactly_the_files_and_bytes_that_steps_read_are_listed(ask, corpus, write_config, steps):
    config = write_config(corpus)
    used, samples = brute_force(config, corpus, steps)
    status, files = files_of(ask, f"{steps[0]}..{steps[1]}", config, "--ranges")
    assert status == 0
    assert [one["file"] for one in files] == sorted(used)
    for one in files:
        bytes_used = {byte for start, stop in one["ranges"] for byte in range(start, stop)}
        assert bytes_used == used[one["file"]]
        assert one["bytes"] == [min(bytes_used), max(bytes_used) + 1]
        assert one["samples"] == len(samples[one["file"]])
        assert one["first_step"] == min(samples[one["file"]]) // BATCH + 1
        assert one["last_step"] == max(samples[one["file"]]) // BATCH + 1


def test_the_index_alone_tells_the_same(ask, corpus, write_config, tmp_path):
    config = write_config(corpus)
    _, expected = files_of(ask, "3..9", config)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(f"{corpus}.idx", alone / "cut.idx")
    config = write_config(alone / "cut")
    status, out, err = ask("required-for", "3..9", config, "--shard-bytes", 101, "--json")
    files = json.loads(out)["files"]
    assert status == 1
    assert "no token file of" in err
    assert not any(one["is_there"] for one in files)
    for one, other in zip(files, expected, strict=True):
        assert Path(one["file"]).name == Path(other["file"]).name
        assert {**one, "file": 0, "is_there": 0} == {**other, "file": 0, "is_there": 0}
    assert ask("required-for", "3..9", config, "--names", "--shard-bytes", 101)[1].split() == [
        Path(one["file"]).name for one in expected
    ]
    status, out, err = ask("required-for", "3..9", config)
    assert "1 file, 1 of them missing" in out
    assert "1 file of 5,000,000,000 bytes" in err


def test_maps_are_written_from_the_index_alone_as_numpy_builds_them(
    ask, corpus, write_config, tmp_path
):
    sizes = IndexedDataset(corpus).sizes
    for path in find_shards(str(corpus)):
        path.unlink()
    status, out, _ = ask("maps", write_config(corpus))
    assert status == 0
    assert out.startswith("train: ")
    names = ("doc_idx", "sample_idx", "shuffle_idx")
    for name, expected in zip(names, numpy_maps(sizes, 40 * BATCH), strict=True):
        path = f"{corpus}_train_0_indexmap_81ns_8sl_1234s_packedpi_ac_{name}.npy"
        found = np.load(path)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


def test_released_maps_beside_the_data_are_used_after_one_check(ask, corpus, write_config):
    """Of v1.0's names, and told from ours by a shuffle that no seed of ours gives."""
    doc_idx, sample_idx, shuffle_idx = numpy_maps(IndexedDataset(corpus).sizes, 40 * BATCH)
    shuffle_idx[:2] = shuffle_idx[1::-1]
    for name, array in (
        ("doc_idx", doc_idx),
        ("sample_idx", sample_idx),
        ("shuffle_idx", shuffle_idx),
    ):
        np.save(f"{corpus}_train_0_indexmap_81ns_8sl_1234s_{name}.npy", array)
    before = set(os.listdir(corpus.parent))
    config = write_config(corpus)
    status, _, err = ask("required-for", "1", config)
    assert (status, err) == (0, "")
    new = set(os.listdir(corpus.parent)) - before
    assert "cut_train_0_indexmap_81ns_8sl_1234s_checked.json" in new
    assert not any("_packedpi" in name and "train_0" in name for name in new)
    dataset = IndexedDataset(corpus)
    maps = (doc_idx, sample_idx, shuffle_idx)
    expected = [set(sample_bytes(dataset, maps, shuffle_idx[i])) for i in range(BATCH)]
    _, files = files_of(ask, "1", config, "--ranges")
    starts = {str(one.path): one.start for one in dataset.tokens.shards}
    read = {
        starts[one["file"]] + byte
        for one in files
        for start, stop in one["ranges"]
        for byte in range(start, stop)
    }
    assert read == set().union(*expected)


def test_damaged_released_maps_are_told_and_not_used(ask, corpus, write_config, caplog):
    doc_idx, sample_idx, shuffle_idx = numpy_maps(IndexedDataset(corpus).sizes, 40 * BATCH)
    config = write_config(corpus)
    _, expected = files_of(ask, "1..3", config)
    for path in corpus.parent.glob("*indexmap*"):
        path.unlink()
    shuffle_idx[5] = shuffle_idx[6]
    for name, array in (
        ("doc_idx", doc_idx),
        ("sample_idx", sample_idx),
        ("shuffle_idx", shuffle_idx),
    ):
        np.save(f"{corpus}_train_0_indexmap_81ns_8sl_1234s_{name}.npy", array)
    _, files = files_of(ask, "1..3", config)
    assert files == expected
    assert "shuffle_idx is not a permutation" in caplog.text


def plan_of(config):
    return plan_launch(load_config([config], local_slots=lambda: 1)).plan


def test_a_shard_no_step_needs_changes_nothing_and_one_needed_is_named(ask, corpus, write_config):
    config = write_config(corpus, train_iters=2, eval_iters=0)
    before = plan_of(config)
    _, files = files_of(ask, "1..2", config)
    needed = {one["file"]: one["first_step"] for one in files}
    spare = [path for path in find_shards(str(corpus)) if str(path) not in needed]
    assert spare
    for path in spare:
        path.unlink()
    after = plan_of(config)
    assert after.problems == ()
    assert f"{len(spare)} of {len(spare) + len(files)} token files are missing, none is" in str(
        after.notices
    )
    assert files_of(ask, "1..2", config) == (0, files)
    assert after.train.order.packing == before.train.order.packing
    late = next(file for file, step in needed.items() if step == 2)
    os.rename(late, f"{late}.away")
    assert f"step 2 needs {late}" in str(plan_of(config).notices)
    os.rename(f"{late}.away", late)
    early = next(file for file, step in needed.items() if step == 1)
    os.unlink(early)
    (problem,) = plan_of(config).problems
    assert problem.startswith(f"step 1 needs {early}, which does not exist ({len(spare) + 1} of")


def test_a_run_keeps_its_name_for_data_of_which_shards_come_and_go(ask, corpus, tmp_path, capsys):
    """Of an eventful run: its corpus in shards, some of them away, is still its corpus."""
    eventful_run(tmp_path / "run")
    run = tmp_path / "run"
    cut_dataset(run / "corpus", run / "parts", 97)
    (run / "corpus.bin").unlink()
    for path in run.glob("parts-*.bin"):
        path.rename(path.with_name(path.name.replace("parts", "corpus")))
    status, files = files_of(ask, "21..22", "--run", run / "save")
    assert status == 0
    steps = [json.dumps(_step(step, run, capsys)) for step in (21, 22)]
    for path in find_shards(str(run / "corpus")):
        if str(path) not in {one["file"] for one in files}:
            path.unlink()
    assert files_of(ask, "21..22", "--run", run / "save") == (0, files)
    assert [json.dumps(_step(step, run, capsys)) for step in (21, 22)] == steps
    assert main(["verify", "--run", str(run / "save"), "--steps", "21..22"]) == 0
    status, missing = files_of(ask, "1..24", "--run", run / "save", "--missing")
    assert status == 1
    assert not any(one["is_there"] for one in missing)


def _step(step, run, capsys):
    assert main(["step", str(step), "--run", str(run / "save"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["data_missing"] is None
    return answer


def test_preshuffled_data_read_as_neox_does_gets_a_note(write_config, tmp_path):
    write_corpus(tmp_path / "rows", [SEQ_LENGTH + 1] * 300)
    text = str(plan_of(write_config(tmp_path / "rows")).notices)
    assert "rows has seq_length + 1 = 9 tokens, as in preshuffled data; it is shuffled" in text
    for order, packing in (("shuffled", "packed"), ("sequential", "sequential")):
        plan = plan_of(write_config(tmp_path / "rows", data_order=order))
        assert "preshuffled" not in str(plan.notices)
        assert plan.train.order.packing == packing


def test_preshuffled_rows_need_the_files_of_their_bytes_alone(ask, write_config, tmp_path):
    write_corpus(tmp_path / "rows", [SEQ_LENGTH + 1] * 100)
    cut_dataset(tmp_path / "rows", tmp_path / "cut", 250)  # a row has 18 bytes
    config = write_config(tmp_path / "cut", data_order="sequential")
    for step in range(1, 41):
        _, files = files_of(ask, step, config)
        start, stop = (step - 1) * 36, step * 36
        assert [one["file"][-18:-13] for one in files] == [
            f"{index:05d}" for index in range(start // 250, (stop - 1) // 250 + 1)
        ]
        assert sum(one["bytes_read"] for one in files) == 36


def test_a_configuration_that_loads_what_is_not_there_yet_is_a_run_from_step_1(
    ask, corpus, write_config, tmp_path
):
    _, expected = files_of(ask, "5", write_config(corpus))
    config = write_config(
        corpus, load=str(tmp_path / "away"), save=str(tmp_path / "save"), checkpoint_factor=9
    )
    status, out, err = ask("required-for", "5", config, "--json")
    assert (status, json.loads(out)["files"]) == (0, expected)
    assert "taken for a run from step 1 on: no checkpoint can be read" in err


def test_configuration_and_run_at_once_are_refused(ask, corpus, write_config):
    status, _, err = ask("required-for", "5", write_config(corpus), "--run", "somewhere")
    assert (status, "not both" in err) == (2, True)
