"""From YAML files to a :class:`RunConfig`, or to one error that names every problem."""

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.coercion import coerce
from megatron.config.derivations import DERIVATIONS, parallelism_derivation
from megatron.config.draft import Draft, keys_read
from megatron.config.registry import Key, closest, keys, resolve_alias
from megatron.config.run_config import RunConfig, build_run_config
from megatron.config.validate import CHECKS
from megatron.config.yaml_files import Written, normalise, read_config_files

__all__ = ["RunConfig", "load_config", "override", "resolve"]


def load_config(
    paths: Iterable[str | Path],
    overrides: Mapping[str, Any] | None = None,
    *,
    local_slots: Callable[[], int],
    environ: Mapping[str, str] = os.environ,
) -> RunConfig:
    """Read configuration files and work out everything that follows from them.

    Args:
        paths: configuration files; a key may stand in one of them only.
        overrides: values that win over the files.
        local_slots: answers how many devices this machine has; asked only if no key tells.
        environ: environment variables; ``DLTS_HOSTFILE`` names the default host file.

    Raises:
        ConfigError: with all problems found, each with the file it is in.
    """
    written, texts, problems = read_config_files(paths)
    written = override(written, overrides or {}, origin="override")
    return resolve(
        written,
        config_files=texts,
        local_slots=local_slots,
        environ=environ,
        problems=problems,
    )


def override(
    written: Mapping[str, Written], overrides: Mapping[str, Any], *, origin: str
) -> dict[str, Written]:
    """Return ``written`` with ``overrides`` on top; an alias overrides the key it stands for."""
    result = dict(written)
    for spelling, value in overrides.items():
        name = normalise(spelling)
        meant = resolve_alias(name)
        result = {other: item for other, item in result.items() if resolve_alias(other) != meant}
        result[name] = Written(value, origin, spelling)
    return result


def resolve(
    written: Mapping[str, Written],
    *,
    config_files: Mapping[str, str],
    local_slots: Callable[[], int],
    environ: Mapping[str, str] = os.environ,
    problems: Iterable[str] = (),
) -> RunConfig:
    """Check written values, derive the rest, and build the frozen configuration.

    Args:
        written: values by normalised spelling.
        config_files: raw text of the files they came from, kept with checkpoints.
        local_slots: see :func:`load_config`.
        environ: see :func:`load_config`.
        problems: what already went wrong; raised together with what goes wrong here.

    Raises:
        ConfigError: with all problems.
    """
    found = list(problems)
    draft, bad = _draft(written, found)
    if config_files:
        draft = draft.updated({"config_files": dict(config_files)})
    if draft["git_hash"] is None:
        draft = draft.updated({"git_hash": _git_hash(os.getcwd())})
    for derivation in (parallelism_derivation(local_slots, environ), *DERIVATIONS):
        if bad & keys_read(derivation):
            continue
        try:
            draft = draft.updated(derivation(draft))
        except ConfigError as error:
            found += error.problems
            bad |= keys_read(derivation)
    for check in CHECKS:
        if not bad & keys_read(check):
            found += check(draft)
    if found:
        raise ConfigError(*found)
    return build_run_config(draft.values, written=frozenset(draft.written), origins=draft.written)


def _draft(written: Mapping[str, Written], problems: list[str]) -> tuple[Draft, set[str]]:
    """Return defaults with the written values on top, and the keys whose value is no good."""
    table = keys()
    values = {name: entry.default for name, entry in table.items()}
    known: dict[str, Written] = {}
    bad: set[str] = set()
    is_autotuned = bool(written["autotuning"].value) if "autotuning" in written else False
    for spelling, item in written.items():
        name = resolve_alias(spelling)
        if name not in table:
            problems.append(_unknown(item))
            continue
        try:
            value = _checked(item.value, table[name], is_autotuned)
        except ValueError as error:
            problems.append(f"{item.origin}: {item.spelling} {error}")
            bad.add(name)
            continue
        if name in known and values[name] != value:
            first = known[name]
            problems.append(
                f"{item.spelling}={value} ({item.origin}) and {first.spelling}={values[name]} "
                f"({first.origin}) are the same key; keep one"
            )
            bad.add(name)
        known[name] = item
        values[name] = value
    return Draft(values, known), bad


def _checked(value: Any, entry: Key, is_autotuned: bool) -> Any:
    if is_autotuned and value == "auto":
        return value
    value = coerce(value, entry.annotation)
    declared = entry.declaration
    if type(value) in (int, float):
        unit = f" {declared.unit}" if declared.unit else ""
        if declared.minimum is not None and value < declared.minimum:
            raise ValueError(f"must be at least {declared.minimum}{unit}, got {value}")
        if declared.maximum is not None and value > declared.maximum:
            raise ValueError(f"must be at most {declared.maximum}{unit}, got {value}")
    return value


def _unknown(item: Written) -> str:
    suggestion = closest(normalise(item.spelling))
    hint = f"; did you mean {suggestion!r}?" if suggestion else ""
    return f"{item.origin}: unknown key {item.spelling!r}{hint}"


@lru_cache(maxsize=1)
def _git_hash(directory: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "describe", "--always"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
