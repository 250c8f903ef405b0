"""Models that are named as on the hub, where the machine is online or has them in its cache."""

import importlib
import os
import re
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError

__all__ = ["local_directory"]

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.yml")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # of a repository with several, the first


def local_directory(source: str, revision: str | None = None) -> Path:
    """Return ``source`` if it is a directory, else the cached or downloaded model of that name.

    Args:
        source: a directory, or a name such as ``EleutherAI/pythia-160m``.
        revision: of the hub's model: a branch such as ``step3000``, a tag or a commit.

    Raises:
        CheckpointError: it is neither a directory nor a name, or the hub doesn't give it.
        ConfigError: a revision of a directory is asked for, or huggingface_hub isn't installed.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ConfigError(f"{source} is a directory, which has no revision {revision}")
        return path
    if _NAME.fullmatch(source) is None:
        raise CheckpointError(f"{source} is neither a directory nor a model's name on the hub")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"{source} is no directory, and to download it huggingface_hub is needed: "
            "pip install huggingface_hub"
        ) from error
    try:
        for weights in _WEIGHTS:
            folder = Path(_download(hub, source, revision, weights))
            if any(folder.glob(weights)):
                break
    except (OSError, ValueError) as error:  # the library's errors are all of these
        branch = "" if revision is None else f" at {revision}"
        raise CheckpointError(
            f"{source}{branch} is no directory here, and the hub doesn't give it: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    return folder


def _download(hub: object, name: str, revision: str | None, weights: str) -> str:
    return os.fspath(
        hub.snapshot_download(  # type: ignore[attr-defined]
            name, revision=revision, allow_patterns=[*_DESCRIPTION, weights]
        )
    )
