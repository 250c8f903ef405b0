"""Data in shards: opening 133 of them, finding what steps need, reading from them.

    python benchmarks/sharded_data.py                      # Pythia's size; 12 GB of disk
    python benchmarks/sharded_data.py --documents 1000000  # a smaller index of the same bytes

The 664 GB are sparse files: nothing is written but their length. What is read comes from the page
cache, so reads show what finding and copying cost, not a disk. Ours and theirs take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.stream.identity import identify
from megatron.stream.index_file import write_index
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.opening import open_order_alone
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.required_files import first_missing, required_files
from megatron.stream.shard_layout import assumed_shards
from megatron.stream.token_bytes import TokenBytes

TOTAL_BYTES = 664_230_651_068
SHARD_BYTES = 5_000_000_000
DOCUMENTS = 210_607_728
SEQ_LENGTH = 2048
BATCH = 1024
READ_BYTES = 4096


def main() -> None:
    options = _parse_options()
    if options.measure is not None:
        print(json.dumps(_MEASURES[options.measure](Path(options.folder))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _write_sparse(folder, options.documents)
        _write_rows(folder)
        print(f"{options.documents:,} documents, {TOTAL_BYTES:,} bytes in 133 shards")
        for what in _MEASURES:
            runs = [_fresh(what, folder) for _ in range(options.runs)]
            print(f"{what:24} {_shown(runs)}")
        _compare_reads(folder, options.runs)


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where files are written (default: the temporary folder)")
    parser.add_argument("--measure", choices=sorted(_MEASURES), help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_sparse(folder: Path, num_documents: int) -> None:
    tokens = TOTAL_BYTES // 2
    sizes = np.full(num_documents, tokens // num_documents, dtype=np.int32)
    sizes[: tokens % num_documents] += 1
    write_index(folder / "pile.idx", np.dtype(np.uint16), sizes, [0])
    _truncate(assumed_shards(str(folder / "pile"), TOTAL_BYTES, SHARD_BYTES))


def _write_rows(folder: Path) -> None:
    """Write a preshuffled set of Pythia's size: rows of 2,049 tokens in 21 files."""
    num_rows = 146_432_000
    sizes = np.full(num_rows, SEQ_LENGTH + 1, dtype=np.int32)
    write_index(folder / "rows.idx", np.dtype(np.uint16), sizes, [0])
    size = num_rows * (SEQ_LENGTH + 1) * 2
    _truncate(assumed_shards(str(folder / "rows"), size, 30_000_000_000))


def _truncate(shards) -> None:
    for shard in shards:
        with open(shard.path, "wb") as file:
            file.truncate(shard.stop - shard.start)


def _fresh(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def _shown(runs: list[dict[str, float]]) -> str:
    seconds = [run["seconds"] for run in runs]
    peak = max(run["peak_bytes"] for run in runs)
    return (
        f"{statistics.median(seconds):8.3f} s ({min(seconds):.3f} to {max(seconds):.3f})  "
        f"peak resident {peak / 2**20:6.0f} MiB"
    )


def _measured(work: Callable[[], object]) -> dict[str, float]:
    start = time.perf_counter()
    kept = work()  # noqa: F841 - freeing isn't measured
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_bytes": int(peak.split()[1]) * 1024}


def _open_and_read(folder: Path) -> dict[str, float]:
    def work() -> object:
        dataset = IndexedDataset(folder / "pile")
        dataset[0], dataset[len(dataset) // 2], dataset[-1]
        return dataset

    return _measured(work)


def _open_with_gaps(folder: Path) -> dict[str, float]:
    """With every shard but three away."""
    away = folder / "away"
    away.mkdir(exist_ok=True)
    paths = sorted(folder.glob("pile-*.bin"))
    for index, path in enumerate(paths):
        if index not in (3, 70, 132):
            path.rename(away / path.name)
    try:
        return _measured(lambda: IndexedDataset(folder / "pile"))
    finally:
        for path in away.iterdir():
            path.rename(folder / path.name)


def _identify(folder: Path) -> dict[str, float]:
    Path(f"{folder}/pile_identity.json").unlink(missing_ok=True)
    return _measured(lambda: identify(str(folder / "pile")))


def _identify_again(folder: Path) -> dict[str, float]:
    identify(str(folder / "pile"))
    return _measured(lambda: identify(str(folder / "pile")))


def _order(folder: Path, name: str, packing: str) -> OrderDescription:
    num_documents = len(IndexedDataset(folder / name))
    component = ComponentDescription(
        dataset="of the benchmark", first_document=0, stop_document=num_documents, head_epochs=1
    )
    return OrderDescription(
        components=(component,), weights=None, seq_length=SEQ_LENGTH, seed=1234, packing=packing
    )


def _required_rows(folder: Path) -> dict[str, float]:
    """The files of 1,000 steps of preshuffled rows."""
    stream = open_order_alone(_order(folder, "rows", "sequential"), lambda _: str(folder / "rows"))
    return _measured(lambda: required_files(stream, range(3000 * BATCH, 4000 * BATCH)))


def _missing_rows(folder: Path) -> dict[str, float]:
    """The first need of the last three files in 143,000 steps."""
    away = folder / "away"
    away.mkdir(exist_ok=True)
    paths = sorted(folder.glob("rows-*.bin"))[-3:]
    for path in paths:
        path.rename(away / path.name)
    try:
        order = _order(folder, "rows", "sequential")
        stream = open_order_alone(order, lambda _: str(folder / "rows"))
        result = _measured(lambda: _require(first_missing(stream, range(143_000 * BATCH)), 3))
    finally:
        for path in paths:
            (away / path.name).rename(path)
    return result


def _require(found: list, count: int) -> list:
    if len(found) != count:
        raise RuntimeError(f"{len(found)} files found, not {count}")
    return found


_MEASURES = {
    "open, 3 documents": _open_and_read,
    "open, 130 missing": _open_with_gaps,
    "identify": _identify,
    "identify, known": _identify_again,
    "required, 1000 steps": _required_rows,
    "3 missing, 143000 steps": _missing_rows,
}


def _compare_reads(folder: Path, runs: int) -> None:
    """Random reads of 4 KB, a micro batch's worth at once and one by one."""
    size = 2_000_000_007
    random = np.random.default_rng(0)
    whole = folder / "whole.bin"
    with open(whole, "wb") as file:
        for start in range(0, size, 1 << 26):
            file.write(random.bytes(min(1 << 26, size - start)))
    shard_bytes = size // 132
    shards = assumed_shards(str(folder / "cut"), size, shard_bytes)
    with open(whole, "rb") as source:
        for shard in shards:
            shard.path.write_bytes(source.read(shard.stop - shard.start))
    one, many = TokenBytes.of_files([whole]), TokenBytes(shards)
    for count in (8, 256):
        ratios = []
        rates: dict[str, list[float]] = {"one file": [], "133 shards": []}
        for turn in range(5 + 10 * runs):
            starts = random.integers(0, size - READ_BYTES, size=(4000 * 8 // count, count))
            sources = {"one file": one, "133 shards": many}
            names = list(sources) if turn % 2 else list(sources)[::-1]
            took = {name: _gather(sources[name], starts) for name in names}
            if turn >= 5:  # until then pages are mapped
                ratios.append(took["one file"] / took["133 shards"])
                for name, seconds in took.items():
                    rates[name].append(starts.size / seconds)
        shown = ", ".join(f"{name} {statistics.median(v):,.0f}/s" for name, v in rates.items())
        print(
            f"{count} reads of 4 KB at once: {shown}; ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), limit 0.9"
        )
    ratios = []
    for turn in range(5 + 10 * runs):
        starts = random.integers(0, size - READ_BYTES, size=20_000).tolist()
        took = {}
        for source in (one, many) if turn % 2 else (many, one):
            took[source] = _read(source, starts)
        if turn >= 5:
            ratios.append(took[one] / took[many])
    print(
        f"one read of 4 KB at a time: ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


def _gather(tokens: TokenBytes, starts: np.ndarray) -> float:
    count = starts.shape[1]
    out = np.empty(count * READ_BYTES, dtype=np.uint8)
    targets = np.arange(count, dtype=np.int64) * READ_BYTES
    sizes = np.full(count, READ_BYTES, dtype=np.int64)
    begin = time.perf_counter()
    for row in starts:
        tokens.gather(row, targets, sizes, out)
    return time.perf_counter() - begin


def _read(tokens: TokenBytes, starts: list[int]) -> float:
    begin = time.perf_counter()
    for start in starts:
        tokens.read(start, start + READ_BYTES).tobytes()
    return time.perf_counter() - begin


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
