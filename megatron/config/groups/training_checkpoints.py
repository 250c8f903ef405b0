"""Training keys: saving and loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.declare import WORKS, Outcome, key, no_effect, refused

__all__ = ["TrainingCheckpoints"]


def _object_storage(value: str, _keys: Mapping[str, Any]) -> Outcome:
    """works for s3:// addresses; others refused."""
    bucket = value.removeprefix("s3://").partition("/")[0]
    if not value.startswith("s3://") or not bucket:
        return refused("write s3://bucket/prefix")
    return WORKS


def _directory(value: str, _keys: Mapping[str, Any]) -> Outcome:
    """works for directories; addresses of object storage are refused."""
    if "://" in value:
        return refused(
            "name a directory; s3_path copies checkpoints to a bucket, and "
            "docs/checkpoints/died-while-saving.md says how to bring one back"
        )
    return WORKS


@dataclass(frozen=True, kw_only=True)
class TrainingCheckpoints:
    """When and where checkpoints are written, and what is taken from one."""

    save: str | None = key(None, outcome=_directory)
    """Folder of the run: checkpoints and records. Unset: nothing is kept. With it,
    ``checkpoint_factor`` or ``extra_save_iters`` must say when."""

    s3_path: str | None = key(None, tier=3, outcome=_object_storage)
    """``s3://bucket/prefix``: every checkpoint is copied to ``<s3_path>/<name of save>/``. Needs
    the package s3fs; credentials and endpoint come from the environment (``AWS_PROFILE``,
    ``AWS_ENDPOINT_URL``, ...)."""

    s3_chunk_size: int | None = key(
        104_857_600, tier=3, unit="bytes", minimum=5_242_880, outcome=WORKS
    )
    """Size of the pieces a file is uploaded in; 5 MiB is the least that S3 takes."""

    config_files: dict[str, Any] | None = key(None, is_derived=True, outcome=WORKS)
    """Text of the configuration files by name, kept with every checkpoint; filled in by loading."""

    load: str | None = key(None, outcome=_directory)
    """Folder to resume from. Unset: begin at step 0."""

    checkpoint_validation_with_forward_pass: bool | None = key(False, tier=2, outcome=WORKS)
    """Store what the model answers to the next micro batch with every checkpoint, and compare it
    after loading. Digests find a damaged file without it; this finds a model built differently."""

    checkpoint_scale: Literal["linear", "log"] | None = key("linear", outcome=WORKS)
    """``linear``: save every ``checkpoint_factor`` steps. ``log``: at its powers."""

    checkpoint_factor: int | float | None = key(
        None, unit="steps, or ratio with log scale", minimum=1, outcome=WORKS
    )
    """Distance between saves, or ratio of their steps. Unset: only ``extra_save_iters``."""

    extra_save_iters: list[int] | None = key(None, unit="steps", outcome=WORKS)
    """Steps to save at as well; 0 is the state before training."""

    no_save_optim: bool | None = key(
        False, tier=2, outcome=no_effect("the optimizer is always saved, as in NeoX")
    )
    """Meant to leave the optimizer out of checkpoints."""

    no_save_rng: bool | None = key(
        False, tier=2, outcome=no_effect("random state is always saved, or resuming isn't exact")
    )
    """Leave random state out of checkpoints."""

    no_load_optim: bool | None = key(False, outcome=WORKS)
    """Don't take optimizer and learning-rate schedule from the checkpoint."""

    no_load_rng: bool | None = key(False, outcome=WORKS)
    """Don't take random state from the checkpoint."""

    finetune: bool | None = key(False, outcome=WORKS)
    """Take only the weights and begin a new run at step 0."""

    keep_last_n_checkpoints: int | None = key(None, minimum=1, outcome=WORKS)
    """Delete older checkpoints beyond so many. Unset: keep all."""
