"""What a check found, how sure it is, and what follows for the exit status."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["CANNOT_TELL", "GOOD", "WRONG", "Finding", "exit_status"]

GOOD, WRONG, CANNOT_TELL = 0, 1, 2

Kind = Literal["wrong", "unknown", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence.

    ``wrong`` is proven from content, ``unknown`` could not be checked, ``warning`` is a report or
    something odd that proves nothing, ``note`` is good to know.
    """

    kind: Kind
    text: str
    source: str = ""

    def __str__(self) -> str:
        source = f" [{self.source}]" if self.source else ""
        return f"{self.kind}: {self.text}{source}"


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 1 if something is proven wrong, else 2 if something could not be checked, else 0."""
    kinds = {finding.kind for finding in findings}
    if "wrong" in kinds:
        return WRONG
    return CANNOT_TELL if "unknown" in kinds else GOOD
