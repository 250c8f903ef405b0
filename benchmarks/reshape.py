"""Reshaping a checkpoint: memory, and time against DeepSpeed's universal checkpoint.

    python benchmarks/reshape.py [--layers 10] [--repeats 5]

A model of about 500 MB of state (fp32 weights, masters and two moments) takes one step on two
tensor-parallel ranks and is saved twice, by us and by DeepSpeed. Then, alternating,

    ours, on load      two pipeline stages load it, reshaping while they read
    ours, offline      reshape.py writes it for two pipeline stages, which load the result
    DeepSpeed's        ds_to_universal converts its own files, two pipeline stages load the result

Times are those of the work alone, without imports and without building engines. Ours check every
byte against its digest (offline also syncs what it writes); DeepSpeed's does neither. Peak memory
is that of the offline tool's process above what it had before, and the same for the converter; the
largest layer counts with its weights, masters and moments.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

import torch

from megatron.checkpoint.reshape.offline import ReshapeSettings, reshape_checkpoint
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.config.topology import Topology
from megatron.ledger.manifest import digest_problems, read_manifest, share_of_files
from tests.checkpoint.test_universal_checkpoint import convert, universal_info, use_universal
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import RankContext, run_ranks

WRITER, READER = Topology(1, 1, 2), Topology(2, 1, 1)
STATE_BYTES = 16  # of each parameter: weight, master, two moments, all fp32


def main() -> None:
    """Measure, and print a line for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = TinySettings(
        WRITER,
        num_layers=options.layers,
        hidden_size=options.hidden,
        heads=8,
        padded_vocab_size=8192,
        gradient_accumulation_steps=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), settings, options.repeats)


def measure(folder: Path, settings: TinySettings, repeats: int) -> None:
    """Write the source, then take the three ways in turn."""
    with quiet():
        run_ranks(lambda context: write_source(context, settings), 2, folder, 600)
    stored = StoredCheckpoint(folder / "ours" / "global_step1")
    layers = {
        number: sum(
            tensor.numel()
            for rank in range(stored.tensor_parallel_size)
            for tensor in stored.weights(number, rank)[1].values()
        )
        for number in stored.layer_numbers
    }
    largest = STATE_BYTES * max(layers.values())
    print(f"state {STATE_BYTES * sum(layers.values()) / 1e6:.0f} MB, largest layer "
          f"{largest / 1e6:.0f} MB, load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    target = replace(settings, topology=READER)
    times: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    for number in range(repeats):
        offline, universal = folder / f"offline{number}", folder / "theirs" / "universal"

        def reshape(to: Path = offline) -> None:
            wanted = ReshapeSettings(model=settings.model, topology=READER)
            reshape_checkpoint(stored.directory, to, wanted)

        on_load = load(folder, target, stored.directory)
        written, peak = in_a_process(reshape)
        reloaded = load(folder, target, offline / "global_step1")
        converted, their_peak = in_a_process(
            lambda: convert(folder / "theirs" / "global_step1", folder / "theirs" / "universal")
        )
        their_load = load(folder, target, None)
        for name, seconds in {
            "ours, on load": on_load,
            "ours, offline": written + reloaded,
            "ours, offline, writing": written,
            "DeepSpeed's": converted + their_load,
            "DeepSpeed's, converting": converted,
        }.items():
            times.setdefault(name, []).append(seconds)
        peaks.setdefault("reshape.py", []).append(peak / largest)
        peaks.setdefault("ds_to_universal", []).append(their_peak / largest)
        for path in (offline, universal):
            shutil.rmtree(path)
    for name, values in times.items():
        ratios = [one / other for one, other in zip(values, times["DeepSpeed's"], strict=True)]
        print(f"{name}: {shown(ratios)}x DeepSpeed's conversion and load, {shown(values)} s")
    for name, values in peaks.items():
        print(f"peak memory of {name}: {shown(values)}x the largest layer")
    print(f"load average at the end {os.getloadavg()[0]:.1f}")


def write_source(context: RankContext, settings: TinySettings) -> None:
    """Take a step and save it both ways."""
    run = TinyRun(context, settings)
    run.train(1)
    run.save(context.tmp_path / "ours")
    run.module.universal_checkpoint_info = universal_info(settings)
    theirs = context.tmp_path / "theirs"
    run.engine.save_checkpoint(str(theirs), tag="global_step1")
    name = f"layer_01-model_{context.rank:02d}-model_states.pt"  # the converter insists on it
    torch.save({}, theirs / "global_step1" / name)


def load(folder: Path, settings: TinySettings, checkpoint: Path | None) -> float:
    """Return the seconds that the slower rank needs to load; None: DeepSpeed's universal one."""

    def rank(context: RankContext) -> float:
        if checkpoint is None:
            use_universal()
        run = TinyRun(context, settings)
        torch.distributed.barrier()
        start = time.perf_counter()
        if checkpoint is None:
            run.engine.load_checkpoint(str(folder / "theirs"), tag="universal")
        else:
            manifest = read_manifest(checkpoint)
            assert manifest is not None  # noqa: S101
            share = share_of_files(manifest, context.rank, context.world_size)
            assert not digest_problems(checkpoint, manifest, share)  # noqa: S101
            run.load(checkpoint)
        return time.perf_counter() - start

    with quiet():
        return max(run_ranks(rank, settings.topology.world_size, folder, 600))


def in_a_process(action: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds ``action`` took in a forked process, and its peak memory in bytes."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = memory("VmRSS"), time.perf_counter()
        with quiet():
            action()
        writer.send((time.perf_counter() - start, memory("VmHWM") - before))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result: Any = reader.recv() if reader.poll(600) else None
    process.join()
    return result


def memory(name: str) -> int:
    """Return a number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def shown(values: list[float]) -> str:
    """Return the median and the smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


@contextlib.contextmanager
def quiet() -> Any:
    """Keep DeepSpeed's lines off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    main()
