"""Tensors are divided over tensor ranks as in NeoX, and become whole again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.model.tp_layout import full_shape, local_vocabulary_rows, merge, split, tensor_split
from tests.model.composed import ComposedModel, settings_of


@st.composite
def models(draw):
    """(settings, tensor-parallel size): any family member that divides, any vocabulary."""
    size = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = size * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    head_size = 2 * draw(st.integers(1, 3))
    gated = draw(st.booleans())
    width = size * draw(st.integers(1, 4))
    return (
        settings_of(
            vocabulary=draw(st.integers(1, 40)),
            pos_emb=draw(st.sampled_from(["rotary", "learned"])),
            hidden_size=heads * head_size,
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            activation="swiglu" if gated else "gelu",
            intermediate_size=3 * width if gated else 2 * width,
            num_layers=1,
            no_weight_tying=True,
        ),
        size,
    )


@given(models())
def test_merge_undoes_split_for_every_tensor(model_and_size):
    settings, size = model_and_size
    for name, whole in ComposedModel(settings).state_dict().items():
        numbered = torch.arange(whole.numel()).view(whole.shape)
        parts = [
            split(name, numbered, size=size, rank=rank, settings=settings) for rank in range(size)
        ]
        assert torch.equal(merge(name, parts, settings), numbered)
        assert {part.shape for part in parts} == {parts[0].shape}
        assert full_shape(name, parts[0].shape, settings) == tuple(whole.shape)
        if not tensor_split(name, settings).is_replicated:
            extra = sum(part.numel() for part in parts) - whole.numel()
            width = whole[0].numel()
            assert 0 <= extra < size * width


def test_a_rank_holds_its_heads_and_its_halves():
    settings = settings_of(
        pos_emb="rotary",
        hidden_size=8,
        num_attention_heads=4,
        num_kv_heads=2,
        activation="swiglu",
        intermediate_size=12,
        seq_length=4,
    )
    name = "2.attention.query_key_value.weight"
    # Rows: 4 query heads of 2, then 2 key heads, then 2 value heads.
    rows = torch.arange(16).view(16, 1).expand(16, 8)
    mine = split(name, rows, size=2, rank=1, settings=settings)[:, 0]
    assert mine.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    up_gate = torch.arange(8)
    assert settings.mlp_up_size == 8
    mine = split("3.mlp.linear1.bias", up_gate, size=2, rank=0, settings=settings)
    assert mine.tolist() == [0, 1, 4, 5]


def test_a_vocabulary_that_does_not_divide_ends_in_zeros():
    settings = settings_of(vocabulary=10)
    assert local_vocabulary_rows(settings, 4) == 3
    whole = torch.ones(10, 32)
    last = split("0.word_embeddings.weight", whole, size=4, rank=3, settings=settings)
    assert last[:, 0].tolist() == [1, 0, 0]


def test_names_are_known_with_every_prefix():
    settings = settings_of()
    for prefix in ("", "7.", "sequential.7.", "tied_modules.embed."):
        assert tensor_split(f"{prefix}word_embeddings.weight", settings).dim == 0
        assert tensor_split(f"{prefix}attention.dense.weight", settings).dim == 1
        assert tensor_split(f"{prefix}attention.dense.bias", settings).is_replicated


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no tensor of this model is called 'mlp\.router\.w'"):
        tensor_split("mlp.router.w", settings_of())


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"must have 96 elements along dimension 0.*\(64, 32\)"):
        split(
            "attention.query_key_value.weight",
            torch.zeros(64, 32),
            size=2,
            rank=0,
            settings=settings_of(),
        )
    with pytest.raises(ValueError, match="tensor rank 1 of 2 must hold 48 elements"):
        merge(
            "attention.query_key_value.weight",
            [torch.zeros(48, 32), torch.zeros(47, 32)],
            settings_of(),
        )
