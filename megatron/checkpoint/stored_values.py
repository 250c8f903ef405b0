"""The values in a checkpoint's torch files: are all of them numbers? No torch."""

from collections.abc import Iterable
from pathlib import Path

from megatron.base.errors import CheckpointError
from megatron.checkpoint.mapped_tensors import MappedFile, count_not_finite, tensors_in

__all__ = ["value_problems"]


def value_problems(checkpoint: Path, names: Iterable[str]) -> list[str]:
    """Return the tensors that hold NaN or infinity; each problem names its file first.

    The bytes of the files are taken as they are: compare them with their digests or checksums
    before. One file is open at a time, mapped.

    Args:
        checkpoint: a ``global_stepN``.
        names: of its torch files.
    """
    problems = []
    for name in names:
        try:
            file = MappedFile(checkpoint / name)
        except CheckpointError as error:
            problems.append(str(error).replace(f"{checkpoint}/", "", 1))
            continue
        for path, tensor in tensors_in(file.content):
            nans, infinities = count_not_finite(file.array(tensor), tensor.dtype)
            found = [f"{nans} NaN"] * bool(nans)
            found += [f"{infinities} infinite values"] * bool(infinities)
            if found:
                problems.append(f"{name}: {path} holds {' and '.join(found)}")
    return problems
