"""Questions to a run of Pythia's size: 134 M documents, 143,000 steps of 1,024 samples.

    python benchmarks/ledger_queries.py                        # a tenth of it
    python benchmarks/ledger_queries.py --documents 134000000  # whole: 4 GB of disk

Sizes are drawn, tokens are a sparse file: only where things are is asked, not what they are. Index
maps are written before anything is measured, as the run itself would have left them.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.ledger_file import (
    DatasetNote,
    Ledger,
    ModelPart,
    Span,
    StreamState,
    write_ledger,
)
from megatron.ledger.queries.consumer_rows import consumer_rows
from megatron.ledger.queries.consumers import consumers_of_document, lineage_course
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.samples import step_frame
from megatron.stream.identity import identify
from megatron.stream.index_file import write_index
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.segments import Segment, SegmentTable

SEQ_LENGTH = 2048
BATCH = BatchGeometry(micro_batch_size=16, data_parallel_size=64, gradient_accumulation_steps=1)
MEAN_TOKENS = 2230  # per document: 134 M of them are 143,000 steps and a few more
RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=13_400_000)
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint, steps = _write_run(Path(folder), options.documents)
        print(f"{options.documents:,} documents, {steps:,} steps of {BATCH.global_batch_size}")
        _measure_processes(checkpoint, steps)
        _measure_calls(checkpoint, steps)


def _write_run(folder: Path, num_documents: int) -> tuple[Path, int]:
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 2 * MEAN_TOKENS, num_documents, dtype=np.int32)
    prefix = folder / "pile_text_document"
    num_tokens = int(sizes.sum(dtype=np.int64))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * num_tokens)
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), sizes, np.zeros(1, dtype=np.int64))
    del sizes
    identity = identify(str(prefix))
    order = OrderDescription(
        components=(
            ComponentDescription(
                dataset=identity.digest,
                first_document=0,
                stop_document=num_documents,
                head_epochs=1,
            ),
        ),
        weights=None,
        seq_length=SEQ_LENGTH,
        seed=1234,
    )
    steps = (num_tokens - 1) // SEQ_LENGTH // BATCH.global_batch_size - 1
    checkpoint = folder / f"global_step{steps}"
    checkpoint.mkdir()
    segment = Segment(
        first_step=1,
        batch_size=BATCH.global_batch_size,
        first_position=0,
        order_id=order.order_id,
        first_order_position=0,
    )
    samples = steps * BATCH.global_batch_size
    note = DatasetNote(
        path=str(prefix),
        level=identity.level,
        num_documents=num_documents,
        num_tokens=num_tokens,
    )
    span = Span(
        run_id="run",
        attempt=1,
        first_step=1,
        last_step=steps,
        chain="0" * 16,
        digest_sum="",
        geometry=BATCH,
    )
    ledger = Ledger(
        model=ModelPart(padded_vocab_size=50432, tp_bias_multiplicity=1, tensor_parallel_size=1),
        run_id="run",
        step=steps,
        streams={"train": StreamState(segments=SegmentTable((segment,)), next_position=samples)},
        orders={order.order_id: order},
        spans=(span,),
        datasets={identity.digest: note},
    )
    write_ledger(checkpoint, ledger)
    started = time.perf_counter()
    RunData(ledger.datasets).stream(order)
    print(f"index maps built in {time.perf_counter() - started:.1f} s")
    return checkpoint, steps


def _measure_processes(checkpoint: Path, steps: int) -> None:
    """Whole processes: wall clock and processor time, the best of some."""
    questions = {
        "step (middle)": ["step", str(steps // 2), "--json"],
        "step (last)": ["step", str(steps), "--json"],
        "step, one rank": ["step", str(steps), "--rank", "3"],
        "document": ["document", "81234"],
    }
    for name, arguments in questions.items():
        results = [_run_command([*arguments, "--run", str(checkpoint)]) for _ in range(RUNS)]
        wall, cpu = (min(column) for column in zip(*results, strict=True))
        print(f"neox-ledger {name:18} {wall:6.2f} s wall, {cpu:5.2f} s CPU")


def _run_command(arguments: list[str]) -> tuple[float, float]:
    tool = Path(__file__).resolve().parents[1] / "tools" / "ledger.py"
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(tool), *arguments], stdout=subprocess.PIPE, env=os.environ, check=True
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "--json" in arguments:
        num_samples = len(json.loads(done.stdout)["samples"])
        if num_samples != BATCH.global_batch_size:
            raise RuntimeError(f"{num_samples} samples instead of {BATCH.global_batch_size}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _measure_calls(checkpoint: Path, steps: int) -> None:
    """Calls in a process that has the order open."""
    run = open_run(checkpoint)
    data = RunData(run.ledger.datasets)
    frame = step_frame(run, steps // 2)
    stream = data.stream(frame.order)
    (identity,) = run.ledger.datasets
    course = lineage_course(run, "train")
    places = np.arange(frame.order_positions.start, frame.order_positions.stop)
    _report("explain 1 sample", lambda: stream.explain(places[:1]), 2000)
    _report("explain 1,024 samples", lambda: stream.explain(places), 20)
    _report(
        "find a document",
        lambda: consumer_rows(run, consumers_of_document(course, data, identity, 81234)),
        3,
    )
    for step in (1, steps):
        wanted = _micro_batch(step)
        _report(f"first micro batch, step {step}", functools.partial(stream.locate, wanted), 200)
    _report(f"a batch sampler's walk to {steps}", lambda: _walk(steps), 1, runs=1)
    anywhere = np.random.default_rng(2).integers(0, steps * BATCH.global_batch_size, 1_000_000)
    started = time.perf_counter()
    stream.locate(anywhere)
    print(f"locate {len(anywhere) / (time.perf_counter() - started) / 1e6:35.1f} M positions/s")


def _micro_batch(step: int) -> np.ndarray:
    """Return the positions of rank 3's first micro batch, as the loader asks for them."""
    first = (step - 1) * BATCH.global_batch_size + BATCH.first_position(0, 3)
    return np.arange(first, first + BATCH.micro_batch_size)


def _walk(steps: int) -> list[int]:
    """Gather batches one sample at a time up to a step, as a sampler that is resumed does."""
    batch: list[int] = []
    for sample in range(steps * BATCH.global_batch_size):
        batch.append(sample)
        if len(batch) == BATCH.global_batch_size:
            taken = batch
            batch = []
    return taken


def _report(name: str, call: Callable[[], object], repeats: int, runs: int = RUNS) -> None:
    if runs > 1:
        call()
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - started) / repeats)
    print(f"{name:30} {best * 1e6:12,.0f} us")


if __name__ == "__main__":
    main()
