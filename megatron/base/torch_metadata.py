"""The plain values in a torch file, read without torch and without running anything it names.

``torch.save`` writes a zip archive whose ``data.pkl`` is a pickle; tensors' bytes are other
members, which are not touched. Every class a pickle names but a few harmless ones becomes an inert
placeholder, so a file from the internet can do nothing here.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError

__all__ = ["Placeholder", "read_torch_metadata"]

_HARMLESS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("torch", "Size"): tuple,
}


class Placeholder:
    """Stands for an object that can't be read without its class, such as a tensor."""

    def __init__(self, *_values: object, **_named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None:
        """Take what a pickle adds to a list."""

    def extend(self, items: object) -> None:
        """Take what a pickle adds to a list."""


def read_torch_metadata(path: Path) -> dict[str, Any]:
    """Return the dictionary in a torch file; tensors and unknown objects are placeholders.

    Raises:
        CheckpointError: the file is missing, damaged, holds no dictionary, or was written by a
            torch older than 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((one for one in archive.namelist() if one.endswith("/data.pkl")), None)
            if name is None:
                raise CheckpointError(f"{path} is no torch file: it holds no data.pkl")
            content = _Reader(io.BytesIO(archive.read(name))).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is damaged, or was written by a torch older than 1.6: {error}"
        ) from error
    except (
        OSError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        EOFError,
    ) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return content


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _HARMLESS.get((module, name), Placeholder)

    def persistent_load(self, pid: Any) -> Any:
        return Placeholder()
