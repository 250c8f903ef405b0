"""The samples of a range of steps, batch by batch, and the files they are written to."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import RunDirectoryError
from megatron.ledger.queries.samples import StepFrame, step_slots
from megatron.stream.explanations import SampleParts
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_stream import Stream

__all__ = ["Batch", "NpyWriter", "ParquetWriter", "Writer", "batches", "export"]

_SAMPLES_AT_ONCE = 256

Detokenize = Callable[[list[int]], str]


@dataclass(frozen=True)
class Batch:
    """Some samples of one step."""

    frame: StepFrame
    first: int  # row of the step's batch that the first sample is
    tokens: NDArray[Any]  # (num_samples, seq_length + 1), storage type
    parts: Sequence[SampleParts]
    texts: Sequence[str] | None

    @property
    def positions(self) -> range:
        """Stream positions of the samples."""
        start = self.frame.positions.start + self.first
        return range(start, start + len(self.tokens))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what is known of each sample but its tokens."""
        slots = step_slots(self.frame)
        for index, (position, parts) in enumerate(zip(self.positions, self.parts, strict=True)):
            slot = (None,) * 3 if slots is None else slots[self.first + index]
            yield {
                "step": self.frame.step,
                "position": position,
                "micro_step": slot[0],
                "data_parallel_rank": slot[1],
                "row": slot[2],
                "component": parts.key,
                "dataset": parts.prefix,
                "block": parts.block,
                "sample": parts.sample,
                "padding": parts.padding,
            }


def batches(
    frames: Iterable[StepFrame],
    open_order: Callable[[OrderDescription], Stream],
    *,
    detokenize: Detokenize | None = None,
) -> Iterator[Batch]:
    """Yield the samples of steps in order.

    Args:
        frames: the steps.
        open_order: opens an order with its data.
        detokenize: gives the text of tokens; None: texts aren't wanted.

    Raises:
        DatasetError: a dataset isn't there, or isn't what the run read.
        RunDirectoryError: the samples of the steps have different lengths.
    """
    seq_length = None
    for frame in frames:
        if seq_length not in (None, frame.order.seq_length):
            raise RunDirectoryError(
                f"step {frame.step} has samples of {frame.order.seq_length} tokens, those before "
                f"it of {seq_length}; export the two ranges apart"
            )
        seq_length = frame.order.seq_length
        opened = open_order(frame.order)
        for first in range(0, len(frame.positions), _SAMPLES_AT_ONCE):
            stop = min(first + _SAMPLES_AT_ONCE, len(frame.positions))
            places = np.arange(first, stop, dtype=np.int64) + frame.order_positions.start
            tokens = opened.read(places)
            texts = None
            if detokenize is not None:
                texts = [detokenize(ids) for ids in tokens.tolist()]
            yield Batch(frame, first, tokens, opened.explain(places), texts)


class Writer(Protocol):
    """Takes batches and writes them to files."""

    def add(self, batch: Batch) -> None:
        """Write one batch."""

    def close(self) -> None:
        """Finish the files."""


def export(
    found: Iterator[Batch],
    writer: Writer,
    *,
    num_steps: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write batches as they come; return the number of samples."""
    samples = 0
    steps: set[int] = set()
    try:
        for batch in found:
            writer.add(batch)
            samples += len(batch.tokens)
            steps.add(batch.frame.step)
            on_step(len(steps), num_steps)
    finally:
        writer.close()
    return samples


class NpyWriter:
    """``tokens.npy``, ``positions.npy``, ``steps.npy``, ``documents.npy``, ``samples.jsonl``.

    A row of ``documents.npy`` is one document's part of one sample: index of the sample in the
    other files, document, first token and the token after the last. ``samples.jsonl`` has one
    object per sample, with its text if a tokenizer was given.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True)
        self._arrays: dict[str, _GrowingArray] = {}
        self._lines = (directory / "samples.jsonl").open("w")
        self._num_samples = 0

    def add(self, batch: Batch) -> None:
        """Append one batch."""
        documents = [
            (self._num_samples + index, part.document, part.start, part.stop)
            for index, parts in enumerate(batch.parts)
            for part in parts.documents
        ]
        self._append("tokens", batch.tokens)
        self._append("positions", np.array(batch.positions, dtype=np.int64))
        self._append("steps", np.full(len(batch.tokens), batch.frame.step, dtype=np.int64))
        self._append("documents", np.array(documents, dtype=np.int64).reshape(-1, 4))
        for index, row in enumerate(batch.rows()):
            text = {} if batch.texts is None else {"text": batch.texts[index]}
            self._lines.write(json.dumps({**row, **text}) + "\n")
        self._num_samples += len(batch.tokens)

    def close(self) -> None:
        """Write the arrays' lengths into their files."""
        self._lines.close()
        for array in self._arrays.values():
            array.close()

    def _append(self, name: str, rows: NDArray[Any]) -> None:
        if name not in self._arrays:
            self._arrays[name] = _GrowingArray(self._directory / f"{name}.npy", rows)
        self._arrays[name].append(rows)


class ParquetWriter:
    """One Parquet file with a row per sample; needs pyarrow."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError as error:
            raise RunDirectoryError(
                "Parquet files need the package pyarrow (pip install pyarrow); or export .npy files"
            ) from error
        self._pyarrow = pyarrow
        self._parquet = pyarrow.parquet
        self._path = path
        self._writer: Any = None  # pyarrow has no types
        self._schema: Any = None

    def add(self, batch: Batch) -> None:
        """Append one batch as a row group."""
        if self._writer is None:
            self._schema = self._described(batch)
            self._writer = self._parquet.ParquetWriter(self._path, self._schema)
        rows = list(batch.rows())
        for index, row in enumerate(rows):
            row["tokens"] = batch.tokens[index]
            row["documents"] = [
                {"document": part.document, "start": part.start, "stop": part.stop}
                for part in batch.parts[index].documents
            ]
            if batch.texts is not None:
                row["text"] = batch.texts[index]
        self._writer.write_table(self._pyarrow.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        """Write the file's end."""
        if self._writer is not None:
            self._writer.close()

    def _described(self, batch: Batch) -> Any:
        arrow = self._pyarrow
        whole = arrow.int64()
        document = arrow.struct([("document", whole), ("start", whole), ("stop", whole)])
        names = ["step", "position", "micro_step", "data_parallel_rank", "row"]
        fields = [(name, whole) for name in names]
        fields += [("component", arrow.string()), ("dataset", arrow.string())]
        fields += [(name, whole) for name in ("block", "sample", "padding")]
        fields += [("tokens", arrow.list_(arrow.from_numpy_dtype(batch.tokens.dtype)))]
        fields += [("documents", arrow.list_(document))]
        if batch.texts is not None:
            fields += [("text", arrow.string())]
        return arrow.schema(fields)


class _GrowingArray:
    """A ``.npy`` file to which rows are appended; its length is filled in at the end."""

    def __init__(self, path: Path, like: NDArray[Any]) -> None:
        self._file: BinaryIO = path.open("wb")
        self._dtype = like.dtype
        self._row_shape = like.shape[1:]
        self._length = 0
        self._write_header()

    def append(self, rows: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._length += len(rows)

    def close(self) -> None:
        # numpy leaves room in the header for a first dimension of any length
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
