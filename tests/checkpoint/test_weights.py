"""Weights find their rank at any tensor-parallel size, under old and new names."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint, layer_file, read_model_facts
from megatron.checkpoint.weights import rank_part
from megatron.config.topology import Topology
from megatron.model.tp_layout import merge, split
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

GROUPED = {
    "num_kv_heads": 4,
    "activation": "swiglu",
    "mlp_up_size": 96,
    "mlp_down_size": 48,
    "norm": "rmsnorm",
    "gpt_j_residual": False,
    "tp_bias_multiplicity": 1,
}
PLAIN = TinySettings(Topology(1, 1, 1), hidden_size=64, heads=8, padded_vocab_size=100).model
LLAMA = TinySettings(Topology(1, 1, 1), heads=8, padded_vocab_size=100, overrides=GROUPED).model


def whole_tensors(settings):
    hidden, vocabulary = settings.hidden_size, settings.padded_vocab_size
    keys = settings.num_kv_heads * settings.head_size if settings.is_grouped_query else hidden
    shapes = {
        "word_embeddings.weight": (vocabulary, hidden),
        "final_linear.weight": (vocabulary, hidden),
        "attention.query_key_value.weight": (hidden + 2 * keys, hidden),
        "attention.query_key_value.bias": (hidden + 2 * keys,),
        "attention.dense.weight": (hidden, hidden),
        "attention.dense.bias": (hidden,),
        "mlp.linear1.weight": (settings.mlp_up_size, hidden),
        "mlp.linear2.weight": (hidden, settings.mlp_down_size),
        "input_layernorm.weight": (hidden,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@given(
    settings=st.sampled_from([PLAIN, LLAMA]),
    written=st.sampled_from([1, 2, 4]),
    read=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_a_ranks_part_is_that_of_the_merged_tensor(settings, written, read, data):
    rank = data.draw(st.integers(0, read - 1))
    for name, whole in whole_tensors(settings).items():
        parts = [
            split(name, whole, size=written, rank=index, settings=settings)
            for index in range(written)
        ]
        part = rank_part(name, parts, size=read, rank=rank, settings=settings)
        merged = merge(name, parts, settings)
        assert torch.equal(merged, whole)
        assert torch.equal(part, split(name, merged, size=read, rank=rank, settings=settings))


@given(written=st.integers(1, 9), read=st.integers(1, 9), data=st.data())
def test_a_vocabulary_that_does_not_divide_is_padded_with_zeros(written, read, data):
    rows = data.draw(st.integers(1, 40))
    settings = TinySettings(Topology(1, 1, 1), padded_vocab_size=rows).model
    name = "word_embeddings.weight"
    whole = torch.arange(1.0, rows + 1).unsqueeze(1)
    parts = [
        split(name, whole, size=written, rank=index, settings=settings) for index in range(written)
    ]
    found = [
        rank_part(name, parts, size=read, rank=rank, settings=settings) for rank in range(read)
    ]
    assert torch.equal(torch.cat(found)[:rows], whole)
    assert not torch.cat(found)[rows:].any()


def test_only_the_slices_a_rank_holds_are_touched():
    reads = []

    class Part:
        """Records which rows are asked for."""

        shape = (50, 4)

        def __init__(self, index):
            self.index = index

        def narrow(self, dim, start, length):
            reads.append((self.index, dim, start, length))
            return torch.zeros(length, 4)

    rank_part("word_embeddings.weight", [Part(0), Part(1)], size=4, rank=1, settings=PLAIN)
    assert reads == [(0, 0, 25, 25)]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bfloat16", "fp32"])
def test_the_optimizers_fp32_copies_follow_weights_loaded_alone(tmp_path, precision):
    written = TinySettings(Topology(1, 1, 1), tied=True, seed=1)
    settings = TinySettings(Topology(2, 1, 1), tied=True, precision=precision, seed=2)

    def write(context):
        run = TinyRun(context, written)
        run.train(2)
        run.save(tmp_path / "save")

    def load(context, *, before_the_engine):
        source = tmp_path / "save" / "global_step2"
        run = TinyRun(context, settings, weights_from=source if before_the_engine else None)
        if not before_the_engine:
            assert run.load(source, restores_optimizer=False).iteration == 2
            run.iteration = 0  # so that both train on the same tokens
        return run.train(2), run.state()

    run_ranks(write, 1, tmp_path)
    before = run_ranks(lambda context: load(context, before_the_engine=True), 2, tmp_path)
    after = run_ranks(lambda context: load(context, before_the_engine=False), 2, tmp_path)
    # Copies of the untrained weights would overwrite the loaded ones at the first step.
    assert after == before


def save_layers(directory, layers):
    directory.mkdir()
    for (layer, rank), tensors in layers.items():
        torch.save(tensors, directory / layer_file(layer, rank))
    return directory


def test_old_names_are_renamed_and_computed_buffers_dropped(tmp_path):
    directory = save_layers(
        tmp_path / "global_step3",
        {
            (2, 0): {
                "mlp.dense_h_to_4h.weight": torch.ones(2),
                "mlp.dense_4h_to_h.bias": torch.ones(3),
                "attention.rotary_emb.inv_freq": torch.ones(4),
                "attention.dense._extra_state": None,
            }
        },
    )
    path, tensors = StoredCheckpoint(directory).weights(2, 0)
    assert path == directory / "layer_02-model_00-model_states.pt"
    assert sorted(tensors) == ["mlp.linear1.weight", "mlp.linear2.bias"]


def test_layer_numbers_beyond_99_are_found(tmp_path):
    directory = save_layers(tmp_path / "global_step3", {(104, 0): {"w": torch.ones(2)}})
    assert StoredCheckpoint(directory).layers == {104: [0]}
    assert StoredCheckpoint(directory).iteration == 3


def test_a_directory_without_files_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no layer_.* it is not a checkpoint"):
        StoredCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        StoredCheckpoint(tmp_path / "missing")


def test_an_edited_ledger_is_refused(tmp_path):
    directory = save_layers(tmp_path / "global_step3", {(0, 0): {"w": torch.ones(2)}})
    (directory / "ledger.json").write_text('{"model": {"padded_vocab_size": 320}}')
    with pytest.raises(CheckpointError, match=r"ledger\.json does not say the model's facts"):
        read_model_facts(directory, gpt_j_residual=True)


def test_our_facts_are_the_ledgers_not_the_topologys(tmp_path):
    directory = save_layers(tmp_path / "global_step3", {(0, 0): {"w": torch.ones(2)}})
    facts = {"padded_vocab_size": 384, "tp_bias_multiplicity": 2, "tensor_parallel_size": 1}
    (directory / "ledger.json").write_text(json.dumps({"model": facts}))
    facts = read_model_facts(directory, gpt_j_residual=True)
    assert (facts.model.padded_vocab_size, facts.model.tp_bias_multiplicity) == (384, 2)
    assert facts.tensor_parallel_size == 1
