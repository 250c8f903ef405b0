"""The parts of a zip archive that ``torch.save`` wrote, and of no other kind of zip archive.

torch stores parts as they are, one after the other, and writes the directory of them at the very
end. Whatever else the zip format allows is refused, because readers disagree about it or because a
small file can claim to be a large one: compression, encryption, comments, several disks, parts of
one name, parts that overlap, something before the first one.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

__all__ = ["ZIP_MAGIC", "Part", "checksum_matches", "read_part", "read_parts"]

ZIP_MAGIC = b"PK\x03\x04"

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1
_LIMIT_BYTES = 16 << 20  # of the directory: more than 100,000 parts
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One stored part."""

    name: str
    start: int  # of its bytes in the file
    size: int
    checksum: int  # CRC-32


def read_parts(file: BufferedReader) -> dict[str, Part]:
    """Return the parts of an archive by name, in the order in which they lie in the file.

    Raises:
        ValueError: the archive is truncated, damaged, or not one that torch writes.
    """
    size = os.fstat(file.fileno()).st_size
    count, directory_start, directory_size = _directory(file, size)
    if directory_size > _LIMIT_BYTES:
        raise ValueError(f"the archive's directory claims {directory_size} bytes")
    directory = _read(file, directory_start, directory_size)
    parts: dict[str, Part] = {}
    for name, header, part_size, checksum in _entries(directory, count):
        if name in parts:
            raise ValueError(f"the archive holds two parts called {name[:100]!r}")
        parts[name] = Part(name, _data_start(file, header, name), part_size, checksum)
    in_place = sorted(parts.values(), key=lambda part: (part.start, part.size))
    end = 0
    for part in in_place:
        if part.start < end:
            raise ValueError(f"part {part.name[:100]!r} lies over another")
        end = part.start + part.size
    if end > directory_start:
        raise ValueError("a part is longer than the archive")
    return {part.name: part for part in in_place}


def read_part(file: BufferedReader, part: Part, *, limit_bytes: int) -> bytes:
    """Return the bytes of a part.

    Raises:
        ValueError: it is longer than ``limit_bytes``, or its checksum does not match.
    """
    if part.size > limit_bytes:
        raise ValueError(f"part {part.name[:100]!r} has {part.size} bytes, more than {limit_bytes}")
    data = _read(file, part.start, part.size)
    if zlib.crc32(data) != part.checksum:
        raise ValueError(f"the checksum of its part {part.name[:100]} does not match")
    return data


def checksum_matches(file: BufferedReader, part: Part) -> bool:
    """Whether a part's bytes are those that were written; reads all of them."""
    buffer = memoryview(bytearray(min(_CHUNK, max(part.size, 1))))
    file.seek(part.start)
    checksum, left = 0, part.size
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])
        if not count:
            return False
        checksum = zlib.crc32(buffer[:count], checksum)
        left -= count
    return checksum == part.checksum


def _directory(file: BufferedReader, size: int) -> tuple[int, int, int]:
    """Return the number of parts, and where their directory lies."""
    if size < _END.size:
        raise ValueError("the end of the archive is missing")
    end_start = size - _END.size
    magic, disk, first_disk, here, count, length, start, comment = _END.unpack(
        _read(file, end_start, _END.size)
    )
    if magic != b"PK\x05\x06" or comment:
        raise ValueError("the end of the archive is missing")
    if disk or first_disk:
        raise ValueError("the archive claims to lie on several disks")
    stop = end_start
    locator_start = end_start - _LOCATOR64.size
    if locator_start >= 0:
        locator = _LOCATOR64.unpack(_read(file, locator_start, _LOCATOR64.size))
        if locator[0] == b"PK\x06\x07":
            stop = locator_start - _END64.size
            if locator[1] or locator[2] != stop or locator[3] != 1 or stop < 0:
                raise ValueError("the archive's two ends contradict each other")
            values = _END64.unpack(_read(file, stop, _END64.size))
            if values[0] != b"PK\x06\x06":
                raise ValueError("the archive's two ends contradict each other")
            narrow, wide = (here, count, length, start), values[6:10]
            limits = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
            if any(
                a not in (b, limit) for a, b, limit in zip(narrow, wide, limits, strict=True)
            ) or values[4:6] != (0, 0):
                raise ValueError("the archive's two ends contradict each other")
            here, count, length, start = wide
    if here != count or start + length != stop:
        raise ValueError("the archive's directory is not where its end says")
    return count, start, length


def _entries(directory: bytes, count: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, place of the local header, size and checksum of every part."""
    place = 0
    for _ in range(count):
        if len(directory) < place + _ENTRY.size:
            raise ValueError("the archive's directory is truncated")
        entry = _ENTRY.unpack_from(directory, place)
        flags, method, checksum, stored, size = entry[3], entry[4], *entry[7:10]
        name_length, extra_length, comment_length, header = *entry[10:13], entry[16]
        if entry[0] != b"PK\x01\x02" or entry[13]:  # the number of its disk
            raise ValueError("the archive's directory is damaged")
        start = place + _ENTRY.size
        name = _decoded(directory[start : start + name_length])
        extra = directory[start + name_length : start + name_length + extra_length]
        if flags & _ENCRYPTED or method:
            raise ValueError(f"part {name[:100]!r} is compressed or encrypted; torch does neither")
        size, stored, header = _wide(extra, size, stored, header)
        if stored != size:
            raise ValueError(f"part {name[:100]!r} has {stored} bytes and claims {size}")
        yield name, header, size, checksum
        place = start + name_length + extra_length + comment_length
    if place != len(directory):
        raise ValueError("the archive's directory is damaged")


def _wide(extra: bytes, *narrow: int) -> tuple[int, int, int]:
    """Return size, stored size and header place, from the 64-bit field where they don't fit."""
    values = list(narrow)
    missing = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    place = 0
    while missing and place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1 and length >= 8 * len(missing) and place + 4 + length <= len(extra):
            for index, value in zip(
                missing, struct.unpack_from(f"<{len(missing)}Q", extra, place + 4), strict=True
            ):
                values[index] = value
            missing = []
        place += 4 + length
    if missing:
        raise ValueError("the archive's directory lacks a 64-bit size")
    return values[0], values[1], values[2]


def _data_start(file: BufferedReader, header: int, name: str) -> int:
    local = _LOCAL.unpack(_read(file, header, _LOCAL.size))
    if local[0] != ZIP_MAGIC or local[3]:
        raise ValueError(f"the header of part {name[:100]!r} is damaged")
    if _decoded(_read(file, header + _LOCAL.size, local[9])) != name:
        raise ValueError(f"part {name[:100]!r} is called otherwise in its header")
    return header + _LOCAL.size + int(local[9]) + int(local[10])


def _decoded(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise ValueError("the archive's names are damaged") from error


def _read(file: BufferedReader, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the archive is truncated")
    return data
