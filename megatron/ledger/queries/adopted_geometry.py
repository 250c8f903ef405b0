"""How batches were divided before a checkpoint without a ledger was adopted.

The ledger says so. One of the first release keeps only what was assumed, in words; then the
checkpoint itself is asked, as long as it lies where it was adopted from.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron.base.errors import MegatronError
from megatron.base.torch_metadata import read_torch_metadata
from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.ledger_file import Ledger

__all__ = ["adopted_geometry"]

_METADATA_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def adopted_geometry(ledger: Ledger) -> BatchGeometry | None:
    """Return how the adopted steps' batches were divided, as far as it is known or assumed.

    Where nothing says it, it is assumed to have been as in the launch that adopted it.

    Returns:
        None if nothing was adopted, or its batch can't have been divided so.
    """
    if ledger.adopted is None:
        return None
    if ledger.adopted.geometry is not None:
        return ledger.adopted.geometry
    first_launch = next((span.geometry for span in ledger.spans if span.geometry), None)
    stated = _stated(Path(ledger.adopted.source))
    sizes: list[int] = []
    for name in ("micro_batch_size", "data_parallel_size", "gradient_accumulation_steps"):
        value = stated.get(name, getattr(first_launch, name, None))
        if not isinstance(value, int) or value < 1:
            return None
        sizes.append(value)
    geometry = BatchGeometry(*sizes)
    segment = ledger.streams["train"].segments.at_step(1)
    return geometry if geometry.global_batch_size == segment.batch_size else None


def _stated(checkpoint: Path) -> Mapping[str, object]:
    """Return what the checkpoint says; empty if it isn't there any more."""
    for name in _METADATA_FILES:
        try:
            metadata = read_torch_metadata(checkpoint / name)
        except (MegatronError, OSError):
            continue
        batches = metadata.get("ds_config")
        batches = batches if isinstance(batches, Mapping) else {}
        values = {
            "micro_batch_size": batches.get("train_micro_batch_size_per_gpu"),
            "gradient_accumulation_steps": batches.get("gradient_accumulation_steps"),
            "data_parallel_size": metadata.get("dp_world_size"),
        }
        return {name: value for name, value in values.items() if isinstance(value, int)}
    return {}
