"""Reading configuration files: NeoX's YAML, with the mistakes found that PyYAML lets pass.

The files are what NeoX's users write: JSON with comments and trailing commas, plain YAML 1.1, or
JSON. Hyphens in key names are underscores. A key may stand once, in one file.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Written", "normalise", "read_config_files"]


@dataclass(frozen=True)
class Written:
    """A value as the user gave it."""

    value: Any
    origin: str  # file name, or where else it came from
    spelling: str  # the key as written there


def normalise(spelling: str) -> str:
    """Return a key's name: underscores for hyphens."""
    return spelling.replace("-", "_")


def read_config_files(
    paths: Iterable[str | Path],
) -> tuple[dict[str, Written], dict[str, str], list[str]]:
    """Read and merge configuration files.

    Returns:
        The values by normalised key, the raw text by file name, and one message per problem: a file
        that can't be read or parsed, two files of one name, a key that stands twice.
    """
    written: dict[str, Written] = {}
    texts: dict[str, str] = {}
    problems: list[str] = []
    for path in map(Path, paths):
        name = path.name
        if name in texts:
            problems.append(
                f"two configuration files are called {name}; checkpoints keep them by name, "
                "so rename one"
            )
            continue
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"{path}: cannot be read: {reason}")
            continue
        pairs, mistakes = _parse(texts[name], name)
        problems += mistakes
        problems += _merge(pairs, name, written)
    return written, texts, problems


def _merge(pairs: list[tuple[Any, Any]], file: str, written: dict[str, Written]) -> list[str]:
    problems = []
    for spelling, value in pairs:
        if not isinstance(spelling, str):
            problems.append(f"{file}: {spelling!r} is not a key name")
            continue
        name = normalise(spelling)
        earlier = written.get(name)
        if earlier is None:
            written[name] = Written(value, file, spelling)
        elif earlier.origin == file:
            problems.append(
                f"{file}: {_both(spelling, earlier.spelling)} stands twice; keep one of them"
            )
        else:
            problems.append(
                f"{_both(spelling, earlier.spelling)} stands in {earlier.origin} and again in "
                f"{file}; keep one of them"
            )
    return problems


def _both(spelling: str, earlier: str) -> str:
    return f"{spelling!r}" if spelling == earlier else f"{spelling!r} (also spelled {earlier!r})"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reports a key standing twice in a nested mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, Hashable):
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} stands twice in one block", key_node.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(text: str, file: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Return the top-level pairs in order, repeats included."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return [], []
        if not isinstance(node, yaml.MappingNode):
            return [], [f"{file}: the file must be a mapping of keys to values"]
        loader.flatten_mapping(node)
        pairs = [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True))
            for key, value in node.value
        ]
        return pairs, []
    except yaml.YAMLError as error:
        return [], [f"{file}: {_where(error)}"]
    finally:
        loader.dispose()


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    if mark is None:
        return f"not valid YAML: {problem}"
    return f"not valid YAML at line {mark.line + 1}, column {mark.column + 1}: {problem}"
