"""What a torch file holds besides the values of its tensors, read without torch.

``torch.save`` writes a zip archive whose part ``data.pkl`` is a pickle; the bytes of tensors are
other parts, ``data/0`` and so on. Before version 1.6 it wrote several pickles, one after the other,
and then the bytes. Both are read here as data (see ``data_pickle``), whatever they claim to be: a
file that may come from the internet is looked at here first, also when torch reads it afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from megatron.base.data_pickle import (
    LIMIT_BYTES,
    ForbiddenNameError,
    Storage,
    StoredArray,
    StoredObject,
    StoredTensor,
    read_data_pickle,
)
from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.base.regular_files import open_regular
from megatron.base.zip_parts import ZIP_MAGIC, Part, checksum_matches, read_part, read_parts

__all__ = [
    "StoredArray",
    "StoredObject",
    "StoredTensor",
    "TorchFile",
    "inspect_torch_file",
    "read_torch_metadata",
    "require_checksums",
]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") + b"."
_LEGACY_PROTOCOL = 1001
_NUM_LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages


@dataclass(frozen=True)
class TorchFile:
    """A torch file whose content is data."""

    path: Path
    content: Any  # tensors, arrays and DeepSpeed's objects are stand-ins
    storages: Mapping[str, Storage]  # by key
    starts: Mapping[str, int]  # of each storage's bytes in the file, by key
    parts: Mapping[str, Part] | None  # None: written before torch 1.6

    @property
    def is_zip(self) -> bool:
        """Whether its tensors can be mapped, and have checksums."""
        return self.parts is not None


def read_torch_metadata(path: Path) -> dict[str, Any]:
    """Return the dictionary in a torch file; tensors and objects are stand-ins.

    Raises:
        CheckpointError: the file is missing or damaged, names what checkpoints don't need, or
            holds no dictionary.
    """
    content = inspect_torch_file(path).content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return content


def inspect_torch_file(path: Path) -> TorchFile:
    """Return what a torch file holds besides the values of its tensors, which are not read.

    Raises:
        CheckpointError: the file is missing or damaged, or names what checkpoints don't need.
    """
    with open_regular(path) as file:
        try:
            start = file.read(len(_LEGACY_START))
            if start.startswith(ZIP_MAGIC):
                return _zip_content(path, file)
            if start == _LEGACY_START:
                return _legacy_content(path, file)
        except ForbiddenNameError as error:
            raise CheckpointError(
                f"{path} is refused: {printable(str(error))}, which no checkpoint needs and which "
                "may run code. Nothing was run. Get the file from a source you trust"
            ) from error
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} ({_size(file)} bytes) cannot be read; it is truncated, damaged, or not a "
                f"checkpoint file: {printable(str(error))}"
            ) from error
        raise CheckpointError(
            f"{path} ({_size(file)} bytes) cannot be read; it is truncated, damaged, or not a "
            "checkpoint file: it begins like none of torch's"
        )


def require_checksums(file: TorchFile) -> None:
    """Read every part of a file and compare its checksum; a file of an old torch has none.

    Raises:
        CheckpointError: one doesn't match.
    """
    if file.parts is None:
        return
    with open_regular(file.path) as opened:
        for part in file.parts.values():
            if not checksum_matches(opened, part):
                raise CheckpointError(
                    f"{file.path} ({_size(opened)} bytes) cannot be read; it is damaged: the "
                    f"checksum of its part {part.name} does not match"
                )


def _size(file: BufferedReader) -> int:
    return file.seek(0, 2)


def _zip_content(path: Path, file: BufferedReader) -> TorchFile:
    parts = read_parts(file)
    folders = [name.removesuffix("/data.pkl") for name in parts if name.endswith("/data.pkl")]
    if len(folders) != 1 or "/" in folders[0]:
        raise ValueError("it is no archive of torch's: it does not hold one data.pkl")
    folder = folders[0]
    if f"{folder}/constants.pkl" in parts or any(
        name.startswith(f"{folder}/code/") for name in parts
    ):
        raise ForbiddenNameError("it is a TorchScript program")
    pickled = read_part(file, parts[f"{folder}/data.pkl"], limit_bytes=LIMIT_BYTES)
    storages: dict[str, Storage] = {}
    stream = BytesIO(pickled)
    content = read_data_pickle(stream, storages)
    if stream.read(1):
        raise ValueError("something follows its pickle")
    starts: dict[str, int] = {}
    for storage in storages.values():
        part = parts.get(f"{folder}/data/{storage.key}")
        if part is None:
            raise ValueError(f"the bytes of its storage {storage.key[:100]!r} are missing")
        if part.size != storage.size_bytes:
            raise ValueError(
                f"part {part.name} has {part.size} bytes where {storage.numel} of "
                f"{storage.dtype} need {storage.size_bytes}"
            )
        starts[storage.key] = part.start
    return TorchFile(path, content, storages, starts, parts)


def _legacy_content(path: Path, file: BufferedReader) -> TorchFile:
    file.seek(0)
    stream = BytesIO(file.read(LIMIT_BYTES))
    storages: dict[str, Storage] = {}
    magic, version, system, content, keys = (
        read_data_pickle(stream, storages) for _ in range(_NUM_LEGACY_PICKLES)
    )
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not isinstance(system, dict):
        raise ValueError("its version is not known")
    if system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    starts: dict[str, int] = {}
    end = stream.tell()
    for key in keys:
        starts[key] = end + 8  # behind the number of its elements
        end = starts[key] + storages[key].size_bytes
    if _size(file) != end:
        raise ValueError(f"its tensors need {end} bytes in all")
    return TorchFile(path, content, storages, starts, None)
