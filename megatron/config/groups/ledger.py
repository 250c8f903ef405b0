"""Keys of ours, which no NeoX configuration needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.declare import WORKS, Outcome, key, refused

__all__ = ["Ledger"]


def _neox_version(value: Any, keys: Mapping[str, Any]) -> Outcome:
    if value == "v1.0" and keys["zero_stage"] == 3:
        return refused("NeoX v1.0 had no ZeRO stage 3; use a lower stage, or neox_version: main")
    return WORKS


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What keeps a run exact, and how it saves."""

    accept_data_change: list[str] = key([], outcome=WORKS)
    """Names of changes that may make a resumed run repeat or skip samples: any of ``seed``,
    ``seq_length``, ``split``, ``packing``, ``tokenizer``, ``data``. Empty: they are refused."""

    async_save: bool | None = key(None, outcome=WORKS)
    """Go on training while a checkpoint's bytes are written; takes host memory for one copy of each
    rank's state. Unset: on wherever it is exact (not under ZeRO stage 3)."""

    on_save_error: Literal["stop", "continue"] = key("stop", outcome=WORKS)
    """Whether a checkpoint that can't be written ends the run. ``continue``: say so, keep the
    checkpoints there are, and try again at the next save."""

    elastic_batch: bool = key(False, outcome=WORKS)
    """Keep ``train_batch_size`` at any number of ranks: micro batch and gradient accumulation are
    worked out from it. The micro batch is at most ``train_micro_batch_size_per_gpu``; both have to
    be set."""

    launcher_args: str | None = key(None, tier=2, outcome=WORKS)
    """Further options of pdsh, srun or mpirun, as in a shell: ``--mca plm_rsh_no_tree_spawn 1``."""

    hang_timeout: float | None = key(None, unit="seconds", minimum=0, outcome=WORKS)
    """End the job, with every rank's stacks, when a rank takes longer than this for a step or for a
    batch of an evaluation. Unset: 20 times the slowest of the last steps, at least 3 minutes. A
    launch's first step, saves and loading have limits of their own, of half an hour to hours, but
    not less than this. 0: never."""

    exit_duration_in_mins: float | None = key(None, unit="minutes", minimum=0, outcome=WORKS)
    """Save and stop before this launch has taken so long, with exit status 75. SLURM's time limit
    is watched as well; the earlier of the two counts."""

    deterministic: bool = key(False, outcome=WORKS)
    """Use deterministic kernels on GPUs, so that a resumed run has the same numbers bit for bit;
    slower, and an operation without such a kernel is an error that names it. On CPUs numbers are
    the same anyway."""

    neox_version: Literal["main", "v1.0"] = key("main", outcome=_neox_version)
    """Whose numerics to follow: ``v1.0`` is what Pythia was trained with (learning-rate formula,
    rotary precision, Adam's step, loss scaler)."""

    adam_step_on_load: Literal["continue", "neox-v1-resume"] = key("continue", outcome=WORKS)
    """What Adam has counted in a checkpoint of NeoX v1.0's ZeRO, which doesn't say: ``continue``
    goes on as if never stopped; ``neox-v1-resume`` counts from 1 again, as v1.0 itself does when it
    resumes."""

    tp_bias_multiplicity: int | None = key(None, minimum=1, outcome=WORKS)
    """How often each replicated bias counts under ``gpt_j_residual``: NeoX adds it once per tensor
    rank. Unset: ``model_parallel_size`` when the run began, then what the checkpoint says."""

    data_order: Literal["shuffled", "sequential"] = key("shuffled", outcome=WORKS)
    """``sequential`` reads preshuffled data row by row."""
