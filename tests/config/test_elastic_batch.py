"""The same global batch at any number of ranks, or an error that names the numbers that work."""

import re
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.config.batch_geometry import BatchGeometry, SampleSlot
from megatron.config.derivations.elastic import divide_batch, nearest_rank_counts
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.config.transport import encode_config, load_transported
from tests.config.configurations import MODEL, no_slots, trainable

sizes = st.integers(min_value=1, max_value=96)
TWELVE = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}


def load(ranks, **keys):
    values = {**MODEL, "elastic_batch": True, "global_num_gpus": ranks, **keys}
    return load_config([], values, local_slots=no_slots, environ={})


def geometry(config):
    divided = config.geometry
    return (
        divided.micro_batch_size,
        divided.gradient_accumulation_steps,
        divided.data_parallel_size,
    )


@given(share=sizes, ranks=sizes, largest=sizes)
def test_the_batch_is_kept_and_the_micro_batch_is_the_largest_divisor_that_fits(
    share, ranks, largest
):
    total = share * ranks
    micro, accumulation = divide_batch(total, ranks, largest_micro_batch=largest)
    assert micro * accumulation * ranks == total
    assert micro <= largest
    assert all(share % size for size in range(micro + 1, min(largest, share) + 1))


@given(total=sizes, ranks=sizes, largest=sizes)
def test_only_ranks_without_equal_shares_have_no_division(total, ranks, largest):
    divided = divide_batch(total, ranks, largest_micro_batch=largest)
    assert (divided is None) == (total % ranks != 0)


@given(total=sizes, ranks=sizes, largest=sizes)
def test_dividing_what_was_divided_changes_nothing(total, ranks, largest):
    """A rank works its batch out again, from the micro batch that the launcher worked out."""
    assume(total % ranks == 0)
    micro, accumulation = divide_batch(total, ranks, largest_micro_batch=largest)
    assert divide_batch(total, ranks, largest_micro_batch=micro) == (micro, accumulation)


@given(total=sizes, ranks=st.integers(1, 300), per_replica=st.integers(1, 8))
def test_the_nearest_rank_counts_work_and_none_between_does(total, ranks, per_replica):
    def works(count):
        return count > 0 and count % per_replica == 0 and total % (count // per_replica) == 0

    nearest = nearest_rank_counts(total, ranks, ranks_per_replica=per_replica)
    assert list(nearest) == sorted(
        [count for count in range(1, ranks) if works(count)][-1:]
        + [count for count in range(ranks + 1, total * per_replica + 1) if works(count)][:1]
    )


@given(total=sizes, largest=sizes, step=st.integers(0, 20))
def test_each_step_consumes_the_same_positions_at_every_number_of_ranks(total, largest, step):
    expected = range(step * total, (step + 1) * total)
    for ranks in range(1, total + 1):
        divided = divide_batch(total, ranks, largest_micro_batch=largest)
        if divided is None:
            continue
        batch = BatchGeometry(divided[0], ranks, divided[1])
        consumed = Counter(
            batch.position(SampleSlot(step, micro_step, rank, row))
            for micro_step in range(batch.gradient_accumulation_steps)
            for rank in range(ranks)
            for row in range(batch.micro_batch_size)
        )
        assert consumed == Counter(expected)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, (2, 6, 1)),
        (2, (2, 3, 2)),
        (3, (2, 2, 3)),
        (4, (1, 3, 4)),
        (6, (2, 1, 6)),
        (12, (1, 1, 12)),
    ],
)
def test_twelve_samples_are_divided_over_the_ranks_there_are(ranks, expected):
    config = load(ranks, **TWELVE)
    assert geometry(config) == expected
    keys = config.deepspeed
    assert (keys.train_batch_size, keys.train_micro_batch_size_per_gpu) == (12, expected[0])
    assert keys.gradient_accumulation_steps == expected[1]
    assert config.training.batch_size == expected[0]


def test_copies_of_the_model_count_not_ranks():
    config = load(12, pipe_parallel_size=2, model_parallel_size=2, **TWELVE)
    assert geometry(config) == (2, 2, 3)


def test_every_rank_divides_the_batch_as_the_launcher_does():
    config = load(
        4, gradient_accumulation_steps=3, **trainable(**{**TWELVE, "train_batch_size": 28})
    )
    arguments = encode_config(config)
    assert geometry(config) == (1, 7, 4)
    assert geometry(load_transported(arguments)) == (1, 7, 4)


@pytest.mark.parametrize(
    ("ranks", "keys", "message"),
    [
        (
            5,
            TWELVE,
            "train_batch_size=12 (override) can't be shared out evenly over data-parallel size 5 "
            "(5 ranks); elastic_batch works with 4 or 6 ranks: take fewer with num_nodes, num_gpus",
        ),
        (
            26,
            {**TWELVE, "model_parallel_size": 2},
            "data-parallel size 13 (26 ranks); elastic_batch works with 24 ranks: take fewer",
        ),
        (
            11,
            {**TWELVE, "pipe_parallel_size": 2},
            "11 ranks (global_num_gpus=11 (override)) can't be divided by pipe_parallel_size=2 "
            "(override) x model_parallel_size=1 (default) = 2: the data-parallel size must be a "
            "whole number; nearest: 8 or 12 ranks",
        ),
        (
            4,
            {"train_batch_size": 12},
            "elastic_batch needs train_micro_batch_size_per_gpu: how many samples a rank has room "
            "for",
        ),
        (
            4,
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            "elastic_batch needs train_batch_size: how many samples a step takes, whatever the "
            "number of ranks. Left to these 4 ranks it would be 2 x 3 x 4 = 24; of a run",
        ),
        (4, {**TWELVE, "train_batch_size": 0}, "train_batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_divided_says_which_numbers_work(ranks, keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(ranks, **keys)


def test_without_the_key_the_error_says_that_there_is_one():
    values = {**MODEL, "global_num_gpus": 3, **TWELVE}
    hint = "write gradient_accumulation_steps: 2, or null to have it worked out; or elastic_batch"
    with pytest.raises(ConfigError, match=re.escape(hint)):
        load_config([], values, local_slots=no_slots, environ={})


def test_the_launch_says_how_the_batch_is_divided():
    config = load(4, gradient_accumulation_steps=6, **trainable(**TWELVE))
    assert check_launch(config) == [
        "elastic_batch: 12 samples per step = micro batch 1 x gradient accumulation 3 x 4 "
        "data-parallel ranks; a rank takes at most 2 at a time (override); "
        "gradient_accumulation_steps=6 (override) has no effect"
    ]
    assert config.origin("train_micro_batch_size_per_gpu") == "elastic_batch"
    assert config.origin("train_batch_size") == "override"
