"""Keys that fit nowhere else: seed, distributed start, runtime values."""

from dataclasses import dataclass

from megatron.config.declare import WORKS, key, no_effect, refused

__all__ = ["Other"]

_UNUSED = no_effect("nothing reads it, in NeoX neither")
_RUNTIME = no_effect("it is worked out while running")


@dataclass(frozen=True, kw_only=True)
class Other:
    """Seed, how ranks are started, and values that are known only at run time."""

    distributed_backend: str | None = key("nccl", outcome=WORKS)
    """Backend of torch.distributed. A machine without GPUs uses gloo whatever stands here."""

    local_rank: int | None = key(None, is_derived=True, outcome=_RUNTIME)
    """This process's place on its host; from the environment."""

    rank: int | None = key(None, is_derived=True, outcome=_RUNTIME)
    """This process's place among all; from the environment."""

    lazy_mpu_init: bool | None = key(False, tier=3, outcome=refused("leave it out"))
    """Let an outside program set up the process groups."""

    short_seq_prob: float | None = key(0.1, tier=3, outcome=_UNUSED)
    """A leftover of BERT-style training."""

    eod_mask_loss: bool | None = key(False, outcome=WORKS)
    """Don't count the loss where the input token is the end of a document."""

    adlr_autoresume: bool | None = key(False, tier=3, outcome=_UNUSED)
    """A leftover of NVIDIA's cluster."""

    adlr_autoresume_interval: int | None = key(1000, tier=3, outcome=_UNUSED)
    """A leftover of NVIDIA's cluster."""

    seed: int | None = key(1234, minimum=1, outcome=WORKS)
    """Start of every random number: weights, dropout and the order of samples."""

    onnx_safe: bool | None = key(False, tier=3, outcome=refused("leave it out"))
    """A spelling of GELU that ONNX could export."""

    deepscale: bool | None = key(False, tier=3, outcome=_UNUSED)
    """An old name of DeepSpeed."""

    deepscale_config: str | None = key(None, tier=3, outcome=_UNUSED)
    """An old name of DeepSpeed's configuration."""

    deepspeed_mpi: bool | None = key(
        False, tier=3, outcome=refused("launch with pdsh or slurm, or set RANK and WORLD_SIZE")
    )
    """Ask MPI for this process's rank."""

    deepspeed_slurm: bool | None = key(False, outcome=WORKS)
    """Start through ``srun``, on the hosts of the SLURM job around ``deepy.py`` unless a host file
    names them. Implies ``force_multi``."""

    user_script: str | None = key(None, is_derived=True, outcome=WORKS)
    """Script that deepy.py starts on every rank; from its command line."""

    iteration: int | None = key(None, unit="step", minimum=0, outcome=WORKS)
    """Load the checkpoint of this step instead of the latest. Everything after it is left aside."""

    do_train: bool | None = key(None, is_derived=True, outcome=_RUNTIME)
    """Whether there is training data; worked out from the data keys."""

    do_valid: bool | None = key(None, is_derived=True, outcome=_RUNTIME)
    """Whether there is validation data; worked out from the data keys."""

    do_test: bool | None = key(None, is_derived=True, outcome=_RUNTIME)
    """Whether there is test data; worked out from the data keys."""

    global_num_gpus: int | None = key(None, unit="ranks", minimum=1, outcome=WORKS)
    """Ranks in all. Unset: counted from the host file, ``num_gpus``, or this machine's devices."""
