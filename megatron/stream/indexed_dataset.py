"""Documents of tokens: reading and writing ``P.bin`` with ``P.idx``.

A dataset is named by its prefix ``P``. Its token file may be cut into shards (shard_layout), and
those that nobody reads need not be there. All is memory-mapped when first touched; a document is a
view, not a copy.
"""

import array
import os
import shutil
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream.index_file import IndexFile, dtype_code, read_index, write_index
from megatron.stream.shard_layout import find_shards, lay_out
from megatron.stream.token_bytes import TokenBytes

__all__ = ["IndexedDataset", "IndexedDatasetBuilder", "dataset_exists"]


def dataset_exists(prefix: str | os.PathLike[str]) -> bool:
    """Whether the index and tokens of ``prefix`` are there; one shard of them is enough."""
    prefix = os.fspath(prefix)
    return os.path.exists(prefix + ".idx") and bool(find_shards(prefix))


class IndexedDataset:
    """Read-only sequence of documents, each a one-dimensional array in the storage type.

    Pickles by path, so it may be sent to another process.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        warm_up: read both files through once, so that later reads find them in memory.

    Raises:
        DatasetError: the index is missing or damaged, or the token files don't belong to it. Token
            files that are missing are named when they are read.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, warm_up: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.index = _open_index(self.prefix)
        self.tokens = TokenBytes(lay_out(self.prefix, self.index))
        self._doc_idx = self.index.doc_idx
        if warm_up:
            self.tokens.warm_up()
            TokenBytes.of_files([self.index.path]).warm_up()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Storage type of the tokens."""
        return self.index.dtype

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Tokens of each document."""
        return self.index.sizes

    @property
    def pointers(self) -> NDArray[np.int64]:
        """Byte offset of each document in the token file."""
        return self.index.pointers

    @property
    def doc_idx(self) -> NDArray[np.int64]:
        """The file's document index array; training never uses it."""
        return self._doc_idx

    def get_doc_idx(self) -> NDArray[np.int64]:
        """Return :attr:`doc_idx` (NeoX's spelling)."""
        return self._doc_idx

    def set_doc_idx(self, doc_idx: NDArray[np.int64]) -> None:
        """Replace :attr:`doc_idx` in memory (NeoX's spelling); the file stays."""
        self._doc_idx = doc_idx

    def __len__(self) -> int:
        return len(self.index.sizes)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[NDArray[Any]]: ...

    def __getitem__(
        self, index: int | np.integer[Any] | slice
    ) -> NDArray[Any] | list[NDArray[Any]]:
        """Return one document, or a list of consecutive ones.

        Raises:
            IndexError: no such document.
            ValueError: a slice with a step.
        """
        if not isinstance(index, slice):
            return self.get(index)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"documents can only be sliced in a row, not with step {step}")
        return [self.get(document) for document in range(start, stop)]

    def get(
        self, index: int | np.integer[Any], offset: int = 0, length: int | None = None
    ) -> NDArray[Any]:
        """Return ``length`` tokens of document ``index`` from token ``offset`` on.

        Without ``length``, up to the document's end. As in NeoX nothing is checked against that
        end: reading past it goes on into the next document's tokens.

        Raises:
            DatasetError: the token file is missing.
            IndexError: no such document.
            ValueError: the tokens would leave the file.
        """
        document = _document_number(index, len(self))
        if length is None:
            length = int(self.sizes[document]) - offset
        start = int(self.pointers[document]) + offset * self.dtype.itemsize
        content = self.tokens.read(start, start + length * self.dtype.itemsize)
        return np.frombuffer(content, dtype=self.dtype)

    @staticmethod
    def exists(prefix: str | os.PathLike[str]) -> bool:
        """Whether both files of ``prefix`` are there."""
        return dataset_exists(prefix)

    def __getstate__(self) -> str:
        return self.prefix

    def __setstate__(self, prefix: str) -> None:
        IndexedDataset.__init__(self, prefix)

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}, {len(self)} documents of {self.dtype})"


class IndexedDatasetBuilder:
    """Writes a dataset document by document; it exists once :meth:`finalize` has run.

    Example:
        >>> builder = IndexedDatasetBuilder("/tmp/numbers.bin", np.uint16)
        >>> builder.add_item(np.array([1, 2, 3], dtype=np.uint16))
        >>> builder.end_document()
        >>> builder.finalize("/tmp/numbers.idx")
        >>> IndexedDataset("/tmp/numbers")[0]
        array([1, 2, 3], dtype=uint16)
    """

    def __init__(
        self, bin_path: str | os.PathLike[str], dtype: np.typing.DTypeLike = np.int32
    ) -> None:
        self.dtype = np.dtype(dtype)
        dtype_code(self.dtype)
        self._path = Path(bin_path)
        self._file = open(self._path, "wb")  # noqa: SIM115 - closed by finalize
        self._sizes = array.array("i")
        self._doc_idx = array.array("q", [0])

    def add_item(self, tokens: NDArray[Any]) -> None:
        """Append one document's tokens.

        Raises:
            TypeError: they are not of the dataset's type.
        """
        tokens = np.asarray(tokens)
        if tokens.dtype != self.dtype:
            raise TypeError(f"{self._path} holds {self.dtype}, got tokens of {tokens.dtype}")
        self._file.write(np.ascontiguousarray(tokens).data)
        self._sizes.append(tokens.size)

    def end_document(self) -> None:
        """Say in ``doc_idx`` that a document ends here."""
        self._doc_idx.append(len(self._sizes))

    def merge_file_(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of another dataset; ``doc_idx`` is left alone, as in NeoX.

        Raises:
            DatasetError: the other dataset cannot be read, or has another type.
        """
        other = IndexedDataset(prefix)
        other.tokens.require_all()
        if other.dtype != self.dtype:
            raise DatasetError(
                f"{other.prefix} holds {other.dtype} and cannot be merged into {self._path} "
                f"of {self.dtype}; tokenize both with the same vocabulary size"
            )
        self._sizes.frombytes(other.sizes.tobytes())
        for shard in other.tokens.shards:
            with open(shard.path, "rb") as file:
                shutil.copyfileobj(file, self._file, 16 << 20)

    def finalize(self, idx_path: str | os.PathLike[str]) -> None:
        """Close the token file and write the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else _NO_SIZES
        write_index(Path(idx_path), self.dtype, sizes, self._doc_idx)


_NO_SIZES = np.zeros(0, dtype=np.int32)


def _document_number(index: int | np.integer[Any], num_documents: int) -> int:
    document = int(index)
    if document < 0:
        document += num_documents
    if not 0 <= document < num_documents:
        raise IndexError(f"document {index} of {num_documents}")
    return document


def _open_index(prefix: str) -> IndexFile:
    path = Path(prefix + ".idx")
    if path.exists():
        return read_index(path)
    missing = [str(path)]
    if not find_shards(prefix):
        missing.append(prefix + ".bin")
    names = " and ".join(missing)
    verb = "does" if len(missing) == 1 else "do"
    raise DatasetError(
        f"dataset {prefix}: {names} {verb} not exist; a dataset is named by its path "
        "without .bin and .idx"
    )
