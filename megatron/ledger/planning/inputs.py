"""What a resume is planned from: what is asked for, and what was found in the directory to load."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.ledger_file import DatasetNote, Ledger, TokenizerIdentity
from megatron.stream.order_description import OrderDescription
from megatron.stream.orders import TokenSpans

__all__ = [
    "DATA_CHANGES",
    "ForeignCheckpoint",
    "Found",
    "LearningRates",
    "OpenOrder",
    "SampleSource",
    "StreamName",
    "Wanted",
]

StreamName = Literal["train", "valid", "test"]

DATA_CHANGES = ("seed", "seq_length", "split", "packing", "tokenizer", "data")
"""What ``accept_data_change`` may name: changes after which no exact continuation exists."""


class SampleSource(Protocol):
    """The samples of an order that has one component and begins at its start."""

    @property
    def head_length(self) -> int:
        """Positions before tail block 1; 0 without a head."""

    def spans(self, positions: NDArray[np.int64]) -> TokenSpans:
        """Return what the samples at ``positions`` are made of; ``row`` counts the positions."""


OpenOrder = Callable[[OrderDescription], SampleSource]
"""Opens an order to be counted; raises a DatasetError where its content isn't to be had."""


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """A learning-rate schedule, as far as a resume compares it."""

    values: Mapping[str, float | str]  # what NeoX's scheduler compares, by its state's names
    at: Callable[[int], float]  # the rate after so many optimizer steps


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the configuration asks for, with the datasets it names looked at."""

    orders: Mapping[StreamName, OrderDescription | None]
    """As a new run of this configuration would have them; None: nothing is read."""
    datasets: Mapping[str, DatasetNote]  # by identity, all that the orders name
    train_batch_size: int
    gradient_accumulation_steps: int
    train_iters: int
    eval_interval: int | None  # None: no evaluations between steps
    eval_iters: int
    division: tuple[int, int, int] | None = None
    """Under elastic_batch, how the batch is divided: micro batch, accumulation, ranks."""
    tokenizer: TokenizerIdentity | None = None
    accept_data_change: frozenset[str] = frozenset()
    finetune: bool = False
    restores_optimizer: bool = True  # False: no_load_optim
    restores_random_state: bool = True  # False: no_load_rng
    is_recorded: bool = True  # False: no `save`
    learning_rates: LearningRates | None = None
    schedule_choice: Literal["refuse", "configured", "checkpoint"] = "refuse"
    """What to do when the checkpoint's schedule is another one: override_lr_scheduler takes the
    configured one, use_checkpoint_lr_scheduler the checkpoint's."""
    numerics: Mapping[str, str | int | float] = field(default_factory=dict)
    """What changes rounding and nothing else: topology, micro batch, threads, versions."""
    without_effect: Mapping[str, str | int | float | None] = field(default_factory=dict)
    """What changes neither samples nor numbers and is worth a line: train_iters, num_workers."""
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    """What a step computes with: keys of the model, the optimizer and the learning rate."""
    train_epochs: int | None = None
    epoch_samples: Mapping[str, int] = field(default_factory=dict)
    """Samples of one pass, by component key; needed to say how often each dataset is passed."""
    notices: tuple[str, ...] = ()  # sentences on the data


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """What a checkpoint without a ledger and the configuration saved with it tell."""

    step: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_size: int  # the checkpoint's dp_world_size
    eval_interval: int | None
    eval_iters: int
    orders: Mapping[StreamName, OrderDescription | None]  # as that configuration describes them
    datasets: Mapping[str, DatasetNote]
    tokenizer: TokenizerIdentity | None = None
    assumed: tuple[str, ...] = ()  # sentences: what had to be taken from elsewhere

    @property
    def geometry(self) -> BatchGeometry:
        """How its steps' batches were divided."""
        return BatchGeometry(
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.data_parallel_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )

    @property
    def train_batch_size(self) -> int:
        """Samples its steps consumed."""
        return self.geometry.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Found:
    """The checkpoint a launch loads."""

    path: str  # its directory
    record: Ledger | ForeignCheckpoint
    newest_step: int | None = None
    """Newest checkpoint of the run before this launch; above the loaded one: a roll-back."""
    reason: str = ""  # why this checkpoint and no other, if there is something to say
    learning_rates: LearningRates | None = None
    optimizer_steps: int | None = None  # the schedule's count: steps without overflows
    numerics: Mapping[str, str | int | float] | None = None  # None: not known
    division: tuple[int, int, int] | None = None  # as in Wanted; None: not known
    without_effect: Mapping[str, str | int | float | None] | None = None
    settings: Mapping[str, str | int | float] | None = None
    foreign_state: tuple[str, ...] = ()  # what of its state isn't the trained run's, in words

    @property
    def step(self) -> int:
        """The step that is done."""
        return self.record.step
