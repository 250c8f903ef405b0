"""Orders, blends and runs as plain lists: slow, obvious, and written without looking at ours.

Datasets are lists of document sizes. Every sample is spelled out as its tokens, every draw is made
one after the other, and a run remembers each sample it ever consumed.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron.ledger.ledger_file import DatasetNote, Ledger, ModelPart
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.orders import TokenSpans

SIZES = {
    "aaaa": (5, 3, 0, 7, 2, 9, 4),
    "bbbb": (6, 6, 1, 8),
    "cccc": (3, 3, 3, 3, 3, 3),
    "dddd": (20,),
    "eeee": (2, 11, 5),
}
NOTES = {
    dataset: DatasetNote(
        path=f"/data/{dataset[0]}",
        level="complete",
        num_documents=len(sizes),
        num_tokens=sum(sizes),
    )
    for dataset, sizes in SIZES.items()
}


@lru_cache(maxsize=4096)
def slow_samples(dataset, documents, seq_length, seed, head_epochs, count):
    """Return the first ``count`` samples of one component, each a list of (document, token).

    A sample has seq_length + 1 tokens; the last one is the next sample's first. NeoX never reaches
    the last shuffled sample of a head. A tail block is the fewest passes that give a sample.
    """
    rows = []
    if head_epochs is not None:
        rows += _block(dataset, documents, seq_length, seed, head_epochs)[:-1]
    block = 1
    tokens = sum(SIZES[dataset][document] for document in documents)
    passes = math.ceil((seq_length + 1) / tokens)
    while len(rows) < count:
        block_seed = int(np.random.SeedSequence([seed, block]).generate_state(1)[0])
        rows += _block(dataset, documents, seq_length, block_seed, passes)
        block += 1
    return rows[:count]


def _block(dataset, documents, seq_length, seed, passes):
    generator = np.random.RandomState(seed)
    walked = np.array(list(documents) * passes)
    generator.shuffle(walked)
    line = [
        (document, token)
        for document in walked.tolist()
        for token in range(SIZES[dataset][document])
    ]
    number = (len(line) - 1) // seq_length
    rows = [line[row * seq_length : (row + 1) * seq_length + 1] for row in range(number)]
    shuffled = np.arange(number)
    generator.shuffle(shuffled)
    return [rows[index] for index in shuffled]


def component_sample(order: OrderDescription, component: ComponentDescription, index: int):
    """Return (dataset, tokens) of a component's sample."""
    count = 64 * (index // 64 + 1)
    rows = slow_samples(
        component.dataset,
        tuple(range(component.first_document, component.stop_document)),
        order.seq_length,
        order.seed,
        component.head_epochs,
        count,
    )
    return component.dataset, rows[index]


@lru_cache(maxsize=256)
def slow_draws(weights, count):
    """Return the component of each of the first ``count`` draws.

    The draw divides by the sum itself, also of weights that were normalised before (spec/data.md
    §11): the last bit may change, and with it a tie.
    """
    total = sum(weights)
    weights = [weight / total for weight in weights]
    taken = [0] * len(weights)
    draws = []
    for number in range(count):
        lags = [
            weight * max(number, 1.0) - have for weight, have in zip(weights, taken, strict=True)
        ]
        draws.append(lags.index(max(lags)))
        taken[draws[-1]] += 1
    return tuple(draws)


def order_samples(order: OrderDescription, start: int, stop: int):
    """Return (component key, its sample's index) at the positions of an order."""
    return _first_samples(order, 64 * (stop // 64 + 1))[start:stop]


@lru_cache(maxsize=256)
def _first_samples(order, count):
    is_single = order.weights is None or len(order.components) == 1
    seen = Counter()
    found = []
    for draw in (0,) * count if is_single else slow_draws(order.weights, count):
        component = order.components[draw]
        found.append((component.key, component.start + seen[draw]))
        seen[draw] += 1
    return found


def consumed_tokens(order: OrderDescription, samples):
    """Count (dataset, document, token) over samples given as (component key, index)."""
    components = {component.key: component for component in order.components}
    tokens = Counter()
    for key, index in samples:
        dataset, row = component_sample(order, components[key], index)
        tokens.update((dataset, *token) for token in row[: order.seq_length])
    return tokens


@dataclass
class SlowSource:
    """A component's samples, as planning wants to read them."""

    order: OrderDescription

    @property
    def head_length(self) -> int:
        (component,) = self.order.components
        if component.head_epochs is None:
            return 0
        documents = range(component.first_document, component.stop_document)
        tokens = sum(SIZES[component.dataset][document] for document in documents)
        number = max(0, component.head_epochs * tokens - 1) // self.order.seq_length
        return max(0, number - 1)

    def spans(self, positions) -> TokenSpans:
        spans = []
        for row, position in enumerate(positions.tolist()):
            _, tokens = component_sample(self.order, self.order.components[0], position)
            previous = None
            for document, token in tokens:
                if previous == (document, token - 1):
                    spans[-1][3] += 1
                else:
                    spans.append([row, document, token, 1])
                previous = (document, token)
        columns = np.array(spans, dtype=np.int64).reshape(-1, 4).T
        return TokenSpans(*columns)


def component(dataset, *, documents=None, head_epochs=1, **others) -> ComponentDescription:
    first, stop = documents or (0, len(SIZES[dataset]))
    return ComponentDescription(
        dataset=dataset,
        first_document=first,
        stop_document=stop,
        head_epochs=head_epochs,
        **others,
    )


def order(*components, weights=None, seq_length=4, seed=1234, **others) -> OrderDescription:
    if len(components) > 1 and weights is None:
        weights = [1.0] * len(components)
    if weights is not None:
        total = sum(weights)
        weights = tuple(weight / total for weight in weights)
    return OrderDescription(
        components=components, weights=weights, seq_length=seq_length, seed=seed, **others
    )


def new_order(datasets, weights, num_samples, *, seq_length, seed) -> OrderDescription:
    """Return the order of a new run: heads long enough for its samples, 0.5 % more in a blend."""
    total = sum(weights)
    components = []
    for dataset, weight in zip(datasets, weights, strict=True):
        asked = num_samples
        if len(datasets) > 1:
            asked = math.ceil(num_samples * (weight / total) * 1.005)
        epochs = 1
        while (epochs * sum(SIZES[dataset]) - 1) // seq_length < asked:
            epochs += 1
        components.append(component(dataset, head_epochs=epochs))
    return order(
        *components,
        weights=None if len(datasets) == 1 else weights,
        seq_length=seq_length,
        seed=seed,
    )


def ledger_after(plan, steps: int, *, evaluations: int = 0, is_due: bool = False) -> Ledger:
    """Return what a checkpoint says after ``steps`` more steps of a plan."""
    streams = {}
    for name, stream in plan.streams.items():
        done = {"train": steps, "valid": evaluations, "test": 0}[name]
        last = stream.next_step - 1 + done
        position = stream.state.segments.positions(last + 1).start
        behind = stream.order_position + position - stream.state.next_position
        cursors = {one.key: one.start for one in stream.order.components}
        for key, index in order_samples(stream.order, 0, behind):
            cursors[key] = index + 1
        streams[name] = type(stream.state)(
            segments=stream.state.segments,
            next_position=position,
            cursors={**stream.state.cursors, **cursors},
        )
    return Ledger(
        model=ModelPart(padded_vocab_size=128, tp_bias_multiplicity=1, tensor_parallel_size=1),
        run_id="a1b2",
        step=plan.step + steps,
        streams=streams,
        orders=plan.orders,
        evaluation_due=is_due,
        datasets=plan.datasets,
        accepted=plan.accepted,
        adopted=plan.adopted,
    )
