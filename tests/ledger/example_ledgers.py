"""Ledgers to test with: hypothesis strategies of whole ones, and small ones by hand."""

from hypothesis import strategies as st

from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.instructions import Instruction
from megatron.ledger.ledger_file import (
    AcceptedChange,
    Adoption,
    Amount,
    DatasetNote,
    Ledger,
    ModelPart,
    ObeyedInstruction,
    Parent,
    Span,
    StreamState,
    TokenizerIdentity,
)
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.segments import Segment, SegmentTable

counts = st.integers(min_value=0, max_value=2**40)
sizes = st.integers(min_value=1, max_value=2**20)
names = st.text(min_size=1, max_size=8)
digests = st.integers(min_value=0, max_value=2**64 - 1).map(lambda number: f"{number:016x}")

components = st.builds(
    ComponentDescription,
    dataset=digests,
    first_document=counts,
    stop_document=counts,
    head_epochs=st.none() | sizes,
    start=counts,
)


@st.composite
def orders(draw):
    """Return an order of one to three components."""
    several = draw(st.lists(components, min_size=1, max_size=3))
    weights = st.floats(min_value=0, max_value=1)
    return OrderDescription(
        components=tuple(several),
        weights=tuple(draw(weights) for _ in several) if len(several) > 1 else None,
        seq_length=draw(sizes),
        seed=draw(counts),
    )


@st.composite
def segment_tables(draw, order_ids):
    """Return one to three segments that fit together."""
    segments, step, position = [], 1, draw(counts)
    for order_id, batch_size in draw(
        st.lists(st.tuples(st.sampled_from(order_ids), sizes), min_size=1, max_size=3)
    ):
        segments.append(
            Segment(
                first_step=step,
                batch_size=batch_size,
                first_position=position,
                order_id=order_id,
                first_order_position=draw(counts),
            )
        )
        more = draw(sizes)
        step, position = step + more, position + more * batch_size
    return SegmentTable(tuple(segments))


parents = st.recursive(
    st.none(),
    lambda inner: st.builds(
        Parent,
        run_id=names,
        step=counts,
        chain=digests,
        save=names,
        is_continued=st.booleans(),
        parent=inner,
    ),
    max_leaves=2,
)
instructions = st.builds(
    Instruction,
    kind=st.sampled_from(["iteration", "finetune", "load", "start"]),
    iteration=st.none() | counts,
    load=st.none() | names,
)
amounts = st.builds(
    Amount, tokens=counts, documents=counts, samples=st.floats(min_value=0, max_value=1e12)
)


@st.composite
def ledgers(draw):
    """Return a ledger with anything in it."""
    described = draw(st.lists(orders(), min_size=1, max_size=2))
    by_id = {order.order_id: order for order in described}
    geometries = st.builds(BatchGeometry, sizes, sizes, sizes)
    return Ledger(
        model=draw(st.builds(ModelPart)),
        run_id=draw(names),
        step=draw(counts),
        streams={
            name: StreamState(
                segments=draw(segment_tables(sorted(by_id))),
                next_position=draw(counts),
                cursors=draw(st.dictionaries(names, counts, max_size=2)),
            )
            for name in draw(st.sets(st.sampled_from(["train", "valid", "test"])))
        },
        orders=by_id,
        spans=draw(
            st.lists(
                st.builds(
                    Span,
                    run_id=names,
                    attempt=sizes,
                    chain=digests,
                    digest_sum=digests,
                    numerics=names,
                    geometry=st.none() | geometries,
                ),
                max_size=3,
            ).map(tuple)
        ),
        evaluation_due=draw(st.booleans()),
        tokenizer=draw(
            st.none() | st.builds(TokenizerIdentity, files=st.lists(digests, max_size=2).map(tuple))
        ),
        datasets=draw(st.dictionaries(digests, st.builds(DatasetNote), max_size=2)),
        parent=draw(parents),
        instructions=draw(
            st.lists(st.builds(ObeyedInstruction, instruction=instructions), max_size=2).map(tuple)
        ),
        adopted=draw(
            st.none()
            | st.builds(
                Adoption,
                assumed=st.lists(names, max_size=2).map(tuple),
                geometry=st.none() | geometries,
            )
        ),
        accepted=draw(
            st.lists(
                st.builds(
                    AcceptedChange,
                    keys=st.lists(names, max_size=2).map(tuple),
                    repeated=amounts,
                    skipped=amounts,
                    new=amounts,
                ),
                max_size=2,
            ).map(tuple)
        ),
    )


def small_ledger(**changes) -> Ledger:
    """Return the ledger of a new run at step 0: one dataset, four samples per step."""
    component = ComponentDescription(
        dataset="d1", first_document=0, stop_document=10, head_epochs=1
    )
    order = OrderDescription(components=(component,), weights=None, seq_length=16, seed=1234)
    segment = Segment(
        first_step=1,
        batch_size=4,
        first_position=0,
        order_id=order.order_id,
        first_order_position=0,
    )
    values = {
        "model": ModelPart(padded_vocab_size=128, tp_bias_multiplicity=1, tensor_parallel_size=1),
        "run_id": "0123456789abcdef",
        "step": 0,
        "streams": {
            name: StreamState(segments=SegmentTable((segment,)), next_position=0)
            for name in ("train", "valid")
        },
        "orders": {order.order_id: order},
    }
    return Ledger(**(values | changes))
