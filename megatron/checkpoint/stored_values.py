"""The values in a checkpoint's torch files: are all of them numbers?"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.safe_torch import read_torch_file

__all__ = ["named_tensors", "value_problems"]

_CHUNK = 1 << 22  # elements looked at at once: memory is bounded whatever the tensor's size


def value_problems(checkpoint: Path, names: Iterable[str]) -> list[str]:
    """Return the tensors that hold NaN or infinity; each problem names its file first.

    The bytes of the files are taken as they are: compare them with their digests or checksums
    before. One file is open at a time, mapped.

    Args:
        checkpoint: a ``global_stepN``.
        names: of its torch files.
    """
    problems = []
    for name in names:
        try:
            content = read_torch_file(checkpoint / name, is_verified=True)
        except CheckpointError as error:
            problems.append(str(error).replace(f"{checkpoint}/", "", 1))
            continue
        for path, tensor in named_tensors(content):
            if tensor.is_floating_point() and (found := _not_numbers(tensor)):
                problems.append(f"{name}: {path} holds {found}")
    return problems


def named_tensors(content: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested containers, with the keys that lead to it joined by dots."""
    if isinstance(content, torch.Tensor):
        yield path, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from named_tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from named_tensors(value, f"{path}.{index}" if path else str(index))


def _not_numbers(tensor: torch.Tensor) -> str | None:
    nans = infinities = 0
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        if not torch.isfinite(chunk).all():
            nans += int(torch.isnan(chunk).sum())
            infinities += int(torch.isinf(chunk).sum())
    found = [f"{nans} NaN"] * bool(nans)
    found += [f"{infinities} infinities" if infinities > 1 else "1 infinity"] * bool(infinities)
    return " and ".join(found) or None
