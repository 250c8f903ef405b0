"""Documents kept whole, and labels beside tokens: what is trained on, and that it is recorded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.engine.interrupted_runs import SEED, SEQ_LENGTH, InterruptedRun
from tests.engine.slow_orders import write_dataset, write_files
from tests.engine.training_runs import run_training
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

BATCH = 8
TRAIN_ITERS = 12
WIDTH = SEQ_LENGTH + 1


def documents_of(prefix: Path) -> list[np.ndarray]:
    index = Path(f"{prefix}.idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    sizes = np.frombuffer(index, "<i4", count, 34)
    tokens = np.frombuffer(Path(f"{prefix}.bin").read_bytes(), "<u2").astype("<i8")
    return np.split(tokens, np.cumsum(sizes)[:-1])


def padded(pieces: list[np.ndarray], value: int) -> np.ndarray:
    row = np.concatenate(pieces)[:WIDTH]
    return np.concatenate([row, np.full(WIDTH - len(row), value, "<i8")])


def unpacked_samples(documents: list[np.ndarray], pad: int, num_samples: int) -> Iterator[Any]:
    """A document per sample, with the first token of the next: NeoX's head, then blocks."""
    order = np.arange(num_samples)
    np.random.RandomState(SEED).shuffle(order)
    count = len(documents)
    # NeoX never reads the last one.
    rows = [(documents[row % count], documents[(row + 1) % count]) for row in order[:-1]]
    for block in range(1, 4):
        order = np.arange(count)
        seed = np.random.SeedSequence([SEED, block]).generate_state(1)[0]
        np.random.RandomState(seed).shuffle(order)
        rows += [(documents[row], documents[(row + 1) % count]) for row in order]
    for document, following in rows:
        yield padded([document, following[:1]], pad)


def digest(samples: list[tuple[np.ndarray, ...]], position: int) -> str:
    total = 0
    for offset, arrays in enumerate(samples):
        content = b"".join(array.astype("<i8").tobytes() for array in arrays)
        total += xxhash.xxh3_64_intdigest(content, position + offset)
    return f"{total % 2**64:016x}"


def write_labels(prefix: Path, tokens: Path, *, masked_every: int | None) -> Path:
    """Write labels that are the tokens, some of them masked, as signed numbers."""
    documents = documents_of(tokens)
    labels = np.concatenate(documents).astype("<i2")
    if masked_every:
        labels[::masked_every] = -100
    sizes = np.array([len(document) for document in documents])
    write_files(prefix, labels.view("<u2"), sizes)
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[17] = 3  # int16
    index.write_bytes(content)
    return prefix


def packed_run(folder: Path, *, has_labels: bool, masked_every: int | None = None, **changes: Any):
    """Return a run on dataset a for training and v for evaluations."""
    paths = {}
    for split, name in (("train", "a"), ("valid", "v"), ("test", "v")):
        prefix = write_dataset(folder / "data" / name, ord(name))
        paths[f"{split}_data_paths"] = [str(prefix)]
        if has_labels:
            labels = write_labels(Path(f"{prefix}-labels"), prefix, masked_every=masked_every)
            paths[f"{split}_label_data_paths"] = [str(labels)]
    return InterruptedRun(folder, paths, **changes)


TWO_BY_TWO = {"pipe_parallel_size": 2, "model_parallel_size": 2, "num_gpus": 4}


@pytest.mark.parametrize(
    "topology", [pytest.param({}, marks=pytest.mark.matrix), TWO_BY_TWO], ids=["one rank", "four"]
)
def test_labels_equal_to_the_tokens_change_no_loss(topology: dict[str, Any], tmp_path: Path):
    short = {"train_iters": 3, "eval_interval": 3, **topology}
    without = packed_run(tmp_path / "without", has_labels=False, **short).launch()
    labelled = packed_run(tmp_path / "with", has_labels=True, **short).launch()
    assert labelled.losses == without.losses
    assert [one.digest for one in labelled.records] != [one.digest for one in without.records]
    masked = packed_run(tmp_path / "masked", has_labels=True, masked_every=2, **short).launch()
    assert masked.losses[0] != without.losses[0]


def test_documents_of_their_own_with_labels_interrupted_and_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = packed_run(tmp_path, has_labels=True, masked_every=3, pack_impl="unpacked")
    run.launch_killed(after=5)
    run.launch(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=6, num_workers=2)
    prefix = tmp_path / "data" / "a"
    tokens = documents_of(prefix)
    labels = [document.copy() for document in tokens]
    flat = np.concatenate(labels)
    flat[::3] = -100
    labels = np.split(flat, np.cumsum([len(one) for one in labels])[:-1])
    keeps = [bool((one[:SEQ_LENGTH] >= 0).any()) for one in labels]
    tokens, labels = (
        [one for one, keep in zip(all_, keeps, strict=True) if keep] for all_ in (tokens, labels)
    )
    wanted = int(np.ceil(TRAIN_ITERS * BATCH * 1.005))
    samples = zip(
        unpacked_samples(tokens, 0, wanted), unpacked_samples(labels, -100, wanted), strict=True
    )
    expected, position = {}, 0
    for step in range(1, TRAIN_ITERS + 1):
        batch = BATCH if step <= 3 else 12
        rows = [next(samples) for _ in range(batch)]
        expected[step] = (position, batch, digest(rows, position))
        position += batch
    assert run.read().steps == expected
    status, printed = run.verify(capsys)
    assert status == 0, printed


@pytest.mark.parametrize(
    "packing", [pytest.param("unpacked", marks=pytest.mark.matrix), "pack_until_overflow"]
)
def test_a_split_dataset_is_not_packed_and_survives_a_crash(
    packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prefix = write_dataset(tmp_path / "data" / "a", 1)
    run = InterruptedRun(
        tmp_path, {"data_path": str(prefix), "split": "80,10,10", "pack_impl": packing}
    )
    run.launch_killed(after=5)
    again = run.launch(train_iters=20)
    assert [one.step for one in again.records] == list(range(4, 21))
    assert [one.position for one in again.records] == [BATCH * step for step in range(3, 20)]
    status, printed = run.verify(capsys)
    assert status == 0, printed


def test_a_label_beyond_the_vocabulary_stops_the_run(tmp_path: Path):
    run = packed_run(tmp_path, has_labels=True)
    path = tmp_path / "data" / "a-labels.bin"
    labels = np.frombuffer(path.read_bytes(), "<i2").copy()
    labels[5:] = 30_000
    path.write_bytes(labels.tobytes())
    with pytest.raises(WorldFailed, match=r"holds token id 30000, in the sample at position \d+ "):
        run_training(run.config, tmp_path / "launch")
