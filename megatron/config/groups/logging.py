"""Keys of logging: console, Weights & Biases, TensorBoard, profiling."""

from dataclasses import dataclass
from typing import Any

from megatron.config.declare import WORKS, key, no_effect, part_of, refused

__all__ = ["Logging"]

_COMET = part_of("use_comet")
_PER_PARAMETER = no_effect("it isn't logged yet; the global grad_norm is in every attempt line")


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is reported, where to, how often."""

    use_wandb: bool | None = key(None, outcome=WORKS)
    """Report to Weights & Biases. Unset: if an API key is found."""

    wandb_group: str | None = key(None, outcome=WORKS)
    """Group of the run."""

    wandb_run_name: str | None = key(None, outcome=WORKS)
    """Name of the run."""

    wandb_team: str | None = key(None, outcome=WORKS)
    """Team that owns the run."""

    wandb_project: str | None = key("neox", outcome=WORKS)
    """Project of the run."""

    wandb_host: str | None = key(
        "https://api.wandb.ai", outcome=no_effect("set WANDB_BASE_URL for a server of your own")
    )
    """Server whose key is looked up in ``~/.netrc``."""

    wandb_init_all_ranks: bool | None = key(
        False, tier=2, outcome=no_effect("one rank reports for all")
    )
    """Start a Weights & Biases run on every rank."""

    git_hash: str | None = key(None, tier=2, is_derived=True, outcome=WORKS)
    """Commit of the code, as ``git describe --always`` names it at launch."""

    log_dir: str | None = key(None, outcome=no_effect("output isn't copied to files yet"))
    """Folder for a copy of every host's output."""

    tensorboard_dir: str | None = key(None, outcome=WORKS)
    """Folder for TensorBoard. Unset: none is written."""

    use_comet: bool | None = key(None, tier=3, outcome=refused("use use_wandb or tensorboard_dir"))
    """Report to Comet."""

    comet_workspace: str | None = key(None, tier=3, outcome=_COMET)
    """Workspace of the Comet experiment."""

    comet_project: str | None = key(None, tier=3, outcome=_COMET)
    """Project of the Comet experiment."""

    comet_experiment_name: str | None = key(None, tier=3, outcome=_COMET)
    """Name of the Comet experiment."""

    comet_tags: list[str] | None = key(None, tier=3, outcome=_COMET)
    """Tags of the Comet experiment."""

    comet_others: dict[str, Any] | None = key(None, tier=3, outcome=_COMET)
    """Further values for the Comet experiment."""

    comet_experiment: Any = key(None, tier=3, is_derived=True, outcome=_COMET)
    """The running experiment; not for configuration files."""

    peak_theoretical_tflops: float | None = key(
        None, tier=2, unit="TFLOPS per GPU", minimum=0, outcome=WORKS
    )
    """What a GPU could do at best; with it utilisation is reported."""

    log_interval: int | None = key(100, unit="steps", minimum=1, outcome=WORKS)
    """Steps between two lines on the console."""

    log_grad_pct_zeros: bool | None = key(False, tier=2, outcome=_PER_PARAMETER)
    """Report the part of zeros in every gradient."""

    log_param_norm: bool | None = key(False, tier=2, outcome=_PER_PARAMETER)
    """Report the norm of every parameter."""

    log_grad_norm: bool | None = key(False, tier=2, outcome=_PER_PARAMETER)
    """Report the norm of every gradient."""

    log_optimizer_states: bool | None = key(False, tier=2, outcome=_PER_PARAMETER)
    """Report norms of the optimizer's state."""

    log_gradient_noise_scale: bool | None = key(
        False, tier=2, outcome=refused("set it to false (NeoX's doesn't run either)")
    )
    """Estimate the gradient noise scale."""

    gradient_noise_scale_n_batches: int | None = key(
        5, tier=2, minimum=1, outcome=part_of("log_gradient_noise_scale")
    )
    """Batches per estimate of the noise scale."""

    gradient_noise_scale_cpu_offload: bool | None = key(
        False, tier=2, outcome=part_of("log_gradient_noise_scale")
    )
    """Keep the noise scale's gradients in host memory."""

    memory_profiling: bool | None = key(
        False, tier=2, outcome=no_effect("no memory snapshot is taken yet")
    )
    """Record the history of GPU memory."""

    memory_profiling_path: str | None = key(None, tier=2, outcome=part_of("memory_profiling"))
    """Folder for memory snapshots."""

    profile: bool | None = key(False, tier=2, outcome=no_effect("no trace is taken yet"))
    """Trace some steps with torch's profiler."""

    profile_step_start: int | None = key(
        10, tier=2, unit="step", minimum=0, outcome=part_of("profile")
    )
    """First step traced."""

    profile_step_stop: int | None = key(
        12, tier=2, unit="step", minimum=0, outcome=part_of("profile")
    )
    """Step at which tracing ends."""
