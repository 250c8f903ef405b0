"""Plans over real files: what is counted are the stream's own orders."""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron.base.errors import DatasetError
from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.planning import Counting, Found, Wanted, plan_resume
from megatron.stream.descriptions import describe_streams, open_order_alone
from megatron.stream.indexed_dataset import IndexedDatasetBuilder
from megatron.stream.sample_counts import SplitCounts
from megatron.stream.stream_settings import StreamSettings, identify_datasets
from tests.ledger.planning.slow_world import ledger_after

_BATCH, _STEPS = 4, 30


def write(prefix, sizes, first_token):
    """Write a dataset in which every token is another number."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for size in sizes:
        builder.add_item(np.arange(first_token, first_token + size, dtype=np.int32))
        builder.end_document()
        first_token += size
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def settings(tmp_path):
    generator = np.random.default_rng(3)
    write(tmp_path / "a", generator.integers(1, 40, 30), first_token=0)
    write(tmp_path / "b", generator.integers(1, 90, 12), first_token=100_000)
    return StreamSettings(
        seq_length=16,
        seed=1234,
        train_data_paths=(str(tmp_path / "a"), str(tmp_path / "b")),
        train_data_weights=(2.0, 1.0),
    )


class Launch:
    """What one configuration asks for, by the stream's own means."""

    def __init__(self, settings, **keys):
        self.identities = identify_datasets(settings)
        requested = SplitCounts(train=_BATCH * _STEPS, valid=0, test=0)
        self.order = describe_streams(settings, requested, self.identities)["train"]
        self.wanted = Wanted(
            orders={"train": self.order},
            datasets={
                identity.digest: DatasetNote(
                    path=files.prefix,
                    level=identity.level,
                    num_documents=identity.num_documents,
                    num_tokens=identity.num_tokens,
                )
                for files, identity in self.identities.items()
            },
            train_batch_size=_BATCH,
            gradient_accumulation_steps=1,
            train_iters=_STEPS,
            eval_interval=None,
            eval_iters=0,
            **keys,
        )

    def locate(self, dataset):
        for files, identity in self.identities.items():
            if identity.digest == dataset:
                return files
        raise DatasetError(f"{dataset} is not to be found")

    @property
    def counting(self):
        return Counting(
            open_order=functools.partial(open_order_alone, locate_dataset=self.locate),
            counts_neox=True,
        )

    def tokens(self, order, positions):
        """Count every token of samples; a sample's last token belongs to the next."""
        stream = open_order_alone(order, self.locate)
        return Counter(stream.read(np.array(positions))[:, :-1].ravel().tolist())


def found_after(launch, steps):
    ledger = ledger_after(plan_resume(launch.wanted, None), 0)
    position = steps * _BATCH
    cursors = open_order_alone(launch.order, launch.locate).component_cursors(position)
    state = replace(ledger.streams["train"], next_position=position, cursors=cursors)
    record = replace(ledger, step=steps, streams={"train": state})
    return Found(path=f"/save/global_step{steps}", record=record)


@pytest.mark.parametrize(
    "change",
    [{"seed": 7}, {"seq_length": 24}, {"data_order": "shuffled", "seed": 3, "seq_length": 9}],
)
def test_counts_of_a_refusal_are_those_of_reading_every_token(settings, change):
    first = Launch(settings)
    now = Launch(replace(settings, **change))
    plan = plan_resume(now.wanted, found_after(first, 11), now.counting)
    remaining = _BATCH * (_STEPS - 11)
    undisturbed = first.tokens(first.order, range(44, 44 + remaining))
    entered = 44 * 16 // now.order.seq_length
    instead = now.tokens(now.order, range(entered, entered + remaining))
    counted = plan.data_break.comparison
    assert counted.repeated.tokens == (instead - undisturbed).total() > 0
    assert counted.skipped.tokens == (undisturbed - instead).total() > 0
    assert plan.kind == "refuse"


def test_a_change_of_weights_reads_on_without_repeating_or_skipping(settings):
    first = Launch(settings)
    now = Launch(replace(settings, train_data_weights=(1.0, 1.0)))
    plan = plan_resume(now.wanted, found_after(first, 11), now.counting)
    assert plan.kind == "new_segment"
    consumed = Counter()
    for order, number in ((first.order, 44), (plan.train.order, 76)):
        refs = open_order_alone(order, first.locate).locate(range(number))
        consumed.update(
            zip(refs.dataset.tolist(), refs.block.tolist(), refs.sample.tolist(), strict=True)
        )
    assert set(consumed.values()) == {1}
    assert plan.neox.comparison.repeated


def test_datasets_that_were_changed_in_place_are_refused(settings, tmp_path):
    first = Launch(settings)
    found = found_after(first, 11)
    content = bytearray((tmp_path / "b.bin").read_bytes())
    content[40] ^= 1
    (tmp_path / "b.bin").write_bytes(content)
    now = Launch(settings)
    plan = plan_resume(now.wanted, found, now.counting)
    assert plan.data_break.keys == ("data",)
    counted = plan.data_break.comparison
    assert counted.new.tokens == counted.skipped.tokens > 0
    assert not counted.repeated
    assert counted.skipped.documents is None
    assert 0 < counted.new.documents <= 12
