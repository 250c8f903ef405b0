"""How many samples a run asks for, and how a single dataset is divided: NeoX's formulas."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.base.errors import ConfigError

__all__ = [
    "SplitCounts",
    "requested_samples",
    "samples_per_dataset",
    "split_documents",
    "train_iters_for_epochs",
]


@dataclass(frozen=True)
class SplitCounts:
    """One number of samples per split; None asks for exactly one epoch, 0 for no stream."""

    train: int | None
    valid: int | None
    test: int | None


def requested_samples(
    *, train_iters: int | None, train_batch_size: int, eval_interval: int, eval_iters: int
) -> SplitCounts:
    """Return the samples to ask for, in NeoX's count (evaluations consume more with gas > 1).

    Args:
        train_iters: steps, or None under ``train_epochs``.
        train_batch_size: samples per step, over all ranks.
        eval_interval: steps between evaluations.
        eval_iters: batches per evaluation.
    """
    if train_iters is None:
        return SplitCounts(None, None, None)
    per_evaluation = eval_iters * train_batch_size
    return SplitCounts(
        train=train_iters * train_batch_size,
        valid=(train_iters // eval_interval + 1) * per_evaluation,
        test=per_evaluation,
    )


def train_iters_for_epochs(
    train_epochs: int,
    epoch_samples: Sequence[int],
    train_batch_size: int,
    *,
    packing: str = "packed",
) -> int:
    """Return the steps that ``train_epochs`` passes over the datasets take.

    The first epoch is each order's head, which ends one sample early, unless the data is read
    sequentially; later ones are tail blocks.

    Args:
        train_epochs: passes, at least 1.
        epoch_samples: samples one epoch of each dataset gives.
        train_batch_size: samples per step.
        packing: of the order.
    """
    unused = 0 if packing == "sequential" else 1
    first = sum(samples - unused for samples in epoch_samples)
    return (first + (train_epochs - 1) * sum(epoch_samples)) // train_batch_size


def samples_per_dataset(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Return how many samples to ask of each dataset of a blend: 0.5 % more than its share.

    Args:
        num_samples: samples of the blend.
        weights: normalised weights.
    """
    # Left to right in float64, as NeoX multiplies: another grouping rounds differently.
    return [math.ceil(num_samples * weight * 1.005) for weight in weights]


def split_documents(split: str, num_documents: int) -> tuple[range, range, range]:
    """Divide documents ``0..num_documents-1`` into train, validation and test.

    Shares are rounded (half to even) one after the other; what the rounding adds or loses in sum
    is taken from all three ends, so train may get a document that its share doesn't give.

    Args:
        split: shares such as ``"969, 30, 1"``, also divided by ``/``; missing ones are 0.

    Raises:
        ConfigError: ``split`` cannot be read, or its shares are not positive in sum.
    """
    separator = "," if "," in split else "/"
    try:
        shares = [float(part) for part in split.split(separator)]
    except ValueError:
        raise ConfigError(
            f"split={split!r} must be up to three numbers divided by commas or slashes, "
            "such as '969, 30, 1'"
        ) from None
    shares = [*shares, 0.0, 0.0][:3]
    total = sum(shares)
    if not 0.0 < total < math.inf or min(shares) < 0.0:
        raise ConfigError(f"split={split!r} must have shares of at least 0 and one above 0")
    ends = [0]
    for share in shares:
        ends.append(ends[-1] + round(share / total * float(num_documents)))
    excess = ends[-1] - num_documents
    # NeoX has no max(): a negative end would then mean documents from the file's end.
    ends = [0, *(max(0, end - excess) for end in ends[1:])]
    train, valid, test = (range(*pair) for pair in itertools.pairwise(ends))
    return train, valid, test
