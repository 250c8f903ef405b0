"""The flat table of all keys: name or alias → group, type, default and declaration."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, get_type_hints

from megatron.config.declare import KeyDeclaration
from megatron.config.groups import GROUPS

__all__ = ["Key", "build_table", "closest", "keys", "resolve_alias"]


@dataclass(frozen=True)
class Key:
    """One key as declared in its group."""

    name: str
    group: str  # attribute of RunConfig
    annotation: Any
    default: Any
    declaration: KeyDeclaration

    @property
    def is_ours(self) -> bool:
        """Whether NeoX doesn't know the key."""
        return self.group == "ledger"

    @property
    def is_legacy(self) -> bool:
        """Whether only NeoX v1.0 knows the key."""
        return self.group == "legacy"


def build_table(groups: Mapping[str, type]) -> tuple[dict[str, Key], dict[str, str]]:
    """Return the keys by name and the aliases by spelling.

    Raises:
        ValueError: two keys or aliases have one name, or a mirror is not a key.
    """
    table: dict[str, Key] = {}
    aliases: dict[str, str] = {}
    for group, declared in groups.items():
        hints = get_type_hints(declared)
        for item in fields(declared):
            if item.name in table:
                raise ValueError(f"{item.name} is declared in {table[item.name].group} and {group}")
            default = (
                item.default_factory() if item.default_factory is not MISSING else item.default
            )
            declaration = item.metadata["declaration"]
            table[item.name] = Key(item.name, group, hints[item.name], default, declaration)
    for entry in table.values():
        for alias in entry.declaration.aliases:
            if alias in table or alias in aliases:
                raise ValueError(f"alias {alias} of {entry.name} is taken")
            aliases[alias] = entry.name
        for mirror in entry.declaration.mirrors:
            if mirror not in table:
                raise ValueError(f"{mirror}, a mirror of {entry.name}, is not a key")
    return table, aliases


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, Key], dict[str, str]]:
    return build_table(GROUPS)


def keys() -> Mapping[str, Key]:
    """Return every key by name."""
    return _tables()[0]


def resolve_alias(name: str) -> str:
    """Return the key that ``name`` is another spelling of, or ``name``."""
    return _tables()[1].get(name, name)


def closest(name: str, among: Iterable[str] | None = None) -> str | None:
    """Return the known key most like ``name``, if any comes near."""
    known = list(among) if among is not None else [*keys(), *_tables()[1]]
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None
