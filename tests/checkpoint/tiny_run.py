"""A tiny model under a real DeepSpeed engine, on forked ranks, for the checkpoint tests."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed.ops
import numpy as np
import torch

from megatron.checkpoint.load import LoadedState, LoadSettings, load_checkpoint, load_weights
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.save_settings import SaveSettings
from megatron.checkpoint.stored import StoredFacts
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.topology import Topology
from megatron.engine.assembly import ModuleSettings, build_module, initialize_engine
from megatron.engine.deepspeed_config import deepspeed_settings
from megatron.engine.distributed import ProcessGroups, RankEnvironment, connect
from megatron.engine.optimizers import build_optimizer
from megatron.engine.seeding import prepare_random_state, tensor_parallel_stream
from megatron.ledger.manifest import read_manifest
from megatron.model.facts import ModelFacts
from megatron.model.layer_plan import layer_plan
from megatron.model.loss import cross_entropy_loss
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings
from megatron.optim.param_groups import weight_decay_groups
from megatron.optim.schedules import LearningRateScheduler, ScheduleSettings
from tests.worlds import RankContext

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TinySettings:
    """What varies between the tests; the rest is the oracle's configuration ``a``."""

    topology: Topology
    precision: str = "fp32"
    zero_stage: int = 1
    dropout: float = 0.0
    gradient_accumulation_steps: int = 2
    grad_accum_dtype: str | None = None
    num_layers: int = 4
    hidden_size: int = 64
    heads: int = 4
    seq_length: int = 64
    padded_vocab_size: int = 320
    bias_multiplicity: int = 1
    gpt_j_residual: bool = True
    tied: bool = False
    lr: float = 2e-3
    weight_decay: float = 0.1
    clip: float = 0.0
    seed: int = 1234
    overrides: dict[str, Any] = field(default_factory=dict)  # of ModelSettings

    @property
    def model(self) -> ModelSettings:
        values: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads,
            "num_kv_heads": self.heads,
            "seq_length": self.seq_length,
            "max_position_embeddings": self.seq_length,
            "padded_vocab_size": self.padded_vocab_size,
            "tp_bias_multiplicity": self.bias_multiplicity,
            "rotary_dims": self.hidden_size // self.heads // 4,
            "mlp_up_size": 4 * self.hidden_size,
            "mlp_down_size": 4 * self.hidden_size,
            "gpt_j_residual": self.gpt_j_residual,
            "tied_embedding": self.tied,
            "hidden_dropout": self.dropout,
            "attention_dropout": self.dropout,
            "init_method": "small_init",
            "output_layer_init_method": "wang_init",
        }
        return ModelSettings(**(values | self.overrides))

    @property
    def model_arguments(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.seq_length,
            "make_vocab_size_divisible_by": 64,
            "padded_vocab_size": self.padded_vocab_size,
            "tokenizer_type": "HFTokenizer",
            "model_parallel_size": self.topology.tensor_parallel_size,
        }


class TinyRun:
    """One rank of a run: build it, load, train, save."""

    def __init__(
        self, context: RankContext, settings: TinySettings, *, weights_from: Path | None = None
    ) -> None:
        self.settings = settings
        self.groups = _groups(context, settings.topology)
        prepare_random_state(self.groups, settings.seed, partition_activations=False)
        tensor_parallel = (
            TensorParallel()
            if settings.topology.tensor_parallel_size == 1
            else TensorParallel.of_group(self.groups.tensor)
        )
        self._loss_function = functools.partial(_loss, tensor_parallel)
        plan = layer_plan(
            settings.model,
            tensor_parallel,
            seed=settings.seed,
            dtype=DTYPES[settings.precision],
            dropout_rng=tensor_parallel_stream,
        )
        self.module = build_module(
            plan,
            self.groups,
            self._loss_function,
            ModuleSettings("type:transformer|mlp", checkpoint_interval=0),
        )
        if weights_from is not None:
            load_weights(self.module, weights_from, self.load_settings, gather=self.groups.gather)
        self.engine = self._engine()
        self.iteration = 0
        self.saved: int | None = None  # commit sequence of the last save

    def _engine(self) -> Any:
        settings = self.settings
        optimizer = build_optimizer(
            weight_decay_groups(self.module, settings.weight_decay),
            optimizer_type="adam",
            params={"lr": settings.lr, "betas": [0.9, 0.95], "eps": 1e-8},
            weight_decay=settings.weight_decay,
        )
        schedule = ScheduleSettings(
            start_lr=settings.lr,
            min_lr=settings.lr / 10,
            warmup=0.1,
            decay_iters=20,
            decay_style="cosine",
        )
        extra = {}
        if settings.grad_accum_dtype:
            extra["data_types"] = {"grad_accum_dtype": settings.grad_accum_dtype}
        engine, _ = initialize_engine(
            self.module,
            self.groups,
            optimizer,
            LearningRateScheduler(optimizer, schedule),
            deepspeed_settings(
                {},
                geometry=BatchGeometry(
                    micro_batch_size=4,
                    data_parallel_size=settings.topology.data_parallel_size,
                    gradient_accumulation_steps=settings.gradient_accumulation_steps,
                ),
                precision=settings.precision,
                fp16={"initial_scale_power": 8},
                bf16=None,
                gradient_clipping=settings.clip,
                zero_optimization={"stage": settings.zero_stage},
                extra=extra,
            ),
        )
        return engine

    @property
    def load_settings(self) -> LoadSettings:
        return LoadSettings(
            self.settings.model,
            self.settings.model_arguments,
            self.settings.topology,
            self.groups.rank,
        )

    def load(self, directory: Path, **options: Any) -> LoadedState:
        state = load_checkpoint(
            self.engine, directory, self.load_settings, gather=self.groups.gather, **options
        )
        self.iteration = state.iteration
        return state

    def save(self, directory: Path, **options: Any) -> Path:
        facts = ModelFacts(self.settings.padded_vocab_size, self.settings.bias_multiplicity)
        settings = SaveSettings(
            directory=directory,
            model_arguments=self.settings.model_arguments,
            facts=StoredFacts(facts, self.settings.topology.tensor_parallel_size),
            config_files={"tiny.yml": "train_iters: 20\n"},
            **options,
        )
        saved = save_checkpoint(
            self.engine,
            self.iteration,
            settings,
            rank=self.groups.rank,
            world_size=self.groups.topology.world_size,
            gather=self.groups.gather,
            parent=self.saved,
        )
        manifest = read_manifest(saved)
        assert manifest is not None
        self.saved = manifest.sequence
        return saved

    def train(self, steps: int, batches: Any = None) -> list[float]:
        """Train and return the losses; every step's tokens depend on its number alone."""
        losses = []
        for _ in range(steps):
            source = self._batches(self.iteration) if batches is None else batches(self.iteration)
            if self.settings.topology.uses_pipeline_engine:
                losses.append(float(self.engine.train_batch(data_iter=source)))
            else:
                losses.append(self._sequential_step(source))
            self.iteration += 1
        return losses

    def _sequential_step(self, source: Iterator[Any]) -> float:
        total = 0.0
        steps = self.engine.gradient_accumulation_steps()
        for _ in range(steps):
            inputs, labels = next(source)
            loss = self._loss_function(self.engine(inputs), labels)
            self.engine.backward(loss)
            self.engine.step()
            total += float(loss.detach())
        return total / steps

    def _batches(self, iteration: int) -> Iterator[Any]:
        data_rank = self.groups.place.data_parallel_rank
        for micro_step in range(self.settings.gradient_accumulation_steps):
            generator = np.random.default_rng([iteration, micro_step, data_rank])
            tokens = generator.integers(0, 300, size=(4, self.settings.seq_length + 1))
            yield as_batch(tokens)

    def state(self) -> dict[str, Any]:
        """Return everything a resume must restore, tensors as digests of their bytes."""
        engine = self.engine
        optimizer = dict(engine.optimizer.state_dict())
        if "loss_scaler" in optimizer:
            optimizer["loss_scaler"] = vars(optimizer["loss_scaler"])
        return {
            "weights": _digested(dict(self.module.named_parameters())),
            "optimizer": _digested(optimizer),
            "scheduler": engine.lr_scheduler.state_dict(),
            "lr": engine.lr_scheduler.get_lr(),
            "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        }


def as_batch(tokens: np.ndarray) -> Any:
    whole = torch.from_numpy(tokens.astype(np.int64))
    inputs, labels = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
    return inputs, (labels, torch.ones(labels.shape))


def _groups(context: RankContext, topology: Topology) -> ProcessGroups:
    environment = RankEnvironment(
        context.rank, context.rank, context.world_size, context.init_method
    )
    if torch.distributed.is_initialized():
        raise AssertionError("one TinyRun per world, or pass its groups on")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return connect(environment, topology, backend="gloo")


def _loss(tensor_parallel: TensorParallel, logits: Any, labels: Any) -> torch.Tensor:
    return cross_entropy_loss(logits, *labels, tensor_parallel)


def _digested(value: Any) -> Any:
    if torch.is_tensor(value):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    if isinstance(value, dict):
        return {key: _digested(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_digested(item) for item in value]
    return value if isinstance(value, int | float | str | bool | type(None)) else repr(value)
