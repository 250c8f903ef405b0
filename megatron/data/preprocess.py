"""Documents to indexed datasets: tokenize in order, by one process or several, and write.

    documents -> batches -> tokenize (here, or in worker processes) -> in order -> P.bin, P.idx

The bytes written do not depend on the number of workers. Datasets are built in a hidden folder
beside their place and moved there when all are complete (`dataset_output`).
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import ConfigError, DatasetError
from megatron.data.dataset_output import appearing_together
from megatron.data.indexed_dataset import make_builder
from megatron.data.tokenizers import Tokenizer, build_tokenizer

__all__ = ["DatasetCounts", "Tokenizing", "write_datasets"]

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20
_BATCHES_PER_WORKER = 3  # in flight: one being tokenized, others waiting on either side


@dataclass(frozen=True)
class Tokenizing:
    """How a text becomes the tokens of one document."""

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    append_eod: bool = False  # end every document with the end-of-document token
    fix_text: bool = False  # repair broken Unicode with ftfy first

    def build_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, checked for what the other settings need.

        Raises:
            ConfigError: it cannot be built, or has no end-of-document token to append.
        """
        tokenizer = build_tokenizer(self.tokenizer_type, self.vocab_file, self.merge_file)
        if self.append_eod and tokenizer.eod is None:
            raise ConfigError(
                f"--append-eod: {self.tokenizer_type} {self.vocab_file} has no <|endoftext|> token"
            )
        return tokenizer


@dataclass(frozen=True)
class DatasetCounts:
    """What one written dataset holds."""

    num_documents: int
    num_tokens: int
    num_without_tokens: int  # documents that the tokenizer gave no tokens for; not written


def write_datasets(
    documents: Iterable[tuple[str, ...]],
    prefixes: Sequence[Path],
    tokenizing: Tokenizing,
    *,
    num_workers: int,
    on_progress: Callable[[int, int], None],
) -> list[DatasetCounts]:
    """Write one dataset per prefix from the texts of ``documents``, in their order.

    Args:
        documents: texts, one per prefix; read once.
        prefixes: where each dataset goes, without ``.bin`` and ``.idx``.
        tokenizing: how.
        num_workers: processes that tokenize; 1 tokenizes in this one.
        on_progress: called with (documents, bytes of text) done since the last call.

    Returns:
        What each dataset holds.

    Raises:
        DatasetError: a token does not fit the dataset's type; nothing is written then, nor after
            any error of ``documents``.
        ConfigError: the tokenizer cannot be built.
    """
    vocab_size = tokenizing.build_tokenizer().vocab_size
    with appearing_together(prefixes) as outputs:
        builders = [make_builder(str(out.bin_path), "mmap", vocab_size) for out in outputs]
        counts = [np.zeros(3, dtype=np.int64) for _ in prefixes]
        dtype = builders[0].dtype
        for batch in _tokenized(_batches(documents), tokenizing, dtype, num_workers):
            for builder, count, column in zip(builders, counts, batch.columns, strict=True):
                count += _append(builder, column)
            on_progress(batch.num_documents, batch.text_bytes)
        for builder, output in zip(builders, outputs, strict=True):
            builder.finalize(str(output.idx_path))
    return [DatasetCounts(*map(int, count)) for count in counts]


@dataclass(frozen=True)
class _Column:
    """Tokens of one key's documents, end to end: cheap to send between processes."""

    tokens: NDArray[Any]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class _TokenizedBatch:
    columns: tuple[_Column, ...]
    num_documents: int
    text_bytes: int


def _append(builder: Any, column: _Column) -> NDArray[np.int64]:
    for tokens in np.split(column.tokens, np.cumsum(column.sizes)[:-1]):
        if len(tokens):
            builder.add_item(tokens)
            builder.end_document()
    without_tokens = int(np.count_nonzero(column.sizes == 0))
    return np.array([len(column.sizes) - without_tokens, len(column.tokens), without_tokens])


def _batches(documents: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    batch: list[tuple[str, ...]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document))
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenized(
    batches: Iterator[list[tuple[str, ...]]],
    tokenizing: Tokenizing,
    dtype: np.dtype[Any],
    num_workers: int,
) -> Iterator[_TokenizedBatch]:
    if num_workers == 1:
        tokenizer = tokenizing.build_tokenizer()
        for batch in batches:
            yield _tokenize_batch(batch, tokenizer, tokenizing, dtype)
        return
    # Spawned, not forked: tokenizer libraries have threads of their own.
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizing, dtype),
    ) as executor:
        pending: deque[Future[_TokenizedBatch]] = deque()
        try:
            for batch in batches:
                pending.append(executor.submit(_tokenize_in_worker, batch))
                if len(pending) == num_workers * _BATCHES_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


_in_worker: tuple[Tokenizer, Tokenizing, np.dtype[Any]] | None = None


def _start_worker(tokenizing: Tokenizing, dtype: np.dtype[Any]) -> None:
    global _in_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _in_worker = (tokenizing.build_tokenizer(), tokenizing, dtype)


def _tokenize_in_worker(batch: list[tuple[str, ...]]) -> _TokenizedBatch:
    assert _in_worker is not None  # noqa: S101 - the executor runs the initializer first
    return _tokenize_batch(batch, *_in_worker)


def _tokenize_batch(
    batch: list[tuple[str, ...]],
    tokenizer: Tokenizer,
    tokenizing: Tokenizing,
    dtype: np.dtype[Any],
) -> _TokenizedBatch:
    columns: dict[tuple[str, ...], _Column] = {}  # keys of one file often have one text
    keys = [tuple(texts) for texts in zip(*batch, strict=True)]
    for texts in keys:
        if texts not in columns:
            columns[texts] = _tokenize_column(texts, tokenizer, tokenizing, dtype)
    text_bytes = sum(len(text.encode()) for texts in columns for text in texts)
    return _TokenizedBatch(tuple(columns[texts] for texts in keys), len(batch), text_bytes)


def _tokenize_column(
    texts: Sequence[str], tokenizer: Tokenizer, tokenizing: Tokenizing, dtype: np.dtype[Any]
) -> _Column:
    if tokenizing.fix_text:
        texts = _repair(texts)
    documents = tokenizer.tokenize_batch(texts)
    if tokenizing.append_eod:
        documents = [[*ids, tokenizer.eod] if ids else ids for ids in documents]  # type: ignore[list-item]
    sizes = np.array([len(ids) for ids in documents], dtype=np.int64)
    try:
        tokens = np.array([token_id for ids in documents for token_id in ids], dtype=dtype)
    except OverflowError as error:
        raise DatasetError(
            f"{tokenizing.tokenizer_type} {tokenizing.vocab_file} gave an id outside its "
            f"vocabulary of {tokenizer.vocab_size}, which {dtype} cannot hold: {error}"
        ) from error
    return _Column(tokens, sizes)


def _repair(texts: Sequence[str]) -> list[str]:
    try:
        import ftfy
    except ImportError as error:
        raise ConfigError("--ftfy needs the package ftfy: `pip install ftfy`") from error
    return [ftfy.fix_text(text) for text in texts]
