"""Digests: the bytes of design §3, and independence of who read which samples."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import RunDirectoryError
from megatron.config.batch_geometry import BatchGeometry, SampleSlot
from megatron.ledger.digests import (
    agreed_digests,
    batch_digest,
    digest_text,
    digest_value,
    sample_digest,
)

DATA = Path(__file__).parents[1] / "data"
# (20 steps, 2 micro steps, 4 rows, 65 tokens): what runs a and b of NeoX read
ORACLE_TOKENS = np.load(DATA / "checkpoint" / "oracle_train_tokens.npy")
BATCHES = json.loads((DATA / "stream" / "oracle" / "batches.json").read_text())["main"]

dtypes = st.sampled_from([np.uint8, np.uint16, np.int32, np.int64])


def test_the_tokens_are_those_neox_read():
    recorded = [entry for entry in BATCHES["a"]["ranks"]["rank0"] if entry[0] == "train"]
    micro_batches = ORACLE_TOKENS.reshape(40, 4, 65).astype("<i8")
    assert [hashlib.sha256(one.tobytes()).hexdigest() for one in micro_batches] == [
        digest for _, _, digest in recorded
    ]


@pytest.mark.parametrize(
    "geometry", [BatchGeometry(4, 1, 2), BatchGeometry(2, 2, 2), BatchGeometry(1, 4, 2)]
)
def test_the_oracles_first_steps_have_these_digests_at_every_topology(geometry):
    samples = ORACLE_TOKENS.reshape(-1, 65)
    digests = []
    for step in range(2):
        total = 0
        for micro_step in range(geometry.gradient_accumulation_steps):
            for rank in range(geometry.data_parallel_size):
                first = geometry.position(SampleSlot(step, micro_step, rank, 0))
                positions = np.arange(first, first + geometry.micro_batch_size)
                total += batch_digest(samples[positions], positions)
        digests.append(digest_text(total))
    assert digests == ["405cec4e22477671", "5b29fa540cd875e9"]


@given(
    st.integers(min_value=0, max_value=5),
    st.integers(min_value=1, max_value=9),
    st.integers(min_value=0, max_value=2**50),
    dtypes,
    st.booleans(),
    st.integers(min_value=0, max_value=2**32 - 1),
)
def test_a_batch_is_the_sum_of_its_samples_bytes(rows, length, first, dtype, labelled, seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 200, (rows, length)).astype(dtype)
    companions = []
    if labelled:
        companions = [
            random.integers(-100, 100, (rows, length)).astype(np.int32),
            random.random((rows, 1)),  # reward
            random.random((rows, length)).astype(np.float32),
        ]
    expected = 0
    for row in range(rows):
        data = b"".join(int(token).to_bytes(8, "little", signed=True) for token in tokens[row])
        if labelled:
            data += np.array(companions[0][row], "<i8").tobytes()
            data += np.array(companions[1][row], "<f4").tobytes()
            data += np.array(companions[2][row], "<f4").tobytes()
        digest = xxhash.xxh3_64(data, seed=first + row).intdigest()
        assert sample_digest(tokens[row], first + row, [one[row] for one in companions]) == digest
        expected = (expected + digest) % 2**64
    positions = first + np.arange(rows)
    assert batch_digest(tokens, positions, companions) == expected


@pytest.mark.parametrize("num_samples", [1, 15, 16, 17, 100])
def test_a_batch_larger_than_a_chunk_is_summed_whole(num_samples):
    tokens = np.arange(num_samples * 2049).reshape(num_samples, 2049) % 50000
    each = [sample_digest(row, 7 + index) for index, row in enumerate(tokens)]
    assert batch_digest(tokens, np.arange(7, 7 + num_samples)) == sum(each) % 2**64


def test_every_sample_needs_a_position():
    with pytest.raises(ValueError, match="2 samples, but 1 positions"):
        batch_digest(np.zeros((2, 3), np.int64), [1])


@given(st.integers(min_value=0, max_value=2**70))
def test_text_holds_the_number(value):
    text = digest_text(value)
    assert len(text) == 16
    assert digest_value(text) == value % 2**64


def test_both_ends_of_the_pipeline_must_have_read_the_same():
    assert agreed_digests({1: 5, 2: 6}, {1: 5, 2: 6}) == {1: 5, 2: 6}
    message = "step 2: the first pipeline stage read samples with digest 0000000000000006, the last"
    with pytest.raises(RunDirectoryError, match=message):
        agreed_digests({1: 5, 2: 6, 3: 1}, {1: 5, 2: 7, 3: 2})
    with pytest.raises(RunDirectoryError, match=r"step 2: .* the last none"):
        agreed_digests({1: 5, 2: 6}, {1: 5})
