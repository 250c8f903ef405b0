"""Attention scores with biases, windows, norms and layer scaling, against the written formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron.base.errors import ConfigError
from megatron.model.score_bias import alibi_slopes, relative_buckets
from tests.model.composed import ComposedModel, randomise, settings_of

ROTARY = {"pos_emb": "rotary", "no_weight_tying": True}
LENGTH, BATCH, HEADS, HEAD_SIZE = 16, 2, 4, 8


def _attention(block: int, **keys):
    model = ComposedModel(settings_of(**{**ROTARY, **keys}))
    randomise(model)
    return dict(model.named_modules())[f"{block + 2}.attention"]


def _by_hand(attention, hidden: torch.Tensor, bias: torch.Tensor, visible) -> torch.Tensor:
    """Scores, mask and softmax one query at a time; ``bias`` is (heads, query, key)."""
    fused = F.linear(hidden, attention.query_key_value.weight, attention.query_key_value.bias)
    query, key, value = fused.view(LENGTH, BATCH, HEADS, 3, HEAD_SIZE).unbind(3)
    outputs = torch.zeros(LENGTH, BATCH, HEADS, HEAD_SIZE)
    for row in range(LENGTH):
        seen = [column for column in range(LENGTH) if visible(row, column)]
        scores = torch.einsum("bnd,sbnd->bns", query[row], key[seen]) / math.sqrt(HEAD_SIZE)
        weights = torch.softmax(scores + bias[None, :, row, seen], dim=-1)
        outputs[row] = torch.einsum("bns,sbnd->bnd", weights, value[seen])
    whole = outputs.flatten(2)
    return F.linear(whole, attention.dense.weight, attention.dense.bias)


def _causal(row: int, column: int) -> bool:
    return column <= row


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("positions", ["none", "alibi", "rpe"])
def test_scores_are_those_of_the_formula(positions, window, scaled, block):
    block_count = {"num_layers": 4}
    # Layer scaling multiplies biases by the block's number, from block 2 on.
    number = 3 * block
    attention = _attention(
        number,
        pos_emb=positions,
        sliding_window_width=window,
        apply_query_key_layer_scaling=scaled,
        **block_count,
    )
    bias = torch.zeros(HEADS, LENGTH, LENGTH)
    for row in range(LENGTH):
        for column in range(row + 1):
            distance = row - column
            if positions == "alibi":
                bias[:, row, column] = -distance * torch.tensor(alibi_slopes(HEADS))
            elif positions == "rpe":  # up to 15 tokens apart every distance has its bucket
                bias[:, row, column] = attention.rpe.weight[distance] * math.sqrt(HEAD_SIZE)
    factor = max(1, number) if scaled else 1

    def visible(row: int, column: int) -> bool:
        return _causal(row, column) and (window is None or row - column <= window)

    hidden = torch.randn(LENGTH, BATCH, HEADS * HEAD_SIZE)
    with torch.no_grad():
        expected = _by_hand(attention, hidden, bias * factor, visible)
        torch.testing.assert_close(attention(hidden), expected, rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_normalised_together_by_layernorm_and_per_head_by_rmsnorm():
    heads = torch.randn(LENGTH, BATCH, HEADS, HEAD_SIZE)
    layer = _attention(0, use_qk_layernorm=True).qk_layernorm
    over_all = F.layer_norm(heads, (HEADS, HEAD_SIZE), layer.weight, layer.bias, 1e-5)
    torch.testing.assert_close(layer(heads), over_all)
    rms = _attention(0, use_qk_layernorm=True, norm="rmsnorm").qk_layernorm
    per_head = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-8) * rms.scale
    torch.testing.assert_close(rms(heads), per_head)


def test_normed_queries_and_keys_change_the_output():
    hidden = torch.randn(LENGTH, BATCH, HEADS * HEAD_SIZE)
    normed, plain = _attention(0, use_qk_layernorm=True), _attention(0)
    plain.load_state_dict({k: v for k, v in normed.state_dict().items() if "qk_layernorm" not in k})
    assert not torch.allclose(normed(hidden), plain(hidden))


@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "non_parametric_layernorm"])
def test_norms_over_all_of_a_ranks_heads_need_one_tensor_rank(norm):
    settings = settings_of(**ROTARY, use_qk_layernorm=True, norm=norm)
    settings.require_divisible(1)
    with pytest.raises(ConfigError, match="would change with model_parallel_size"):
        settings.require_divisible(2)


def test_one_scale_per_query_head_does_not_fit_grouped_queries():
    with pytest.raises(ConfigError, match="one scale per query head, which 2 key heads for 4"):
        settings_of(**ROTARY, use_qk_layernorm=True, num_kv_heads=2)


def test_alibi_slopes_of_a_number_of_heads_that_is_no_power_of_two():
    powers = [2.0**-exponent for exponent in range(1, 9)]
    assert alibi_slopes(8) == powers
    assert alibi_slopes(12) == pytest.approx([*powers, 0.70711, 0.35355, 0.17678, 0.08839], 1e-4)


def test_relative_buckets_are_exact_then_logarithmic_then_one():
    buckets = relative_buckets(torch.arange(300), 32, 128)
    assert buckets[:16].tolist() == list(range(16))
    assert buckets[16] == 16
    assert buckets[32] == 16 + int(math.log(32 / 16) / math.log(128 / 16) * 16)
    assert (buckets.diff() >= 0).all()
    assert set(buckets[128:].tolist()) == {31}


@pytest.mark.parametrize(("buckets", "distance"), [(1, 128), (32, 16)])
def test_relative_positions_without_room_are_refused(buckets, distance):
    with pytest.raises(ConfigError, match="rpe_max_distance"):
        settings_of(pos_emb="rpe", rpe_num_buckets=buckets, rpe_max_distance=distance)
