"""Keys that NeoX hands on to DeepSpeed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.declare import (
    WORKS,
    Outcome,
    OutcomeRule,
    key,
    no_effect,
    refused,
)

__all__ = ["DeepspeedConfig"]

_ADAM_PARAMS = {"lr", "betas", "eps"}
# Said for NeoX's other optimizers, or to choose an implementation; and weight_decay, which has a
# message of its own.
_WITHOUT_MEANING_TO_ADAM = {
    "adam_w_mode",
    "cuda_aware",
    "freeze_step",
    "momentum",
    "torch_adam",
    "weight_decay",
}


def _judge_optimizer(value: Any, _keys: Mapping[str, Any]) -> Outcome:
    """works for type Adam; other types refused, and parameters Adam doesn't have."""
    name = str(value.get("type", "")).lower()
    if name != "adam":
        return refused('use optimizer: {"type": "Adam", ...}, which is AdamW as in NeoX')
    unknown = sorted(set(value.get("params") or ()) - _ADAM_PARAMS - _WITHOUT_MEANING_TO_ADAM)
    if unknown:
        return refused(
            f"Adam has no {', '.join(unknown)}; its params are {', '.join(sorted(_ADAM_PARAMS))}"
        )
    return WORKS


def _judge_zero(value: Any, keys: Mapping[str, Any]) -> Outcome:
    """works; stages 2 and 3 only without pipeline and tensor parallelism, offloading refused."""
    stage = value.get("stage", 0)
    if stage in (2, 3) and keys["pipe_parallel_size"] > 0:
        return refused("ZeRO 2 and 3 need pipe_parallel_size: 0; with a pipeline use stage 0 or 1")
    if stage in (2, 3) and keys["model_parallel_size"] > 1:
        return refused("with ZeRO 2 and 3 use model_parallel_size: 1, else stage 0 or 1")
    if value.get("cpu_offload") or value.get("offload_optimizer") or value.get("offload_param"):
        return refused("leave out offloading")
    return WORKS


def _judge_type_name(value: Any, _keys: Mapping[str, Any]) -> Outcome:
    """works for a type's name; true and false refused."""
    if isinstance(value, str):
        return WORKS
    return refused("write a type, such as fp32, or leave it out")


def _judge_when_on(advice: str) -> OutcomeRule:
    """refused when enabled."""

    def judge(value: Any, _keys: Mapping[str, Any]) -> Outcome:
        if isinstance(value, dict) and not value.get("enabled", True):
            return no_effect("it is not enabled")
        return refused(advice)

    return judge


@dataclass(frozen=True, kw_only=True)
class DeepspeedConfig:
    """Batch sizes, precision, ZeRO and the rest of DeepSpeed's own configuration."""

    deepspeed: bool | None = key(True, outcome=WORKS)
    """Must stay true: there is no other engine."""

    train_batch_size: int | None = key(None, unit="samples per step", minimum=1, outcome=WORKS)
    """Samples one step consumes over all ranks. Unset: micro batch x gradient accumulation x
    data-parallel size."""

    train_micro_batch_size_per_gpu: int | None = key(
        None, unit="samples", minimum=1, mirrors=("batch_size",), outcome=WORKS
    )
    """Samples a data-parallel rank pushes through the model at a time. Unset: worked out from
    ``train_batch_size``."""

    gradient_accumulation_steps: int | None = key(
        1, unit="micro steps per step", minimum=1, aliases=("gas",), outcome=WORKS
    )
    """Micro batches whose gradients are averaged into one step. The default is 1, not "work it
    out": write ``null`` to have it follow from the two other batch sizes."""

    optimizer: dict[str, Any] | None = key(None, outcome=_judge_optimizer)
    """``{"type": name, "params": {"lr": ..., "betas": ..., "eps": ...}}``; both members are needed.
    Training can't do without it. The weight decay is the key ``weight_decay``, not a member of
    ``params``."""

    scheduler: dict[str, Any] | None = key(
        None, tier=3, outcome=refused("use lr_decay_style, warmup and lr_decay_iters")
    )
    """A learning-rate schedule of DeepSpeed's own; NeoX fills it in for one-bit Adam."""

    fp32_allreduce: bool | None = key(
        False, tier=2, outcome=refused("leave it out; with precision fp32 it changes nothing")
    )
    """Sum over ranks in fp32 whatever the precision."""

    prescale_gradients: bool | None = key(False, tier=2, outcome=WORKS)
    """Divide gradients by the number of ranks before they are summed rather than after."""

    gradient_predivide_factor: float | None = key(1.0, tier=2, minimum=0, outcome=WORKS)
    """With ``prescale_gradients``: divide by this before the sum and by the rest after it."""

    sparse_gradients: bool | None = key(False, tier=3, outcome=refused("leave it out"))
    """Exchange embedding gradients as sparse tensors."""

    fp16: dict[str, Any] | None = key(None, outcome=WORKS)
    """Half precision with loss scaling. Must have ``enabled``; more members: ``loss_scale`` (0 is
    dynamic), ``initial_scale_power``, ``loss_scale_window``, ``hysteresis``, ``min_loss_scale``.
    v1.0's ``type: bfloat16`` means bfloat16."""

    bf16: dict[str, Any] | None = key(None, outcome=WORKS)
    """``{"enabled": true}`` trains in bfloat16 with fp32 master weights."""

    amp: dict[str, Any] | None = key(
        None, tier=3, outcome=_judge_when_on("use precision: fp16 or bfloat16")
    )
    """Automatic mixed precision of NVIDIA's apex. Must have ``enabled``."""

    gradient_clipping: float | None = key(
        1.0, unit="gradient norm", minimum=0, mirrors=("clip_grad",), outcome=WORKS
    )
    """Gradients are scaled down to this global norm; 0 turns it off. Always applied as written,
    where NeoX forgets its default."""

    zero_optimization: dict[str, Any] | None = key(None, outcome=_judge_zero)
    """DeepSpeed's ZeRO block. Must have ``stage``, 0 to 3; unset is stage 0."""

    curriculum_learning: dict[str, Any] | None = key(
        None, tier=2, outcome=_judge_when_on("train at full sequence length")
    )
    """DeepSpeed's older curriculum: sequences start short and grow."""

    curriculum_seqlen: int | None = key(
        0, tier=3, is_derived=True, outcome=no_effect("the curriculum sets it while training")
    )
    """Sequence length the curriculum has reached; not for configuration files."""

    steps_per_print: int | None = key(10, unit="steps", minimum=1, outcome=WORKS)
    """DeepSpeed prints its own progress line every so many steps. At the default it prints none."""

    wall_clock_breakdown: bool | None = key(False, outcome=WORKS)
    """DeepSpeed measures and prints how long forward, backward and optimizer take. Costs
    synchronisation on GPUs."""

    dump_state: bool | None = key(False, tier=3, outcome=WORKS)
    """DeepSpeed prints the engine's settings when it starts."""

    flops_profiler: dict[str, Any] | None = key(None, tier=3, outcome=WORKS)
    """DeepSpeed's profiler of floating-point operations. Must have ``enabled``."""

    communication_data_type: bool | str | None = key(None, tier=2, outcome=_judge_type_name)
    """Type gradients are exchanged in, such as ``fp32``. Unset: that of the parameters. (NeoX only
    lets a boolean through, which DeepSpeed can't use.)"""

    autotuning: dict[str, Any] | None = key(
        None, tier=3, outcome=_judge_when_on("set the batch sizes by hand")
    )
    """DeepSpeed's autotuner. With it a value may be ``auto``."""

    activation_checkpointing: dict[str, Any] | None = key(
        None, tier=2, outcome=no_effect("as in NeoX; use checkpoint_activations")
    )
    """DeepSpeed's own block for recomputing activations."""

    sparse_attention: dict[str, Any] | None = key(
        None, tier=3, outcome=no_effect("as in NeoX; use attention_config and sparsity_config")
    )
    """DeepSpeed's own block for sparse attention."""

    data_efficiency: dict[str, Any] | None = key(
        None, tier=3, outcome=_judge_when_on("leave it out: it would choose other samples")
    )
    """DeepSpeed's data sampling and token dropping."""

    tensorboard: dict[str, Any] | None = key(None, tier=3, outcome=WORKS)
    """DeepSpeed's own TensorBoard writer; ours is ``tensorboard_dir``."""

    wandb: dict[str, Any] | None = key(None, tier=3, outcome=WORKS)
    """DeepSpeed's own Weights & Biases writer; ours is ``use_wandb``."""

    csv_monitor: dict[str, Any] | None = key(None, tier=3, outcome=WORKS)
    """DeepSpeed's own writer of CSV files."""

    elasticity: dict[str, Any] | None = key(
        None, tier=3, outcome=_judge_when_on("use elastic_batch, which keeps train_batch_size")
    )
    """DeepSpeed picks batch sizes that suit several numbers of GPUs."""

    comms_logger: dict[str, Any] | None = key(None, tier=2, outcome=WORKS)
    """DeepSpeed logs its collective operations."""

    compression_training: dict[str, Any] | None = key(
        None, tier=3, outcome=refused("leave it out: it changes the model")
    )
    """DeepSpeed's pruning, quantisation and distillation while training."""

    checkpoint: dict[str, Any] | None = key(
        None, tier=2, outcome=refused("leave it out: checkpoints are written by our own rules")
    )
    """How DeepSpeed writes checkpoints, such as ``use_node_local_storage``."""

    data_types: dict[str, Any] | None = key(None, tier=2, outcome=WORKS)
    """Types inside DeepSpeed, such as ``{"grad_accum_dtype": "fp32"}``."""

    deepspeed_extra_args: dict[str, Any] | None = key(None, outcome=WORKS)
    """Anything else DeepSpeed understands, merged into its configuration as it is."""
