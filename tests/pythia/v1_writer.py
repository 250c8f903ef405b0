"""Checkpoints as NeoX v1.0 writes them, of random values, in any layout of its ZeRO stage 1.

Written from the description of the format, step by step as the old optimizer came to it: flatten a
group, pad it, cut it into equal parts, deal them out in rounds. Nothing of the reader is used.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megatron.model.settings import ModelSettings

__all__ = ["KINDS", "V1Layout", "V1Model", "write_checkpoint"]

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class V1Layout:
    """How the writer's optimizer state is divided, and in which files it stands."""

    data_ranks: int = 2
    sub_sizes: tuple[int, int] = (10**6, 10**6)  # at most so many elements in a sub-partition
    extra_intervals: int = 0  # wholly of padding
    is_elastic: bool = True
    tensor_ranks: int = 1
    stages: int = 1  # model ranks are numbered stage by stage, as NeoX main's are
    has_underscore: bool = True  # in the optimizer files' names
    zero_stage: int = 1  # 0: one optimizer in every metadata file
    is_pipeline: bool = True  # False: weights in the metadata files, no layer files
    is_fp16: bool = True  # False: bf16
    updates: int = 7
    skipped: int = 2

    def of_group(self, num_elements: int, group: int) -> tuple[int, int]:
        """Return elements of a sub-partition, and intervals."""
        sub = min(math.ceil(num_elements / self.data_ranks), self.sub_sizes[group])
        return sub, math.ceil(num_elements / (sub * self.data_ranks)) + self.extra_intervals


@dataclass(frozen=True)
class V1Model:
    """A model's sizes."""

    num_layers: int = 2
    hidden_size: int = 8
    vocabulary: int = 16
    heads: int = 2

    @property
    def settings(self) -> ModelSettings:
        """Return it as ours."""
        return ModelSettings(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_kv_heads=self.heads,
            seq_length=8,
            max_position_embeddings=8,
            padded_vocab_size=self.vocabulary,
            tp_bias_multiplicity=1,
            rotary_dims=2,
            mlp_up_size=4 * self.hidden_size,
            mlp_down_size=4 * self.hidden_size,
            gpt_j_residual=True,
        )

    def shapes(self, tensor_ranks: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one tensor rank's parameters, by v1.0's names and in its order."""
        h, t = self.hidden_size, tensor_ranks
        shapes: dict[str, tuple[int, ...]] = {"0.word_embeddings.weight": (self.vocabulary // t, h)}
        for layer in range(2, 2 + self.num_layers):
            block = {
                "input_layernorm.weight": (h,),
                "input_layernorm.bias": (h,),
                "attention.query_key_value.weight": (3 * h // t, h),
                "attention.query_key_value.bias": (3 * h // t,),
                "attention.dense.weight": (h, h // t),
                "attention.dense.bias": (h,),
                "post_attention_layernorm.weight": (h,),
                "post_attention_layernorm.bias": (h,),
                "mlp.dense_h_to_4h.weight": (4 * h // t, h),
                "mlp.dense_h_to_4h.bias": (4 * h // t,),
                "mlp.dense_4h_to_h.weight": (h, 4 * h // t),
                "mlp.dense_4h_to_h.bias": (h,),
            }
            shapes |= {f"{layer}.{name}": shape for name, shape in block.items()}
        norm = self.num_layers + 3
        return shapes | {
            f"{norm}.norm.weight": (h,),
            f"{norm}.norm.bias": (h,),
            f"{norm + 1}.final_linear.weight": (self.vocabulary // t, h),
        }


Values = list[dict[str, dict[str, torch.Tensor]]]
"""Of each tensor rank: kind -> name -> tensor."""


def write_checkpoint(
    directory: Path, layout: V1Layout, *, model: V1Model = V1Model(), seed: int = 0
) -> Values:
    """Write a checkpoint and return what a reader must find in it."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    values: Values = []
    for tensor_rank in range(layout.tensor_ranks):
        shapes = model.shapes(layout.tensor_ranks)
        of_rank = {
            kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            for kind in KINDS
        }
        if layout.updates == 0:
            for kind in KINDS[1:]:
                of_rank[kind] = {name: torch.zeros(shape) for name, shape in shapes.items()}
        values.append(of_rank)
        if layout.is_pipeline:
            _write_weights(directory, of_rank["master"], tensor_rank, layout)
        for stage, of_stage in enumerate(_stages(of_rank, layout.stages)):
            model_rank = stage * layout.tensor_ranks + tensor_rank
            _write_metadata(directory, model_rank, layout, model, of_stage)
            if layout.zero_stage == 1:
                _write_optimizer(directory, of_stage, model_rank, layout)
    return values


def _stages(
    values: dict[str, dict[str, torch.Tensor]], stages: int
) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Divide a tensor rank's parameters by layer, as evenly as layers allow."""
    layers = list(dict.fromkeys(name.split(".")[0] for name in values["master"]))
    stage_of = {layer: index * stages // len(layers) for index, layer in enumerate(layers)}
    return [
        {
            kind: {
                name: tensor
                for name, tensor in of_kind.items()
                if stage_of[name.split(".")[0]] == stage
            }
            for kind, of_kind in values.items()
        }
        for stage in range(stages)
    ]


def _weights(masters: dict[str, torch.Tensor], layout: V1Layout) -> dict[str, torch.Tensor]:
    dtype = torch.float16 if layout.is_fp16 else torch.bfloat16
    weights = {}
    for name, master in masters.items():
        weights[name] = master.to(dtype)
        if name.endswith("attention.query_key_value.bias"):
            buffer = name.replace("query_key_value.bias", "rotary_emb.inv_freq")
            weights[buffer] = torch.ones(1, dtype=dtype)
    return weights


def _write_weights(
    directory: Path, masters: dict[str, torch.Tensor], rank: int, layout: V1Layout
) -> None:
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, weight in _weights(masters, layout).items():
        layer, name = full_name.split(".", 1)
        layers.setdefault(int(layer), {})[name] = weight
    for layer, tensors in layers.items():
        torch.save(tensors, directory / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")


def _write_metadata(
    directory: Path,
    rank: int,
    layout: V1Layout,
    model: V1Model,
    values: dict[str, dict[str, torch.Tensor]],
) -> None:
    iteration = layout.updates + layout.skipped
    module = None
    if not layout.is_pipeline:
        weights = _weights(values["master"], layout)
        module = OrderedDict((f"sequential.{name}", weight) for name, weight in weights.items())
    content = {
        "module": module,
        "optimizer": _whole_optimizer(values, layout) if layout.zero_stage == 0 else None,
        "lr_scheduler": {
            "start_lr": 1e-3,
            "warmup_iter": 5.0,
            "num_iters": layout.updates,
            "decay_style": "cosine",
            "end_iter": 100,
            "min_lr": 1e-4,
        },
        "csr_tensor_module_names": set(),
        "skipped_steps": layout.skipped,
        "global_steps": iteration,
        "global_samples": 4 * iteration,
        "dp_world_size": layout.data_ranks,
        "mp_world_size": layout.stages * layout.tensor_ranks,
        "iteration": iteration,
        "args": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.heads,
            "padded_vocab_size": model.vocabulary,
            "model_parallel_size": layout.tensor_ranks,
        },
    }
    torch.save(content, directory / f"mp_rank_{rank:02d}_model_states.pt")


def _vectors(of_kind: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    matrices = [tensor for tensor in of_kind.values() if tensor.dim() == 2]
    others = [tensor for tensor in of_kind.values() if tensor.dim() == 1]
    return [torch.cat([one.reshape(-1) for one in group]) for group in (matrices, others)]


def _whole_optimizer(
    values: dict[str, dict[str, torch.Tensor]], layout: V1Layout
) -> dict[str, Any]:
    vectors = {kind: _vectors(of_kind) for kind, of_kind in values.items()}
    scaler: dict[str, Any] = {"dynamic_loss_scale": layout.is_fp16, "cur_scale": 1.0, "cur_iter": 9}
    if layout.is_fp16:
        scaler |= {"cur_scale": 4096, "last_overflow_iter": 3}
        scaler |= {"scale_factor": 2, "scale_window": 1000}
    pairs = zip(vectors["exp_avg"], vectors["exp_avg_sq"], strict=True)
    return scaler | {
        "optimizer_state_dict": {
            "state": {
                number: {"exp_avg": first, "exp_avg_sq": second}
                for number, (first, second) in enumerate(pairs)
            },
            "param_groups": _param_groups([1, 1], layout),
        },
        "fp32_groups_flat": [vector.requires_grad_() for vector in vectors["master"]],
        "clip_grad": 1.0,
    }


def _param_groups(sizes: list[int], layout: V1Layout) -> list[dict[str, Any]]:
    numbers = iter(range(sum(sizes)))
    return [
        {
            "weight_decay": decay,
            "lr": 1e-3,
            "bias_correction": True,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "step": layout.updates + 1,
            "params": [next(numbers) for _ in range(size)],
        }
        for size, decay in zip(sizes, (0.1, 0.0), strict=True)
    ]


def _write_optimizer(
    directory: Path, values: dict[str, dict[str, torch.Tensor]], rank: int, layout: V1Layout
) -> None:
    # kind -> group -> data-parallel rank -> interval
    dealt = {
        kind: [_deal(vector, number, layout) for number, vector in enumerate(_vectors(of_kind))]
        for kind, of_kind in values.items()
    }
    shapes = OrderedDict((name, tensor.shape) for name, tensor in values["master"].items())
    underscore = "_" if layout.has_underscore else ""
    for data_rank in range(layout.data_ranks):
        mine = {kind: [group[data_rank] for group in groups] for kind, groups in dealt.items()}
        torch.save(
            {"optimizer_state_dict": _state(mine, layout), "param_shapes": shapes},
            directory / f"zero_pp_rank_{data_rank}_mp_rank_{rank:02d}{underscore}optim_states.pt",
        )


def _deal(vector: torch.Tensor, group: int, layout: V1Layout) -> list[list[torch.Tensor]]:
    sub, intervals = layout.of_group(vector.numel(), group)
    padded = torch.zeros(sub * intervals * layout.data_ranks)
    padded[: vector.numel()] = vector
    hands: list[list[torch.Tensor]] = [[] for _ in range(layout.data_ranks)]
    left = vector.numel()
    for number, part in enumerate(padded.split(sub)):
        part = part.clone()
        # A view, so that the file holds the padding all the same.
        hands[number % layout.data_ranks].append(
            part[: max(left, 0)] if layout.is_elastic else part
        )
        left -= sub
    return hands


def _state(mine: dict[str, list[list[torch.Tensor]]], layout: V1Layout) -> dict[str, Any]:
    state: dict[str, Any] = {
        "loss_scaler": _scaler(layout),
        "dynamic_loss_scale": layout.is_fp16,
        "overflow": False,
    }
    entries = [
        [{"exp_avg": first, "exp_avg_sq": second} for first, second in zip(*of_group, strict=True)]
        for of_group in zip(mine["exp_avg"], mine["exp_avg_sq"], strict=True)
    ]
    if layout.is_elastic:
        state |= {
            "base_optimizer_state": entries,
            "zero_stage": 1,
            "partition_count": layout.data_ranks,
            "num_comm_intervals_per_group": [len(group) for group in entries],
        }
    else:
        flat = [entry for group in entries for entry in group]
        state["base_optimizer_state"] = {
            "state": dict(enumerate(flat)),
            "param_groups": _param_groups([len(group) for group in entries], layout),
        }
    state["local_sub_partitions_of_fp32_groups"] = [
        [part.requires_grad_() for part in group] for group in mine["master"]
    ]
    return state


def _scaler(layout: V1Layout) -> Any:
    if not layout.is_fp16:
        return LossScaler(1.0)
    scaler = DynamicLossScaler(
        init_scale=2**12,
        scale_window=1000,
        min_scale=1,
        delayed_shift=2,
        consecutive_hysteresis=False,
    )
    for name in ("dynamic", "dtype"):  # of later DeepSpeed versions
        delattr(scaler, name)
    scaler.cur_iter = layout.updates + layout.skipped
    scaler.cur_hysteresis = 1
    scaler.last_overflow_iter = 3
    return scaler
