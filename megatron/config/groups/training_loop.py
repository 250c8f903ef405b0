"""Training keys: how long, how often, regularisation, and recomputed activations."""

from dataclasses import dataclass

from megatron.config.declare import WORKS, key, no_effect, refused, same_numbers

__all__ = ["TrainingLoop"]

_MEMORY_ONLY = same_numbers("it is about memory and time, and there is one way")
_USE_FP16_BLOCK = no_effect("NeoX doesn't read it either; set it in the fp16 block")


@dataclass(frozen=True, kw_only=True)
class TrainingLoop:
    """Steps, evaluations, dropout and decay, and the memory a step takes."""

    batch_size: int | None = key(None, unit="samples", is_derived=True, outcome=WORKS)
    """The micro batch: always ``train_micro_batch_size_per_gpu``."""

    train_iters: int | None = key(None, unit="steps", minimum=0, outcome=WORKS)
    """Steps to train. This or ``train_epochs``."""

    train_epochs: int | None = key(None, tier=2, unit="epochs", minimum=1, outcome=WORKS)
    """Passes over the training data, from which ``train_iters`` is worked out."""

    eval_iters: int | None = key(100, unit="batches", minimum=0, outcome=WORKS)
    """Global batches per evaluation."""

    eval_interval: int | None = key(1000, unit="steps", minimum=0, outcome=WORKS)
    """Steps between evaluations; 0 turns them off."""

    exit_interval: int | None = key(None, unit="steps", minimum=0, outcome=WORKS)
    """Exit, without saving, at the first step that is a multiple of this. Unset or 0: don't."""

    attention_dropout: float | None = key(0.0, minimum=0, maximum=1, outcome=WORKS)
    """Probability with which an attention weight is dropped."""

    hidden_dropout: float | None = key(0.0, minimum=0, maximum=1, outcome=WORKS)
    """Probability with which an output of embedding, attention or MLP is dropped."""

    weight_decay: float | None = key(0.1, minimum=0, outcome=WORKS)
    """Decoupled weight decay of all matrices; norms and biases have none."""

    checkpoint_activations: bool | None = key(False, outcome=WORKS)
    """Recompute activations in the backward pass instead of keeping them."""

    checkpoint_num_layers: int | None = key(1, unit="layers", minimum=1, outcome=WORKS)
    """Layers recomputed together."""

    deepspeed_activation_checkpointing: bool | None = key(
        True, tier=2, outcome=same_numbers("there is one way of recomputing")
    )
    """Use DeepSpeed's recomputation; NeoX has no other left."""

    contiguous_checkpointing: bool | None = key(False, tier=2, outcome=_MEMORY_ONLY)
    """Keep inputs of recomputed layers in one buffer."""

    checkpoint_in_cpu: bool | None = key(False, tier=2, outcome=_MEMORY_ONLY)
    """Keep inputs of recomputed layers in host memory."""

    synchronize_each_layer: bool | None = key(False, outcome=_MEMORY_ONLY)
    """Wait for the GPU after every recomputed layer."""

    profile_backward: bool | None = key(
        False, tier=2, outcome=no_effect("backward times are in wall_clock_breakdown")
    )
    """Time the backward pass of recomputed layers."""

    partition_activations: bool | None = key(False, outcome=WORKS)
    """Split inputs of recomputed layers over tensor-parallel ranks."""

    clip_grad: float | None = key(1.0, is_derived=True, outcome=WORKS)
    """Always ``gradient_clipping``."""

    hysteresis: int | None = key(2, tier=2, outcome=_USE_FP16_BLOCK)
    """Overflows before the loss scale is halved."""

    dynamic_loss_scale: bool | None = key(None, tier=2, is_derived=True, outcome=WORKS)
    """Whether ``loss_scale`` is unset."""

    loss_scale: float | None = key(None, tier=2, outcome=_USE_FP16_BLOCK)
    """A fixed loss scale."""

    loss_scale_window: float | None = key(1000.0, tier=2, outcome=_USE_FP16_BLOCK)
    """Steps without overflow before the loss scale is doubled."""

    min_scale: float | None = key(1.0, tier=2, outcome=_USE_FP16_BLOCK)
    """Least loss scale."""

    char_level_ppl: bool | None = key(False, tier=2, outcome=refused("set it to false"))
    """Report perplexity per character when evaluating."""
