"""What real NeoX wrote and read (tests/data/stream/README.md), and small datasets of our own."""

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.stream.indexed_dataset import IndexedDatasetBuilder

DATA = Path(__file__).parents[1] / "data" / "stream"
GOLDEN: dict[str, Any] = json.loads((DATA / "golden" / "data_golden.json").read_text())
BATCHES: dict[str, Any] = json.loads((DATA / "oracle" / "batches.json").read_text())


def copy_datasets(folder: Path, target: Path) -> None:
    """Copy the token and index files of ``folder`` (not its index maps)."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".bin", ".idx"):
            shutil.copy(path, target)


def write_dataset(prefix: Path, documents: Iterable[Sequence[int]], dtype: Any = np.uint16) -> str:
    """Write a dataset and return its prefix as text."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_item(np.array(document, dtype=dtype))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def digest(tokens: NDArray[Any]) -> str:
    """Return the digest that the recordings hold of a micro batch."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()


def load_megatron_core_helpers() -> ModuleType:
    """Load megatron-core's dataset helpers by path: importing the package takes seconds."""
    files = importlib.metadata.distribution("megatron-core").files or []
    path = next(
        file.locate()
        for file in files
        if file.name.startswith("helpers_cpp") and file.suffix == ".so"
    )
    loader = importlib.machinery.ExtensionFileLoader("helpers_cpp", str(path))
    spec = importlib.util.spec_from_file_location("helpers_cpp", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
