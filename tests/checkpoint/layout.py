"""Checkpoint files as ``path -> kind``, from files and from the recorded listings of NeoX's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.safe_torch import read_torch_file

Layout = dict[tuple[str, ...], str]

_LINE = re.compile(r"(?P<indent> *)(?P<key>'[^']*'|\[\d+\]|\d+|[^\s:'\[]+\.pt): (?P<kind>.+)")
_CONTAINERS = {"dict", "collections.OrderedDict", "list", "tuple", "set"}


def recorded_layout(listing: Path) -> Layout:
    """Parse one of ``tests/data/checkpoint/layout``."""
    layout: Layout = {}
    path: list[str] = []
    for line in listing.read_text().splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        assert match, line
        depth = len(match["indent"]) // 2
        path[depth:] = [match["key"].strip("'[]")]
        layout[tuple(path)] = _recorded_kind(match["kind"])
    return layout


def written_layout(directory: Path) -> Layout:
    """Describe every torch file of a checkpoint directory."""
    layout: Layout = {}
    for file in sorted(directory.glob("*.pt")):
        _describe((file.name,), read_torch_file(file), layout)
    return layout


def _recorded_kind(text: str) -> str:
    words = text.split(" ")
    kind = words[0]
    if kind == "ndarray" or kind == "Tensor":
        return text
    if kind == "torch.Size":
        return " ".join(words[1:])
    return kind


def _describe(path: tuple[str, ...], value: Any, layout: Layout) -> None:
    layout[path] = _kind(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            _describe((*path, str(key)), item, layout)
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        # The recorded listings open a list only if it holds more than plain numbers.
        for index, item in enumerate(value[:8]):
            _describe((*path, str(index)), item, layout)


def _kind(value: Any) -> str:
    if torch.is_tensor(value):
        return f"Tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"ndarray {value.dtype} {list(value.shape)}"
    if isinstance(value, torch.Size):
        return f"torch.Size({list(value)})"
    kind = type(value)
    if kind.__module__ == "builtins":
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"
