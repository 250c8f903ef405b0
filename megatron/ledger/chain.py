"""The hash chain through a run's lines: none can be changed, dropped or moved unseen.

A line is one JSON object whose last member is ``chain``: the first 16 hexadecimal digits of SHA-256
of the previous line's chain followed by the line's bytes without that member (and no newline). The
first line of an attempt continues from the loaded checkpoint's chain head, or from the run's id.
"""

import hashlib
import re

__all__ = ["chained_line", "next_chain", "split_line"]

_CHAIN_MEMBER = re.compile(rb', "chain": "([0-9a-f]{16})"\}')
_MEMBER_LENGTH = len(b', "chain": "0123456789abcdef"}')


def next_chain(previous: str, body: bytes) -> str:
    """Return the chain of the line ``body`` that follows a line with chain ``previous``."""
    return hashlib.sha256(previous.encode() + body).hexdigest()[:16]


def chained_line(previous: str, body: bytes) -> tuple[bytes, str]:
    """Return ``body``, a JSON object, with its chain member, and that chain.

    Example:
        >>> line, chain = chained_line("run", b'{"step": 1}')
        >>> split_line(line) == (b'{"step": 1}', chain)
        True
    """
    chain = next_chain(previous, body)
    return b'%s, "chain": "%s"}' % (body[:-1], chain.encode()), chain


def split_line(line: bytes) -> tuple[bytes, str | None]:
    """Return a line without its chain member, and the chain; None if it doesn't end in one."""
    match = _CHAIN_MEMBER.fullmatch(line[-_MEMBER_LENGTH:])
    if match is None:
        return line, None
    return line[:-_MEMBER_LENGTH] + b"}", match[1].decode()
