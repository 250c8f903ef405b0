"""``<save>/run.json``: which run a directory holds. Attempts and requeues are the same run."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import RunDirectoryError
from megatron.ledger.ledger_file import FORMAT, Parent, parent_from_json

__all__ = ["RUN_FILE", "RunFile", "config_hash", "new_run", "read_run_file", "write_run_file"]

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What stays the same over all attempts of a run."""

    run_id: str
    created: float  # seconds since the epoch
    config_hash: str  # of the configuration it was first launched with
    wandb_run_id: str | None = None
    parent: Parent | None = None  # the run it branched off, or was finetuned from


def new_run(config: Mapping[str, Any], *, now: float, parent: Parent | None = None) -> RunFile:
    """Return a run with an id of its own; it is not written yet."""
    return RunFile(
        run_id=uuid.uuid4().hex, created=now, config_hash=config_hash(config), parent=parent
    )


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that name a resolved configuration."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_run_file(save: Path) -> RunFile | None:
    """Return the run that ``save`` holds; None if it holds none that kept a ledger.

    Raises:
        RunDirectoryError: the file was damaged, or written by a newer release.
    """
    path = save / RUN_FILE
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise RunDirectoryError(
                f"{path}: format {values['format']} is not known; this release reads {FORMAT}"
            )
        return RunFile(
            run_id=values["run_id"],
            created=values["created"],
            config_hash=values["config_hash"],
            wandb_run_id=values["wandb_run_id"],
            parent=parent_from_json(values["parent"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} does not say which run this is ({type(error).__name__}: {error}); it was "
            "damaged or edited"
        ) from error


def write_run_file(save: Path, run: RunFile) -> None:
    """Write ``run.json``, durably."""
    write_atomically(
        save / RUN_FILE, json.dumps({"format": FORMAT, **asdict(run)}, indent=1) + "\n"
    )
