"""From planned layers to a DeepSpeed engine with our optimizer and learning-rate schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron.engine.distributed import ProcessGroups
from megatron.engine.fp16_loss_scale import gradient_norm_of, scale_losses
from megatron.engine.gradient_norm import GradientClipper
from megatron.engine.optimizer_numerics import (
    NEOX_MAIN,
    OptimizerNumerics,
    apply_optimizer_numerics,
)
from megatron.engine.sequential_model import SequentialModel
from megatron.engine.steps import LossFunction
from megatron.engine.tensor_parallel_unit import TensorParallelUnit
from megatron.model.layer_plan import PlannedLayer
from megatron.model.light_import import compiled_when_called
from megatron.optim.schedules import LearningRateScheduler

__all__ = ["ModuleSettings", "build_module", "initialize_engine"]


@dataclass(frozen=True)
class ModuleSettings:
    """How the layers are laid out and recomputed."""

    partition_method: str  # NeoX's pipe_partition_method
    checkpoint_interval: int  # layers per recomputed chunk; 0 keeps all activations


class _PlannedSpec(LayerSpec):
    """A layer DeepSpeed builds on the stage that owns it, and nowhere else."""

    def __init__(self, layer: PlannedLayer) -> None:
        super().__init__(layer.kind)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return self._layer.factory()


class _PlannedTiedSpec(TiedLayerSpec):
    """A layer whose weights stand at several places of the pipeline."""

    def __init__(self, layer: PlannedLayer) -> None:
        super().__init__(
            layer.tied_key,
            layer.kind,
            forward_fn=layer.tied_forward,
            tied_weight_attr=layer.tied_weights,
        )
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return self._layer.factory()


def build_module(
    plan: Sequence[PlannedLayer],
    groups: ProcessGroups,
    loss_function: LossFunction,
    settings: ModuleSettings,
) -> nn.Module:
    """Return this rank's part of the model: a pipeline stage, or the whole sequential model."""
    if not groups.topology.uses_pipeline_engine:
        return SequentialModel(
            plan,
            checkpoint_interval=settings.checkpoint_interval,
            checkpoint=checkpointing.checkpoint,
        )
    topology = groups.topology
    return PipelineModule(
        layers=[_specification(layer) for layer in plan],
        topology=PipeModelDataParallelTopology(
            num_pp=topology.pipeline_parallel_size,
            num_mp=topology.tensor_parallel_size,
            num_dp=topology.data_parallel_size,
        ),
        loss_fn=loss_function,
        partition_method=settings.partition_method,
        activation_checkpoint_interval=settings.checkpoint_interval,
        activation_checkpoint_func=checkpointing.checkpoint,
        checkpointable_layers=["ParallelTransformerLayerPipe"],
    )


def _specification(layer: PlannedLayer) -> Any:
    if layer.is_function:
        return layer.factory()
    if layer.tied_key is not None:
        return _PlannedTiedSpec(layer)
    return _PlannedSpec(layer)


def initialize_engine(
    module: nn.Module,
    groups: ProcessGroups,
    optimizer: torch.optim.Optimizer,
    scheduler: LearningRateScheduler,
    deepspeed_settings: Mapping[str, Any],
    numerics: OptimizerNumerics = NEOX_MAIN,
) -> tuple[Any, Callable[[], float | None]]:
    """Wrap ``module`` in a DeepSpeed engine.

    Args:
        module: this rank's part of the model.
        groups: process groups.
        optimizer: over the module's parameters.
        scheduler: of the optimizer's learning rates.
        deepspeed_settings: DeepSpeed's configuration.
        numerics: where the optimizers of NeoX versions differ.

    Returns:
        The engine, and a function giving the last step's gradient norm before clipping.
    """
    with compiled_when_called():  # DeepSpeed reads modules with fused kernels, for other optimizers
        engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            mpu=None if groups.topology.uses_pipeline_engine else TensorParallelUnit(groups),
            config=dict(deepspeed_settings),
            dist_init_required=False,
        )
    if type(engine.optimizer) is FP16_UnfusedOptimizer:
        # Building it takes a step on zero gradients, which decays the masters and counts in Adam's
        # bias correction (measured: 3 steps after 2).
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    scale_losses(engine)
    apply_optimizer_numerics(engine, numerics)
    is_plain = not (
        engine.fp16_enabled() or engine.bfloat16_enabled() or engine.zero_optimization()
    )
    if not is_plain:
        return engine, gradient_norm_of(engine)
    clipper = GradientClipper(
        module.parameters(), groups, limit=deepspeed_settings["gradient_clipping"]
    )
    # DeepSpeed clips plain fp32 gradients itself, wrongly for pipelines (see GradientClipper).
    engine.clip_fp32_gradients = lambda: None
    optimizer.register_step_pre_hook(lambda *_: clipper.clip())
    return engine, lambda: clipper.last_norm
