"""Checking a checkpoint before it is loaded: bytes a second, against reading them and nothing else.

    python benchmarks/verify_at_load.py [--megabytes 500] [--repeats 9] [--ranks 1 2 4] [--folder .]

Files as a checkpoint has them (layers, optimizer state, small ones) are written with a manifest.
Then, alternating, with the page cache emptied of them before each,

    verify   all ranks check it together, as a launch does: names, sizes, digests, one verdict
    read     the same ranks read the same shares, 2 MiB at a time, and do nothing with them
    direct   the same past the page cache (O_DIRECT), where the file system can

The ratio is the faster way of reading divided by verify: at 0.8 or more, checking costs at most a
quarter beyond what loading must read anyway. What is in the cache is looked at (mincore): if it
can't be emptied, the line says so.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

import numpy as np
import torch.distributed

from megatron.base.file_digests import digest_file
from megatron.checkpoint.verified import verify_together
from megatron.ledger.manifest import (
    Manifest,
    StoredFile,
    read_manifest,
    share_of_files,
    write_manifest,
)
from tests.worlds import RankContext, run_ranks

CHUNK_BYTES = 1 << 21
PAGE_BYTES = mmap.PAGESIZE
ALIGNMENT_BYTES = 4096  # of O_DIRECT


def main() -> None:
    """Measure with each number of ranks, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--folder", help="on the disk to measure; the temporary directory's if none"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint = Path(folder) / "global_step1000"
        size = write_checkpoint(checkpoint, options.megabytes * 1_000_000)
        for ranks in options.ranks:
            measured = run_ranks(
                lambda context: measure(context, checkpoint, options.repeats),
                ranks,
                Path(folder),
                timeout_s=3600,
            )[0]
            report(ranks, size, *measured)


def write_checkpoint(checkpoint: Path, size: int) -> int:
    """Write files of ``size`` bytes together, and their manifest; return what a check reads."""
    checkpoint.mkdir(parents=True)
    random = np.random.default_rng(0)
    block = random.bytes(1 << 24)
    layers, parts = 16, 4
    sizes = {
        f"layer_{one:02d}-model_00-model_states.pt": size // 4 // layers for one in range(layers)
    }
    sizes |= {
        f"zero_pp_rank_{one}_mp_rank_00_optim_states.pt": size * 3 // 4 // parts
        for one in range(parts)
    }
    sizes |= {"mp_rank_00_model_states.pt": 40_000, "configs/run.yml": 2_000}
    files = {}
    for number, (name, length) in enumerate(sizes.items()):
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(number.to_bytes(8, "little"))
            while (left := length - file.tell()) > 0:
                file.write(block[:left])
            file.flush()
            os.fsync(file.fileno())
        files[name] = StoredFile(length, digest_file(path))
    write_manifest(
        checkpoint,
        Manifest(sequence=1, step=1000, run_id=None, attempt=None, parent=None, files=files),
    )
    return sum(sizes.values())


def measure(
    context: RankContext, checkpoint: Path, repeats: int
) -> tuple[dict[str, list[float]], bool]:
    """Return the seconds of each way, on all ranks, and whether the cache was empty each time."""
    torch.distributed.init_process_group(
        "gloo", init_method=context.init_method, rank=context.rank, world_size=context.world_size
    )
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise SystemExit(f"{checkpoint} has lost its manifest")
    share = [
        checkpoint / name for name in share_of_files(manifest, context.rank, context.world_size)
    ]

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * context.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def verify() -> None:
        problem = verify_together(
            checkpoint, gather, rank=context.rank, world_size=context.world_size, is_numbered=True
        )
        if problem is not None:
            raise SystemExit(problem)

    ways: dict[str, Callable[[], None]] = {
        "verify": verify,
        "read": lambda: [read(path) for path in share] and None,
    }
    if can_read_directly(share[0]):
        ways["direct"] = lambda: [read(path, direct=True) for path in share] and None
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    is_cold = True
    for _ in range(repeats):
        for name, way in ways.items():
            for path in share:
                forget(path)
            is_cold = is_cold and all(gather(cached_bytes(share) == 0))
            started = time.perf_counter()
            way()
            gather(None)
            seconds[name].append(time.perf_counter() - started)
    return seconds, is_cold


def read(path: Path, *, direct: bool = False) -> None:
    """Read a file into one buffer, over and over."""
    buffer = mmap.mmap(-1, CHUNK_BYTES)  # aligned to a page
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    with open(descriptor, "rb", buffering=0) as file:
        if not direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer) == CHUNK_BYTES:
            pass


def can_read_directly(path: Path) -> bool:
    """Whether the file system knows O_DIRECT."""
    try:
        read(path, direct=True)
    except OSError:
        return False
    return True


def forget(path: Path) -> None:
    """Take a file out of the page cache; it needs no privilege, its pages being clean."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_bytes(paths: Sequence[Path]) -> int:
    """Return how much of the files is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    total = 0
    for path in paths:
        size = path.stat().st_size
        descriptor = os.open(path, os.O_RDONLY)
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        pages = ctypes.create_string_buffer((size + PAGE_BYTES - 1) // PAGE_BYTES)
        if libc.mincore(address, size, pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        total += PAGE_BYTES * sum(page & 1 for page in pages.raw)
        libc.munmap(address, size)
        os.close(descriptor)
    return total


def report(ranks: int, size: int, seconds: dict[str, list[float]], is_cold: bool) -> None:
    """Print the ratio and its quartiles, and the speeds behind it."""
    plain = [of_way for name, of_way in seconds.items() if name != "verify"]
    reads = [min(pair) for pair in zip(*plain, strict=True)]
    ratios = [one / verify for one, verify in zip(reads, seconds["verify"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    speeds = ", ".join(
        f"{name} {size / statistics.median(of_way) / 1e9:.2f} GB/s"
        for name, of_way in seconds.items()
    )
    cache = "cold" if is_cold else "PARTLY FROM THE PAGE CACHE, which could not be emptied"
    print(
        f"verify at load, {ranks} ranks: {middle:.2f}x of reading ({low:.2f}-{high:.2f}); "
        f"{size / 1e6:.0f} MB, {cache}; {speeds}"
    )


if __name__ == "__main__":
    main()
