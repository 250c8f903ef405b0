"""A configuration while it is being worked out: values, and where each came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron.config.yaml_files import Written

__all__ = ["Draft", "keys_read", "reads"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Draft:
    """Every key's value so far. Derivations read it and return what they add; none writes to it."""

    values: Mapping[str, Any]
    written: Mapping[str, Written]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def updated(self, changes: Mapping[str, Any]) -> "Draft":
        """Return a draft with ``changes`` on top."""
        return Draft({**self.values, **changes}, self.written)

    def say(self, name: str) -> str:
        """Return ``name=value (where it was written)`` for a message."""
        return f"{name}={self.values[name]} ({self.origin(name)})"

    def origin(self, name: str) -> str:
        """Return the file a key was written in, or that it has its default."""
        written = self.written.get(name)
        return written.origin if written is not None else "default"


def reads(*names: str) -> Callable[[Function], Function]:
    """Mark a derivation or check with the keys it reads, so that it is left out if one is bad."""

    def mark(function: Function) -> Function:
        function.__dict__["reads"] = frozenset(names)
        return function

    return mark


def keys_read(function: Callable[..., Any]) -> frozenset[str]:
    """Return the keys a derivation or check was marked with."""
    names: frozenset[str] = function.__dict__["reads"]
    return names
