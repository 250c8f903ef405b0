"""What a checkpoint says of the run so far, whether observed or worked out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from megatron.base.errors import CheckpointError
from megatron.ledger.ledger_file import (
    AcceptedChange,
    Adoption,
    DatasetNote,
    Ledger,
    StreamState,
    TokenizerIdentity,
)
from megatron.ledger.planning.component_ranges import cursors_at
from megatron.ledger.planning.inputs import ForeignCheckpoint, Found
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.segments import Segment, SegmentTable

__all__ = ["Past", "StreamPast"]


@dataclass(frozen=True)
class StreamPast:
    """One stream up to a checkpoint; it has at least one segment."""

    state: StreamState
    orders: Mapping[str, OrderDescription]

    @property
    def order(self) -> OrderDescription:
        """The order that goes on if nothing is changed."""
        return self.orders[self.last_segment.order_id]

    @property
    def order_position(self) -> int:
        """Where that order goes on."""
        return self.last_segment.order_position(self.state.next_position)

    @property
    def components_read(self) -> tuple[ComponentDescription, ...]:
        """The components that the stream may have drawn from, those dropped meanwhile too."""
        orders = (self.orders[segment.order_id] for segment in self.state.segments)
        return tuple(
            {
                component.key: component
                for order in orders
                for component in order.components
                if component.key in self.state.cursors
            }.values()
        )

    @property
    def last_segment(self) -> Segment:
        """The segment of the next step, as it was planned when the checkpoint was written."""
        return self.state.segments.at_step(self.steps_done + 1)

    @property
    def steps_done(self) -> int:
        """Steps, or evaluations, whose samples are consumed.

        Raises:
            CheckpointError: the next position is inside one.
        """
        table, position = self.state.segments, self.state.next_position
        step = table.step_of(position)
        first = table.positions(step).start
        if first != position:
            raise CheckpointError(
                f"the ledger's next position {position} is inside step {step} of the stream, which "
                f"begins at {first}; the file was damaged or edited"
            )
        return step - 1

    @property
    def consumed_tokens(self) -> int:
        """Tokens consumed over all segments, whatever their seq_length was."""
        segments = tuple(self.state.segments)
        ends = [*(one.first_position for one in segments[1:]), self.state.next_position]
        return sum(
            (min(end, self.state.next_position) - one.first_position)
            * self.orders[one.order_id].seq_length
            for one, end in zip(segments, ends, strict=True)
            if one.first_position < self.state.next_position
        )


@dataclass(frozen=True, kw_only=True)
class Past:
    """The run up to a checkpoint."""

    step: int
    run_id: str | None  # None: adopted
    states: Mapping[str, StreamState]
    orders: Mapping[str, OrderDescription]
    datasets: Mapping[str, DatasetNote]
    tokenizer: TokenizerIdentity | None = None
    evaluation_due: bool = False
    accepted: tuple[AcceptedChange, ...] = ()
    adopted: Adoption | None = None

    @classmethod
    def of(cls, found: Found) -> Self:
        """Read a ledger, or work out what a checkpoint without one must have consumed."""
        if isinstance(found.record, Ledger):
            return cls._of_ledger(found.record)
        return cls._of_foreign(found.path, found.record)

    def stream(self, name: str) -> StreamPast | None:
        """Return a stream; None if the run has had none of that name."""
        state = self.states.get(name)
        if state is None or not state.segments.segments:
            return None
        return StreamPast(state, self.orders)

    @classmethod
    def _of_ledger(cls, ledger: Ledger) -> Self:
        return cls(
            step=ledger.step,
            run_id=ledger.run_id,
            states=ledger.streams,
            orders=ledger.orders,
            datasets=ledger.datasets,
            tokenizer=ledger.tokenizer,
            evaluation_due=ledger.evaluation_due,
            accepted=ledger.accepted,
            adopted=ledger.adopted,
        )

    @classmethod
    def _of_foreign(cls, path: str, foreign: ForeignCheckpoint) -> Self:
        batch_size = foreign.train_batch_size
        # NeoX counts iteration // eval_interval evaluations of eval_iters * gas micro batches each,
        # the one at this very step included: eval_iters global batches.
        evaluations = foreign.step // foreign.eval_interval if foreign.eval_interval else 0
        consumed = {
            "train": (foreign.step, batch_size),
            "valid": (evaluations, foreign.eval_iters * batch_size),
            "test": (0, foreign.eval_iters * batch_size),
        }
        states: dict[str, StreamState] = {}
        orders: dict[str, OrderDescription] = {}
        for name, order in foreign.orders.items():
            steps, per_step = consumed[name]
            if order is None or per_step == 0:
                continue
            orders[order.order_id] = order
            segment = Segment(
                first_step=1,
                batch_size=per_step,
                first_position=0,
                order_id=order.order_id,
                first_order_position=0,
            )
            states[name] = StreamState(
                segments=SegmentTable((segment,)),
                next_position=steps * per_step,
                cursors=cursors_at(order, steps * per_step),
            )
        assumed = (
            f"all {foreign.step} steps took the {batch_size} samples that the configuration saved "
            f"with the checkpoint and its dp_world_size {foreign.data_parallel_size} give, in one "
            "order from its beginning",
            f"{evaluations} evaluations of {foreign.eval_iters * batch_size} validation samples",
            *foreign.assumed,
        )
        return cls(
            step=foreign.step,
            run_id=None,
            states=states,
            orders=orders,
            datasets=foreign.datasets,
            tokenizer=foreign.tokenizer,
            adopted=Adoption(
                source=path, step=foreign.step, assumed=assumed, geometry=foreign.geometry
            ),
        )
