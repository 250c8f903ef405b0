"""Ways to damage one file of a checkpoint, and what is said of each."""

import ctypes
import os
import platform
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron.base.file_digests import digest_file
from megatron.ledger.manifest import StoredFile, read_manifest, write_manifest

__all__ = [
    "DAMAGES",
    "Damage",
    "Surroundings",
    "files_by_kind",
    "flip_a_bit",
    "obey_permissions",
    "reseal",
]

Damage = Callable[[Path, "Surroundings"], str | None]
"""Damages a file; returns a pattern of what is said of it, None if it can't be done to this one."""


class Surroundings:
    """Where a file to damage lies."""

    def __init__(self, checkpoint: Path, other_step: Path, chance: random.Random) -> None:
        self.checkpoint = checkpoint
        self.other_step = other_step
        self.chance = chance

    def sibling(self, path: Path) -> Path | None:
        """Return the same file of another rank, with other content."""
        name = path.relative_to(self.checkpoint).as_posix()
        kinds = files_by_kind(self.checkpoint)
        alike = next(names for names in kinds.values() if name in names)
        others = [self.checkpoint / other for other in alike if other != name]
        others = [one for one in others if one.read_bytes() != path.read_bytes()]
        return self.chance.choice(others) if others else None


def files_by_kind(checkpoint: Path) -> dict[str, list[str]]:
    """Return the names of a checkpoint's files, those alike together."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            name = path.relative_to(checkpoint).as_posix()
            kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    return kinds


def flip_a_bit(path: Path, around: Surroundings) -> str:
    content = bytearray(path.read_bytes())
    position = around.chance.randrange(len(content))
    content[position] ^= 1 << around.chance.randrange(8)
    path.write_bytes(content)
    return {
        "manifest.json": "is not a manifest|checksum doesn't fit|is not known|is not UTF-8 text",
        "ledger.json": "ledger.json",  # read before its digest is looked at
    }.get(path.name, "holds other bytes than were written")


def truncate(path: Path, around: Surroundings) -> str:
    os.truncate(path, around.chance.randrange(1, path.stat().st_size))
    return _unless_it_says_what_is_complete(path, r"has \d+ bytes instead of \d+")


def empty(path: Path, around: Surroundings) -> str:
    os.truncate(path, 0)
    return _unless_it_says_what_is_complete(path, r"has 0 bytes instead of \d+")


def delete(path: Path, around: Surroundings) -> str:
    path.unlink()
    return "is missing"


def take_from_another_step(path: Path, around: Surroundings) -> str | None:
    other = around.other_step / path.relative_to(around.checkpoint)
    if other.read_bytes() == path.read_bytes():
        return None
    shutil.copyfile(other, path)
    if path.name in ("manifest.json", "ledger.json"):
        return f"that of step|has \\d+ bytes instead|{path.name}"
    return r"holds other bytes than were written|has \d+ bytes instead of \d+"


def swap_with_another_rank(path: Path, around: Surroundings) -> str | None:
    other = around.sibling(path)
    if other is None:
        return None
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return r"holds other bytes than were written|has \d+ bytes instead of \d+"


def forbid(path: Path, around: Surroundings) -> str:
    path.chmod(0)
    return "Permission denied"


def turn_into_a_link(path: Path, around: Surroundings) -> str:
    path.rename(path.with_name(".elsewhere"))
    path.symlink_to(".elsewhere")
    return "symbolic link|cannot be read|is a link"


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip_a_bit,
    "truncated": truncate,
    "empty": empty,
    "deleted": delete,
    "of another step": take_from_another_step,
    "of another rank": swap_with_another_rank,
    "without permission": forbid,
    "a link": turn_into_a_link,
}


def reseal(checkpoint: Path) -> None:
    """Make the manifest say what the files are now: damage that nothing but a look inside finds."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    files = {
        name: StoredFile((checkpoint / name).stat().st_size, digest_file(checkpoint / name))
        for name in manifest.files
    }
    write_manifest(checkpoint, replace(manifest, files=files))


def obey_permissions() -> None:
    """Let this process, if it is root's, be denied what the modes of files deny.

    It gives up the capabilities to read and write against them; everything else stays root's.
    """
    if os.geteuid() != 0:
        return
    numbers = {"x86_64": (125, 126), "aarch64": (90, 91)}[platform.machine()]  # capget, capset
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    # effective, permitted, inheritable; twice 32 capabilities
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(numbers[0], header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.syscall(numbers[1], header, sets) == 0, os.strerror(ctypes.get_errno())


def _unless_it_says_what_is_complete(path: Path, pattern: str) -> str:
    """What is wrong with a manifest or ledger is found by reading it."""
    return {"manifest.json": "is not a manifest", "ledger.json": f"is not a ledger|{pattern}"}.get(
        path.name, pattern
    )
