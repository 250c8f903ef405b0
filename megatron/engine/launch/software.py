"""What a node runs: versions that have to be the same on all nodes, read without importing them."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

__all__ = ["differences", "digest_of_file", "installed_software"]

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "transformers")
_SOURCE = Path(__file__).parents[2]  # megatron/
_CODE = "neox-ledger's code"


def installed_software() -> dict[str, str]:
    """Return what is installed here: a version by name; of our own code a digest."""
    versions = {"python": platform.python_version(), _CODE: _digest_of_source(_SOURCE)}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return one text per difference: its name, the other's value, our own."""
    return [
        f"{name} {theirs.get(name, 'unknown')} instead of {version}"
        for name, version in ours.items()
        if theirs.get(name) != version
    ]


def digest_of_file(path: str | Path) -> str | None:
    """Return a short digest of a file's content; None if it can't be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError:
        return None


def _digest_of_source(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
