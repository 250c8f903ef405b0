"""Digests of file contents: XXH3-128, as 32 hexadecimal digits.

They find damage: a flipped bit, a torn write, another step's file. They are no protection against
somebody who forges a file together with its digest.
"""

import os
from pathlib import Path

import xxhash

__all__ = ["FileDigest", "digest_file"]

_CHUNK_BYTES = 1 << 21


class FileDigest:
    """The digest and size of bytes that come one piece after the other.

    Example:
        >>> whole, pieces = FileDigest(), FileDigest()
        >>> whole.update(b"a checkpoint")
        >>> pieces.update(b"a check"), pieces.update(b"point")
        (None, None)
        >>> pieces.hexdigest() == whole.hexdigest(), pieces.size
        (True, 12)
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes; of a memoryview, all that it shows."""
        self._hash.update(data)
        self._size += data.nbytes if isinstance(data, memoryview) else len(data)

    def hexdigest(self) -> str:
        """Return the digest of everything so far."""
        return self._hash.hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's content; a symbolic link is not followed.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    digest = FileDigest()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb", buffering=0) as file:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
