"""What a step really read, as one number that doesn't depend on who read it.

A sample's digest is XXH3-64 of its token ids as little-endian int64, followed by its label, reward
and ref arrays, with its position as seed. A step's digest is the sum of its samples', modulo 2^64:
ranks add theirs up in any order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from megatron.base.errors import RunDirectoryError

__all__ = [
    "MODULUS",
    "agreed_digests",
    "batch_digest",
    "digest_text",
    "digest_value",
    "sample_digest",
]

MODULUS = 1 << 64
_CHUNK_BYTES = 1 << 18  # of tokens as int64: stays in a core's cache


def sample_digest(
    tokens: NDArray[Any], position: int, companions: Sequence[NDArray[Any]] = ()
) -> int:
    """Return the digest of one sample.

    Args:
        tokens: its ids, any integer type, shape (seq_length + 1,).
        position: its place in the stream.
        companions: its label, reward and ref arrays, as far as it has them, in that order.
    """
    return batch_digest(tokens[None], [position], [array[None] for array in companions])


def batch_digest(
    tokens: NDArray[Any], positions: ArrayLike, companions: Sequence[NDArray[Any]] = ()
) -> int:
    """Return the sum of the digests of samples, modulo 2^64.

    Args:
        tokens: any integer type, shape (num_samples, seq_length + 1).
        positions: their places in the stream, shape (num_samples,).
        companions: label, reward and ref arrays, as far as there are any, in that order; integers
            count as int64, others as float32. Shape (num_samples, ...).

    Example:
        >>> tokens = np.arange(34, dtype=np.uint16).reshape(2, 17)
        >>> both = batch_digest(tokens, [40, 41])
        >>> both == (batch_digest(tokens[:1], [40]) + batch_digest(tokens[1:], [41])) % MODULUS
        True
    """
    seeds = np.asarray(positions, dtype=np.int64).tolist()
    if len(seeds) != len(tokens):
        raise ValueError(f"{len(tokens)} samples, but {len(seeds)} positions")
    rows_at_once = max(1, _CHUNK_BYTES // (8 * max(1, tokens[0].size))) if seeds else 1
    total = 0
    for start in range(0, len(seeds), rows_at_once):
        chunk = slice(start, start + rows_at_once)
        arrays = [_hashed_form(array[chunk]) for array in (tokens, *companions)]
        if not companions:
            digest = xxhash.xxh3_64_intdigest
            total += sum(map(digest, arrays[0], seeds[chunk]))
        else:
            total += sum(
                _streamed(parts, seed) for *parts, seed in zip(*arrays, seeds[chunk], strict=True)
            )
    return total % MODULUS


def digest_text(value: int) -> str:
    """Return a digest as the 16 hexadecimal digits that files hold."""
    return f"{value % MODULUS:016x}"


def digest_value(text: str) -> int:
    """Return the number that :func:`digest_text` wrote."""
    return int(text, 16)


def agreed_digests(first_stage: Mapping[int, int], last_stage: Mapping[int, int]) -> dict[int, int]:
    """Return the steps' digests, after checking that both ends of the pipeline read the same.

    Args:
        first_stage: step -> sum over the readers of the first stage.
        last_stage: the same of the last stage; equal to ``first_stage`` if there is only one.

    Raises:
        RunDirectoryError: names the first step of which they read different samples.
    """
    for step in sorted(first_stage.keys() | last_stage.keys()):
        first, last = first_stage.get(step), last_stage.get(step)
        if first is None or first != last:
            texts = ["none" if one is None else digest_text(one) for one in (first, last)]
            raise RunDirectoryError(
                f"step {step}: the first pipeline stage read samples with digest {texts[0]}, the "
                f"last {texts[1]}: inputs and labels don't belong together. Do all nodes see the "
                "same data files?"
            )
    return dict(first_stage)


def _hashed_form(array: NDArray[Any]) -> NDArray[Any]:
    dtype = "<i8" if array.dtype.kind in "iub" else "<f4"
    return np.ascontiguousarray(array, dtype=dtype)


def _streamed(parts: Sequence[NDArray[Any]], seed: int) -> int:
    hasher = xxhash.xxh3_64(seed=seed)
    for part in parts:
        hasher.update(part.data)
    return hasher.intdigest()
