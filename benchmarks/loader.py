"""How fast samples are read, against the least work possible and against megatron-core.

    python benchmarks/loader.py [--quick]

One process, sequences of 2048 uint16 tokens, micro batches of 8, files in the page cache. Each
contender reads the same samples in turn, round after round; a line gives the median of the
rounds' ratios of speed and, in brackets, its quartiles. `NumPy copy` and `NumPy cast` copy the
same bytes from samples that lie ready in memory one after another: the limit.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.config.batch_geometry import BatchGeometry
from megatron.data.batch import broadcast_tokens, split_tokens
from megatron.data.loader import MicroBatchLoader
from megatron.stream.indexed_dataset import IndexedDatasetBuilder
from megatron.stream.streams import SplitCounts, Stream, StreamSettings, open_streams

SEQ_LENGTH = 2048
MICRO_BATCH = 8
SEED = 1234
MEAN_DOCUMENT = 1300  # tokens, as in the Pile; log-normal, so most are shorter

Contender = Callable[[int], None]  # reads one round's samples, from this position on


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller file and fewer rounds")
    options = parser.parse_args()
    num_tokens, rounds, samples = (8 << 20, 8, 1024) if options.quick else (128 << 20, 16, 4096)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "corpus")
        write_dataset(prefix, num_tokens)
        stream = open_stream(prefix, (rounds + 1) * samples)
        ready = stream.read(np.arange((rounds + 1) * samples))
        contenders = {
            "loader, storage type": our_loader(stream, samples),
            "loader, storage type, 2 workers": our_threads(stream, samples),
            "loader, int64": our_loader(stream, samples, use=to_int64),
            "loader, model inputs": our_loader(stream, samples, use=to_model_inputs),
            "NumPy copy": numpy_rows(ready, samples, np.ndarray.copy),
            "NumPy cast": numpy_rows(ready, samples, to_int64),
            **megatron_core(prefix, ready, samples),
        }
        seconds = measure(contenders, rounds, samples)
    for name, times in seconds.items():
        print(f"{name:<58} {samples / statistics.median(times):>9,.0f} samples/s")
    print()
    for ours, other in (
        ("loader, storage type", "NumPy copy"),
        ("loader, int64", "NumPy cast"),
        ("loader, storage type", "GPTDataset, text as int64"),
        ("loader, int64", "GPTDataset, text as int64"),
        ("loader, model inputs", "GPTDataset, items"),
        ("loader, storage type, 2 workers", "loader, storage type"),
    ):
        ratios = [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{f'{ours} / {other}':<58} {middle:>8.2f}x ({low:.2f}..{high:.2f})")


def write_dataset(prefix: str, num_tokens: int) -> None:
    """Write documents of random tokens and Pile-like lengths."""
    random = np.random.default_rng(SEED)
    sizes = random.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, num_tokens // MEAN_DOCUMENT)
    builder = IndexedDatasetBuilder(prefix + ".bin", np.uint16)
    for size in sizes.astype(int) + 1:
        builder.add_item(random.integers(1, 50_000, size, dtype=np.uint16))
        builder.end_document()
    builder.finalize(prefix + ".idx")


def open_stream(prefix: str, num_samples: int) -> Stream:
    """Open the whole file as a training stream."""
    settings = StreamSettings(
        seq_length=SEQ_LENGTH, seed=SEED, data_path=prefix, split="1,0,0", mmap_warmup=True
    )
    requested = SplitCounts(train=num_samples, valid=0, test=0)
    stream = open_streams(settings, requested, is_builder=True, barrier=lambda: None).train
    if stream is None:
        raise RuntimeError("the benchmark's own dataset gave no stream")
    return stream


def our_loader(
    stream: Stream, samples: int, *, use: Callable[[Any], Any] | None = None
) -> Contender:
    """Read on with one loader, round after round; ``use`` each micro batch."""
    loader = MicroBatchLoader(stream, BatchGeometry(MICRO_BATCH, 1, 1), 0, 0, num_workers=0)

    def read(position: int) -> None:
        for _ in range(samples // MICRO_BATCH):
            batch = next(loader)
            if use is not None:
                use(batch)

    return read


def our_threads(stream: Stream, samples: int) -> Contender:
    """Read with two threads; a loader per round, or it would be ready before its turn."""

    def read(position: int) -> None:
        geometry = BatchGeometry(MICRO_BATCH, 1, 1)
        stop = position + samples
        with MicroBatchLoader(stream, geometry, 0, position, 2, stop_position=stop) as loader:
            for _ in range(samples // MICRO_BATCH):
                next(loader)

    return read


def to_int64(tokens: NDArray[Any]) -> NDArray[np.int64]:
    """Cast one micro batch."""
    return tokens.astype(np.int64)


def to_model_inputs(tokens: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    """Return inputs, labels and loss mask of one micro batch, as training does."""
    on_device = broadcast_tokens(
        tokens,
        shape=(MICRO_BATCH, SEQ_LENGTH + 1),
        dtype=tokens.dtype,
        group=None,
        source_rank=0,
        device=torch.device("cpu"),
    )
    return split_tokens(on_device, eod=0, eod_mask_loss=False)


def numpy_rows(ready: NDArray[Any], samples: int, use: Callable[[Any], Any]) -> Contender:
    """Apply ``use`` to the round's samples, micro batch by micro batch."""

    def read(position: int) -> None:
        for start in range(position, position + samples, MICRO_BATCH):
            use(ready[start : start + MICRO_BATCH])

    return read


def megatron_core(prefix: str, ready: NDArray[Any], samples: int) -> dict[str, Contender]:
    """Read with megatron-core's GPTDataset, without its DataLoader's processes."""
    warnings.filterwarnings("ignore", message=".*Transformer Engine.*")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import default_collate

    tokenizer = SimpleNamespace(
        vocab_size=50_000, eod=0, pad=50_001, unique_identifiers={}, eos_id=0, pad_id=50_001
    )
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(Path(prefix).parent / "mcore"),
    )
    source = IndexedDataset(prefix)
    documents = np.arange(len(source.sequence_lengths), dtype=np.int32)
    dataset = GPTDataset(source, prefix, documents, len(ready), Split.train, config)

    def read_text(position: int) -> None:
        for start in range(position, position + samples, MICRO_BATCH):
            rows = range(start, start + MICRO_BATCH)
            np.stack([dataset._query_document_sample_shuffle_indices(row)[0] for row in rows])

    def read_items(position: int) -> None:
        for start in range(position, position + samples, MICRO_BATCH):
            default_collate([dataset[row] for row in range(start, start + MICRO_BATCH)])

    return {"GPTDataset, text as int64": read_text, "GPTDataset, items": read_items}


def measure(contenders: dict[str, Contender], rounds: int, samples: int) -> dict[str, list[float]]:
    """Return each contender's seconds per round; a round gives all of them the same samples.

    Who comes first takes turns: it finds nothing of the round in the processor's caches.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contenders[name](round_number * samples)
            if round_number > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
