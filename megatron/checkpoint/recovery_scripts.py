"""DeepSpeed's scripts that gather ZeRO's pieces, which it leaves in every save directory."""

import os
from pathlib import Path

import deepspeed

__all__ = ["place_recovery_scripts"]

_NAMES = ("zero_to_fp32.py", "zero_to_torch.py")


def place_recovery_scripts(save: Path, scratch: Path) -> None:
    """Put the scripts into ``save``, unless the very same are there.

    Args:
        save: the save directory.
        scratch: a directory on the same file system for files that aren't complete yet.

    Raises:
        OSError: they cannot be written.
    """
    for name in _NAMES:
        source = Path(deepspeed.__file__).parent / "utils" / name
        content = source.read_bytes()
        target = save / name
        if target.is_file() and target.read_bytes() == content:
            continue
        prepared = scratch / f".{name}"
        prepared.write_bytes(content)
        prepared.chmod(prepared.stat().st_mode | 0o100)  # its owner may run it
        os.replace(prepared, target)
