"""Micro batches on tensor-parallel ranks: the broadcast, the shift and the loss mask."""

import numpy as np
import pytest
import torch
from torch import distributed

from megatron.data.batch import broadcast_tokens, split_tokens
from tests.worlds import run_ranks

CPU = torch.device("cpu")
LARGEST = {np.uint16: 65535, np.int32: 2**31 - 1, np.uint8: 255, np.int64: 2**62}


def alone(tokens, shape=None, dtype=None):
    return broadcast_tokens(
        tokens,
        shape=tokens.shape if shape is None else shape,
        dtype=tokens.dtype if dtype is None else dtype,
        group=None,
        source_rank=0,
        device=CPU,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_every_storage_type_becomes_int64_with_equal_values(dtype):
    limits = np.iinfo(dtype)
    tokens = np.array([[0, 1, limits.max], [limits.max // 2 + 1, 2, limits.min]], dtype=dtype)
    result = alone(tokens)
    assert result.dtype == torch.int64
    assert result.tolist() == tokens.tolist()


def test_read_only_and_strided_arrays_are_taken_without_a_warning():
    tokens = np.arange(40, dtype=np.uint16).reshape(4, 10)
    tokens.flags.writeable = False
    assert alone(tokens[:, ::2]).tolist() == tokens[:, ::2].tolist()


@pytest.mark.distributed
def test_all_ranks_of_a_group_get_the_sources_tokens(tmp_path):
    def worker(context):
        distributed.init_process_group(
            "gloo",
            init_method=context.init_method,
            rank=context.rank,
            world_size=context.world_size,
        )
        group = distributed.new_group([0, 1])
        received = []
        for dtype, largest in LARGEST.items():
            tokens = np.array([[1, 2, largest], [0, largest, 3]], dtype=dtype)
            result = broadcast_tokens(
                tokens if context.rank == 1 else None,
                shape=(2, 3),
                dtype=dtype,
                group=group,
                source_rank=1,
                device=CPU,
            )
            received.append(result.tolist())
        return received

    expected = [[[1, 2, largest], [0, largest, 3]] for largest in LARGEST.values()]
    assert run_ranks(worker, 2, tmp_path) == [expected, expected]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.int32), r"uint16 tokens of shape \(2, 3\), got int32 of shape"),
        (np.zeros((2, 4), np.uint16), r"uint16 tokens of shape \(2, 3\), got uint16 of shape \(2"),
        (None, r"uint16 tokens of shape \(2, 3\), got nothing"),
    ],
)
def test_a_source_with_other_tokens_than_agreed_is_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        alone(tokens, shape=(2, 3), dtype=np.uint16)


def test_labels_are_the_next_tokens():
    tokens = torch.tensor([[5, 6, 0, 7], [0, 0, 8, 9]])
    inputs, labels, loss_mask = split_tokens(tokens, eod=0, eod_mask_loss=False)
    assert inputs.tolist() == [[5, 6, 0], [0, 0, 8]]
    assert labels.tolist() == [[6, 0, 7], [0, 8, 9]]
    assert loss_mask.dtype == torch.float32
    assert loss_mask.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_eod_mask_loss_drops_predictions_made_from_the_end_token_not_of_it():
    tokens = torch.tensor([[5, 6, 0, 7], [0, 0, 8, 0]])
    _, _, loss_mask = split_tokens(tokens, eod=0, eod_mask_loss=True)
    assert loss_mask.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_negative_labels_do_not_count():
    _, _, loss_mask = split_tokens(torch.tensor([[5, -100, 7]]), eod=None, eod_mask_loss=False)
    assert loss_mask.tolist() == [[0, 1]]


def test_labels_beside_the_tokens_are_predicted_where_they_are_not_negative():
    """Two documents of their own with labels, as NeoX reads them (spec, golden data)."""
    text = [[4, 5, 0, 6, 0], [1, 2, 3, 0, 4]]
    label = [[-100, 5, 0, -100, -100], [-100, 2, 3, 0, -100]]
    samples = np.stack([np.array(text), np.array(label)], axis=1).astype(np.int32)
    tokens = alone(samples)
    inputs, labels, loss_mask = split_tokens(tokens, eod=0, eod_mask_loss=False)
    assert inputs.tolist() == [[4, 5, 0, 6], [1, 2, 3, 0]]
    assert labels.tolist() == [[5, 0, 0, 0], [2, 3, 0, 0]]
    assert loss_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    _, _, without_ends = split_tokens(tokens, eod=5, eod_mask_loss=True)
    assert without_ends.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert tokens[:, 1].tolist() == label


def test_eod_mask_loss_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="eod_mask_loss needs a tokenizer with an end-of"):
        split_tokens(torch.tensor([[1, 2]]), eod=None, eod_mask_loss=True)
