"""The options NeoX gives DeepSpeed's launcher."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from megatron.config.registry import keys

__all__ = ["launcher_options"]

logger = logging.getLogger(__name__)


def launcher_options(
    runner: Mapping[str, Any],
    flat: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """Return the launcher's arguments that come before the user script.

    Args:
        runner: the launcher's keys.
        flat: every key, of which ``deepspeed_slurm`` and ``deepspeed_mpi`` are read.
        environ: ``DLTS_HOSTFILE`` and ``MASTER_ADDR`` are read.
    """
    values = dict(runner)
    mode = values.pop("autotuning_run")
    options = ["--autotuning", mode] if mode else []
    if flat["deepspeed_slurm"] or flat["deepspeed_mpi"]:
        values["force_multi"] = True
    if (values["include"] or values["exclude"]) and values["num_gpus"]:
        logger.warning(
            "num_gpus=%s is left out: include and exclude say which slots to use",
            values["num_gpus"],
        )
        values["num_gpus"] = None
    if "DLTS_HOSTFILE" in environ:
        values["hostfile"] = environ["DLTS_HOSTFILE"]
    for name, value in values.items():
        if value != keys()[name].default:
            options += _option(name, value)
    if "MASTER_ADDR" in environ:
        options += _option("master_addr", environ["MASTER_ADDR"])
    return options


def _option(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]
