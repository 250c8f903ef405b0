"""Opening what the configuration names as training, validation and test data."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron.stream.descriptions import describe_streams, map_names
from megatron.stream.opening import OrderPlan
from megatron.stream.sample_counts import SplitCounts
from megatron.stream.sample_stream import Stream
from megatron.stream.stream_settings import SPLITS, StreamSettings, identify_datasets

__all__ = ["SplitCounts", "Stream", "StreamSettings", "Streams", "open_streams"]


@dataclass(frozen=True)
class Streams:
    """The three streams; None where a split is empty or nothing is asked of it."""

    train: Stream | None
    valid: Stream | None
    test: Stream | None


def open_streams(
    settings: StreamSettings,
    requested: SplitCounts,
    *,
    is_builder: bool,
    barrier: Callable[[], None],
) -> Streams:
    """Open the three streams of a new run; index maps that are missing or stale are written first.

    Args:
        settings: data keys.
        requested: samples per split (None: one epoch; 0: no stream).
        is_builder: whether this process writes files; exactly one per file system does.
        barrier: waits for the builder; every process of the run's readers passes it once.

    Raises:
        ConfigError: keys that contradict each other or ask for what is not supported yet.
        DatasetError: a dataset or its index maps cannot be used.
    """
    plans: list[OrderPlan | None] = []
    try:
        if is_builder:
            plans = _plans(settings, requested)
            for plan in plans:
                if plan is not None:
                    plan.build_files()
    finally:
        barrier()  # also on an error, so that the others fail too instead of waiting
    # The others come after the builder, which has left the datasets' identities beside them.
    plans = plans or _plans(settings, requested)
    return Streams(*(None if plan is None else plan.open() for plan in plans))


def _plans(settings: StreamSettings, requested: SplitCounts) -> list[OrderPlan | None]:
    identities = identify_datasets(settings)
    orders = describe_streams(settings, requested, identities)
    names = map_names(settings, requested, identities)
    located = {identity.digest: files for files, identity in identities.items()}
    plans: list[OrderPlan | None] = []
    for split in SPLITS:
        order = orders[split]
        plans.append(
            None
            if order is None
            else OrderPlan.of(
                order, located.__getitem__, names=names[split], warm_up=settings.mmap_warmup
            )
        )
    return plans
