"""The file that lets node agents in: the job's token, and secrets that ranks need.

It lies in the working directory, which every node sees, and only the user may read it. It is there
from before the agents start until all have come. Nothing secret stands in a command line, which
every user of a machine can read.
"""

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import LaunchError

__all__ = ["TOKEN_VARIABLE", "JobSecrets", "read_job_file", "write_job_file"]

TOKEN_VARIABLE = "NEOX_JOB_TOKEN"
_SECRET_VARIABLES = ("WANDB_API_KEY", "COMET_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class JobSecrets:
    """What only the user's own processes may know."""

    token: str
    environment: dict[str, str]  # variables for the ranks

    @classmethod
    def new(cls, environ: Mapping[str, str]) -> "JobSecrets":
        """Return a new job's token and the secrets of ``environ``."""
        kept = {name: environ[name] for name in _SECRET_VARIABLES if environ.get(name)}
        return cls(secrets.token_hex(16), kept)

    def as_bytes(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"token": self.token, "environment": self.environment}).encode()


def write_job_file(job: JobSecrets, directory: str | Path) -> Path:
    """Write a new file into ``directory``, for the user alone, and return its path."""
    try:
        handle, path = tempfile.mkstemp(prefix=".neox-job-", dir=directory)  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(job.as_bytes())
            file.flush()
            os.fsync(file.fileno())  # so that other nodes see it
    except OSError as error:
        raise LaunchError(
            f"a file for the node agents can't be written to the working directory: {error}"
        ) from error
    return Path(path).absolute()


def read_job_file(path: str | Path | None, environ: Mapping[str, str]) -> JobSecrets:
    """Return the job's secrets from its file or, where it isn't seen, from the environment.

    Raises:
        LaunchError: neither has the token.
    """
    reason = "no file was named"
    if path is not None:
        try:
            content = json.loads(Path(path).read_bytes())
            return JobSecrets(content["token"], content["environment"])
        except (OSError, ValueError, KeyError) as error:
            reason = f"{path}: {error}"
    if token := environ.get(TOKEN_VARIABLE):
        return JobSecrets(token, {})
    raise LaunchError(
        f"the job's token can't be read ({reason}); start from a directory that all nodes share"
    )
