"""Check that the installed ``apex`` is NVIDIA's, not the unrelated project of that name on PyPI.

Exit status 0: it is. 1: it is another one, or apex isn't installed.
"""

import importlib.metadata
import sys

NVIDIA_FILE = "apex/optimizers/fused_adam.py"


def complaint() -> str | None:
    """Return what is wrong with the installed apex, or None."""
    try:
        files = importlib.metadata.files("apex") or []
    except importlib.metadata.PackageNotFoundError:
        return "apex is not installed; NVIDIA's is built by `make setup-apex`"
    if any(str(file) == NVIDIA_FILE for file in files):
        return None
    version = importlib.metadata.version("apex")
    return (
        f"the installed apex {version} has no {NVIDIA_FILE}: it is the unrelated project of that "
        "name on PyPI, not NVIDIA's; `pip uninstall apex`, then `make setup-apex`"
    )


if __name__ == "__main__":
    if problem := complaint():
        sys.exit(f"check_apex: {problem}")
