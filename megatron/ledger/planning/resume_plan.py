"""What a launch will do: the outcome of planning, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron.base.errors import ConfigError
from megatron.ledger.ledger_file import AcceptedChange, Adoption, Amount, DatasetNote
from megatron.ledger.planning.continuation import StreamPlan
from megatron.ledger.planning.data_changes import Change
from megatron.ledger.planning.inputs import StreamName
from megatron.ledger.planning.neox_rule import NeoxRule
from megatron.ledger.planning.token_counts import Comparison
from megatron.stream.order_description import OrderDescription

__all__ = ["DataBreak", "Kind", "ResumePlan"]

Kind = Literal["new", "finetune", "continue", "new_segment", "adopt", "refuse"]


@dataclass(frozen=True, kw_only=True)
class DataBreak:
    """Where an order ends that can't be continued, and what another one costs."""

    keys: tuple[str, ...]  # of accept_data_change
    is_accepted: bool
    horizon_step: int  # counted up to here: the configured train_iters
    enters_at: int  # sample of the new order, after as many tokens as were consumed
    neox_enters_at: int  # iteration x train_batch_size
    comparison: Comparison | None  # with the undisturbed order; None: not counted
    at_most: Comparison  # what it cannot exceed
    not_counted: str = ""  # why

    def record(self, step: int) -> AcceptedChange:
        """Return what ``ledger.json`` says of it for ever, once it is accepted after ``step``.

        What could not be counted is recorded as its upper bound, and as an estimate.
        """
        counted = (self.comparison or self.at_most).parts
        bounds = self.at_most.parts

        def amount(name: str) -> Amount:
            part = counted[name]
            documents = bounds[name].documents if part.documents is None else part.documents
            return Amount(tokens=part.tokens, documents=documents or 0, samples=part.samples)

        return AcceptedChange(
            after_step=step,
            keys=self.keys,
            repeated=amount("repeated"),
            skipped=amount("skipped"),
            new=amount("new"),
            horizon_step=self.horizon_step,
            is_exact=self.is_counted,
        )

    @property
    def is_counted(self) -> bool:
        """Whether every number is known."""
        if self.comparison is None:
            return False
        return all(part.documents is not None for part in self.comparison.parts.values())


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """Where a launch goes on, in which order, and what that repeats or skips."""

    kind: Kind
    step: int  # steps done; the first one taken is the next
    train_iters: int
    source: str | None  # the checkpoint's directory; None: nothing is loaded
    source_step: int | None  # of the checkpoint, also if a new run begins with its weights
    run_id: str | None  # of the run that is continued, or the parent's; None: unknown or none
    reason: str  # why this checkpoint, if there is something to say
    streams: Mapping[StreamName, StreamPlan]
    orders: Mapping[str, OrderDescription]  # by order_id, all that the streams' segments name
    datasets: Mapping[str, DatasetNote]  # by identity, all of the lineage, where they lie now
    evaluates_first: bool  # before the next step: the evaluation due at the checkpoint
    changes: tuple[Change, ...] = ()
    data_break: DataBreak | None = None
    neox: NeoxRule | None = None  # None: nothing to compare
    neox_notes: tuple[str, ...] = ()
    accepted: tuple[AcceptedChange, ...] = ()  # of the lineage, this launch's included
    adopted: Adoption | None = None
    abandoned: tuple[int, int] | None = None  # steps that a roll-back leaves behind, both included
    numerics: tuple[str, ...] = ()  # differences that change rounding
    settings: tuple[str, ...] = ()  # changed keys that a step computes with
    not_restored: tuple[str, ...] = ()  # parts of the state: keys that say so, or in words
    notices: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()  # why the launch is refused
    passes: Mapping[str, float] = field(default_factory=dict)
    """How often each dataset is passed by train_iters, by its name, under train_epochs."""

    @property
    def next_step(self) -> int:
        """The first step this launch takes."""
        return self.step + 1

    @property
    def train(self) -> StreamPlan:
        """The training stream."""
        return self.streams["train"]

    @property
    def exit_status(self) -> int:
        """Return 0 if the launch goes ahead, 1 if it is refused, 2 if what it costs is unknown."""
        if self.problems:
            return 1
        return 2 if self.data_break is not None and self.data_break.comparison is None else 0

    @property
    def data_exactness(self) -> str:
        """Say in a sentence what becomes of the data."""
        if self.data_break is not None:
            if not self.data_break.is_accepted:
                return "refused: there is no exact continuation"
            return f"not exact from step {self.next_step} on, as accepted: " + ", ".join(
                self.data_break.keys
            )
        if self.kind in ("new", "finetune"):
            return "exact: every position is consumed once, from 0"
        so_far = f"steps 1..{self.step} are computed, not observed; " if self.adopted else ""
        return f"{so_far}exact: nothing is repeated, nothing skipped"

    @property
    def numbers_exactness(self) -> str:
        """Say in a sentence how losses and weights compare with an undisturbed run's."""
        if self.kind in ("new", "finetune"):
            return "a run of its own"
        if self.not_restored:
            return f"not those of an undisturbed run ({', '.join(self.not_restored)})"
        changing = [change for change in self.changes if change.effect != "none"]
        if self.data_break is not None or any(one.stream == "train" for one in changing):
            return "those of a run with other data from here on"
        if self.settings:
            return f"those of a run with other settings from here on ({'; '.join(self.settings)})"
        if self.numerics:
            return f"equal to rounding ({'; '.join(self.numerics)})"
        return "bitwise those of an undisturbed run"

    def raise_if_refused(self) -> None:
        """Stop a launch that would break the data order or the learning rate unasked.

        Raises:
            ConfigError: with every problem, its numbers, and what to do.
        """
        if self.problems:
            raise ConfigError(*self.problems)
