"""An order is NeoX's maps, then blocks that depend on the seed and their number alone."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream.index_maps import (
    IndexMaps,
    PackedShape,
    build_packed_maps,
    epochs_needed,
)
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.mapped_order import MappedOrder
from megatron.stream.orders import TailBlocks, tail_seed
from tests.stream.recorded import GOLDEN, write_dataset


def open_order(dataset, *, seq_length, num_epochs, seed, documents=None):
    documents = range(len(dataset)) if documents is None else documents
    tokens = int(dataset.sizes[documents.start : documents.stop].sum())
    shape = PackedShape(documents, tokens, num_epochs, seq_length)
    tail = PackedShape(documents, tokens, epochs_needed(tokens, seq_length, 1), seq_length)
    return MappedOrder(
        dataset,
        seq_length,
        head=build_packed_maps(dataset.sizes, shape, seed),
        head_epochs=num_epochs,
        tail=TailBlocks(
            lambda block: build_packed_maps(dataset.sizes, tail, tail_seed(seed, block)),
            tail.num_samples,
        ),
        tail_epochs=tail.num_epochs,
    )


def read(order, positions):
    positions = np.array(positions, dtype=np.int64)
    out = np.zeros((len(positions), order.seq_length + 1), order.dataset.dtype)
    order.read(*order.locate(positions), out, np.arange(len(positions)))
    return out.tolist()


def slow_block(documents, numbers, num_epochs, seq_length, random):
    """All samples of one block in consumption order, from NumPy's generator and plain lists."""
    doc_idx = np.array(list(numbers) * num_epochs, dtype=np.int32)
    random.shuffle(doc_idx)
    row = list(itertools.chain.from_iterable(documents[number] for number in doc_idx))
    num_samples = (len(row) - 1) // seq_length
    samples = [row[s * seq_length : (s + 1) * seq_length + 1] for s in range(num_samples)]
    shuffle_idx = np.arange(num_samples, dtype=np.uint32)
    random.shuffle(shuffle_idx)
    return [samples[s] for s in shuffle_idx]


def slow_order(documents, numbers, num_epochs, seq_length, seed, num_positions):
    order = slow_block(documents, numbers, num_epochs, seq_length, np.random.RandomState(seed))[:-1]
    tokens = sum(len(documents[number]) for number in numbers)
    tail_epochs = next(e for e in itertools.count(1) if (e * tokens - 1) // seq_length >= 1)
    for block in itertools.count(1):
        if len(order) >= num_positions:
            return order[:num_positions]
        state = np.random.SeedSequence([seed, block]).generate_state(1)[0]
        order += slow_block(
            documents, numbers, tail_epochs, seq_length, np.random.RandomState(state)
        )


_DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=12).filter(
    any
)


@given(
    documents=_DOCUMENTS,
    data=st.data(),
    seq_length=st.integers(1, 20),
    num_epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_order_is_its_head_and_then_its_blocks(
    tmp_path_factory, documents, data, seq_length, num_epochs, seed
):
    start = data.draw(st.integers(0, len(documents) - 1))
    stop = data.draw(st.integers(start + 1, len(documents)))
    numbers = range(start, stop)
    assume(any(documents[number] for number in numbers))
    dataset = IndexedDataset(write_dataset(tmp_path_factory.mktemp("o") / "d", documents))
    order = open_order(
        dataset, seq_length=seq_length, num_epochs=num_epochs, seed=seed, documents=numbers
    )
    num_positions = order.head_length + 2 * order.block(1).num_samples + 3
    expected = slow_order(documents, numbers, num_epochs, seq_length, seed, num_positions)
    assert read(order, range(num_positions)) == expected
    shuffled = data.draw(st.permutations(range(num_positions)))
    assert read(order, shuffled) == [expected[position] for position in shuffled]


@pytest.mark.parametrize(("num_samples", "expected"), GOLDEN["packed_seq4_seed1234"].items())
def test_neoxs_items_are_the_head(tmp_path, num_samples, expected):
    dataset = IndexedDataset(write_dataset(tmp_path / "t", GOLDEN["docs"]))
    epochs = len(expected["doc_idx"]) // 5
    order = open_order(dataset, seq_length=4, num_epochs=epochs, seed=1234)
    assert order.head_length == expected["len"]
    items = expected["items"]
    assert read(order, range(len(items))) == items


def test_a_longer_head_does_not_change_the_blocks(tmp_path):
    dataset = IndexedDataset(write_dataset(tmp_path / "t", GOLDEN["docs"]))
    short, long = (
        open_order(dataset, seq_length=4, num_epochs=epochs, seed=9) for epochs in (1, 3)
    )
    tails = [
        read(order, range(order.head_length, order.head_length + 30)) for order in (short, long)
    ]
    assert tails[0] == tails[1]


@pytest.mark.parametrize(
    ("seed", "block", "expected"),
    [(1234, 1, 2900015356), (1234, 2, 4259972370), (0, 1, 3964924996)],
)
def test_the_seeds_of_blocks_never_change(seed, block, expected):
    assert tail_seed(seed, block) == expected


def test_spans_name_the_documents_of_a_sample(tmp_path):
    documents = [[1, 2, 3, 0], [], [4, 5, 0], [6, 0], [7, 8, 9, 10, 11, 0], [12, 13, 0]]
    dataset = IndexedDataset(write_dataset(tmp_path / "t", documents))
    order = open_order(dataset, seq_length=4, num_epochs=2, seed=3)
    positions = np.arange(order.head_length + 5)
    spans = order.spans(*order.locate(positions))
    assert spans.row.tolist() == sorted(spans.row.tolist())
    assert spans.length.min() >= 1
    rows = [[] for _ in positions]
    for row, document, start, length in zip(
        spans.row, spans.document, spans.start, spans.length, strict=True
    ):
        rows[row] += documents[document][start : start + length]
    assert rows == read(order, positions)


def test_a_negative_position_is_refused(tmp_path):
    dataset = IndexedDataset(write_dataset(tmp_path / "t", GOLDEN["docs"]))
    order = open_order(dataset, seq_length=4, num_epochs=1, seed=3)
    with pytest.raises(ValueError, match="positions must be >= 0, got -2"):
        order.locate(np.array([3, -2]))


def test_a_map_that_moves_tokens_from_one_sample_to_the_next_is_an_error(tmp_path):
    dataset = IndexedDataset(write_dataset(tmp_path / "t", GOLDEN["docs"]))
    good = open_order(dataset, seq_length=4, num_epochs=1, seed=3)
    sample_idx = good.head.sample_idx.copy()
    sample_idx[2] = sample_idx[1]
    bad = MappedOrder(
        dataset,
        4,
        head=IndexMaps(good.head.doc_idx, sample_idx, good.head.shuffle_idx),
        head_epochs=1,
        tail=good.tail,
    )
    with pytest.raises(DatasetError, match=r"index maps give 1 for one of them; delete"):
        read(bad, range(3))
