"""What a conversion has written."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Converted"]


@dataclass(frozen=True)
class Converted:
    """A model in another form."""

    path: Path
    num_files: int
    num_bytes: int
    notices: tuple[str, ...]  # what a user should know
