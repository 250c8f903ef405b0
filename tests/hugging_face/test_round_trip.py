"""A model of transformers' computes the same before and after, and in ours."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron.base.errors import ConfigError
from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.checkpoint.hugging_face.model_files import stored_model
from megatron.checkpoint.hugging_face.names import hub_names
from megatron.checkpoint.hugging_face.to_neox import ImportSettings, import_model
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.structure import structural_problems
from megatron.checkpoint.verified import problem_without_bytes
from megatron.ledger.manifest import digest_problems, read_manifest
from tests.hugging_face.hub_models import (
    file_bytes,
    load,
    logits,
    our_model,
    random_model,
    save,
    tokens,
)

# layers, heads, head size: Pythia's heads; widths and layers scaled down
PYTHIA = {
    "14m": (6, 4, 8),
    "31m": (6, 8, 8),
    "70m": (6, 8, 8),
    "160m": (3, 12, 8),
    "410m": (3, 16, 8),
    "1b": (2, 8, 32),
    "1.4b": (2, 16, 16),
    "2.8b": (1, 32, 24),
    "6.9b": (1, 32, 16),
    "12b": (1, 40, 16),
}


def there(source: Path, target: Path, **settings) -> Path:
    settings = {"tensor_parallel_size": 1} | settings
    return import_model(source, target, ImportSettings(**settings)).path


def back(checkpoint: Path, target: Path, **settings) -> Path:
    return export_model(checkpoint, target, ExportSettings(**settings)).path


@pytest.mark.parametrize("size", PYTHIA)
def test_pythias_shapes(size, tmp_path):
    layers, heads, head_size = PYTHIA[size]
    model = random_model(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=heads * head_size
    )
    ids = tokens(model)
    source = save(model, tmp_path / "hub")
    checkpoint = there(source, tmp_path / "save", tensor_parallel_size=4, step=3000)
    assert checkpoint.name == "global_step3000"
    expected = logits(model, ids)
    assert expected.std() > 0.1  # the comparison means something
    torch.testing.assert_close(logits(our_model(checkpoint), ids), expected, rtol=1e-5, atol=1e-5)
    again = load(back(checkpoint, tmp_path / "again"))
    torch.testing.assert_close(logits(again, ids), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("act", ["gelu", "gelu_fast"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_logits(tensor, parallel, tied, act, tmp_path):
    model = random_model(
        tie_word_embeddings=tied,
        use_parallel_residual=parallel,
        hidden_act=act,
        vocab_size=121,  # no number of ranks divides it
        intermediate_size=96,
        layer_norm_eps=1e-3,
        rotary_emb_base=500,
        rotary_pct=0.5,
    )
    ids = tokens(model)
    checkpoint = there(
        save(model, tmp_path / "hub"), tmp_path / "save", tensor_parallel_size=tensor
    )
    expected = logits(model, ids)
    torch.testing.assert_close(logits(our_model(checkpoint), ids), expected, rtol=1e-5, atol=1e-5)
    again = load(back(checkpoint, tmp_path / "again"))
    torch.testing.assert_close(logits(again, ids), expected, rtol=0, atol=1e-6)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "hub")


@pytest.mark.parametrize("tensor", [1, 2])
def test_biases_that_count_more_than_once(tensor, tmp_path):
    model = random_model()
    ids = tokens(model)
    checkpoint = there(
        save(model, tmp_path / "hub"),
        tmp_path / "save",
        tensor_parallel_size=tensor,
        bias_multiplicity=4,
    )
    facts = json.loads((checkpoint / "ledger.json").read_text())["model"]
    assert facts == {
        "padded_vocab_size": 120,
        "tp_bias_multiplicity": 4,
        "tensor_parallel_size": tensor,
    }
    _, stored = StoredCheckpoint(checkpoint).weights(2, tensor - 1)
    bias = model.gpt_neox.layers[0].attention.dense.bias
    assert torch.equal(stored["attention.dense.bias"], bias / 4)
    torch.testing.assert_close(
        logits(our_model(checkpoint), ids), logits(model, ids), rtol=1e-5, atol=1e-5
    )
    back(checkpoint, tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "hub")


def test_biases_counted_often_need_a_parallel_residual(tmp_path):
    source = save(random_model(use_parallel_residual=False), tmp_path / "hub")
    with pytest.raises(ConfigError, match="tp_bias_multiplicity=2 needs gpt_j_residual"):
        there(source, tmp_path / "save", bias_multiplicity=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_half_precision_files_are_the_same_bytes(tensor, dtype, tmp_path):
    source = save(random_model().to(dtype), tmp_path / "hub")
    checkpoint = there(source, tmp_path / "save", tensor_parallel_size=tensor, bias_multiplicity=2)
    _, tensors = StoredCheckpoint(checkpoint).weights(2, 0)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    back(checkpoint, tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(source)


def test_shards_hold_the_same_bits(tmp_path):
    model = random_model().half()
    source = save(model, tmp_path / "hub", max_shard_size="30KB")
    assert len(file_bytes(source)) == 3
    checkpoint = there(source, tmp_path / "save", tensor_parallel_size=2)
    again = back(checkpoint, tmp_path / "again", max_shard_bytes=20_000)
    sizes = [len(data) for data in file_bytes(again).values()]
    assert len(sizes) == 4
    assert max(sizes) < 22_000  # and a header
    expected = model.state_dict()
    found = load(again).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((again / "model.safetensors.index.json").read_text())
    theirs = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()


@pytest.mark.parametrize("in_shards", [True, False])
def test_torch_files_with_the_buffers_of_old_releases(in_shards, tmp_path):
    model = random_model().half()
    source = save(model, tmp_path / "hub")
    state = model.state_dict()  # with torch's own attribute _metadata
    if in_shards:
        state["embed_out.weight"] = state.pop("lm_head.weight")
    for block in range(2):
        prefix = f"gpt_neox.layers.{block}.attention."
        state[prefix + "bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        state[prefix + "masked_bias"] = torch.tensor(-1e9)
        state[prefix + "rotary_emb.inv_freq"] = torch.ones(1)
    names = sorted(state)
    expected = file_bytes(source)
    (source / "model.safetensors").unlink()
    if in_shards:
        halves = {
            f"pytorch_model-0000{number}-of-00002.bin": names[start::2]
            for number, start in ((1, 0), (2, 1))
        }
        for file, held in halves.items():
            torch.save({name: state[name].clone() for name in held}, source / file)
        weight_map = {name: file for file, held in halves.items() for name in held}
        index = {"metadata": {}, "weight_map": weight_map}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, source / "pytorch_model.bin")
    checkpoint = there(source, tmp_path / "save", tensor_parallel_size=2)
    back(checkpoint, tmp_path / "again")
    assert file_bytes(tmp_path / "again") == expected


@pytest.mark.parametrize("tied", [True, False])
def test_the_sequential_module(tied, tmp_path):
    model = random_model(tie_word_embeddings=tied)
    ids = tokens(model)
    source = save(model, tmp_path / "hub")
    checkpoint = there(
        source, tmp_path / "save", tensor_parallel_size=2, uses_pipeline_engine=False, step=7
    )
    assert StoredCheckpoint(checkpoint).iteration == 7
    torch.testing.assert_close(
        logits(our_model(checkpoint), ids), logits(model, ids), rtol=1e-5, atol=1e-5
    )
    back(checkpoint, tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(source)


@pytest.mark.parametrize("tied", [True, False])
def test_files_hold_what_a_run_would_have_saved(tied, tmp_path):
    source = save(random_model(tie_word_embeddings=tied), tmp_path / "hub")
    checkpoint = there(source, tmp_path / "save", tensor_parallel_size=1)
    stored = StoredCheckpoint(checkpoint)
    ours = our_model(checkpoint)
    theirs = {
        f"{layer}.{name}": tuple(tensor.shape)
        for layer in stored.layer_numbers
        for name, tensor in stored.weights(layer, 0)[1].items()
    }
    assert list(theirs) == [name for name, _ in ours.named_parameters()]
    assert theirs == {name: tuple(value.shape) for name, value in ours.named_parameters()}
    assert len(hub_names(stored_model(checkpoint)[1])) == len(theirs)


def test_a_checkpoint_is_committed_as_others_are(tmp_path):
    source = save(random_model(), tmp_path / "hub")
    checkpoint = there(source, tmp_path / "save", tensor_parallel_size=2, step=4)
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert not digest_problems(checkpoint, manifest, manifest.files)
    assert problem_without_bytes(checkpoint, is_numbered=True) is None
    assert not structural_problems(checkpoint, needs_optimizer=False)
    assert (tmp_path / "save" / "latest").read_text().strip() == "global_step4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "save"]


def test_fp32_files_of_fp16_weights_are_told_and_can_be_narrowed(tmp_path):
    half = random_model().half()
    expected = file_bytes(save(half, tmp_path / "half"))
    wide = save(half.float(), tmp_path / "wide")
    kept = import_model(wide, tmp_path / "kept", ImportSettings(tensor_parallel_size=2))
    assert sum("every one of them is exact in fp16" in one for one in kept.notices) == 1
    assert not any("exact in bf16" in one for one in kept.notices)
    assert StoredCheckpoint(kept.path).weights(0, 0)[1]["word_embeddings.weight"].dtype == (
        torch.float32
    )
    narrow = there(wide, tmp_path / "narrow", dtype=torch.float16)
    back(narrow, tmp_path / "again")
    assert file_bytes(tmp_path / "again") == expected
    other = import_model(
        save(random_model(), tmp_path / "other"),
        tmp_path / "new",
        ImportSettings(tensor_parallel_size=1),
    )
    assert not any("exact in" in one for one in other.notices)


def test_rows_beyond_the_tokenizer_can_be_cut(tmp_path):
    model = random_model()
    checkpoint = there(save(model, tmp_path / "hub"), tmp_path / "save", tensor_parallel_size=4)
    cut = load(back(checkpoint, tmp_path / "cut", vocab_size=101))
    ids = tokens(model) % 101
    assert cut.config.vocab_size == 101
    torch.testing.assert_close(logits(cut, ids), logits(model, ids)[..., :101], rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"121 rows of the vocabulary are asked for.* has 120"):
        back(checkpoint, tmp_path / "more", vocab_size=121)


def test_configurations_are_compared_and_kept(tmp_path):
    source = save(random_model(), tmp_path / "hub")
    first = there(source, tmp_path / "first")
    keys = yaml.safe_load((first / "model.yml").read_text())
    given = tmp_path / "given.yml"
    # machines and batches that no single process could have
    machines = {"model_parallel_size": 2, "pipe_parallel_size": 4, "train_batch_size": 1024}
    keys |= {"bias_gelu_fusion": True, "train_micro_batch_size_per_gpu": 3, **machines}
    given.write_text(yaml.safe_dump(keys))
    written = import_model(
        source,
        tmp_path / "second",
        ImportSettings(tensor_parallel_size=2, config_files=[given]),
    )
    assert (written.path / "configs" / "given.yml").read_text() == given.read_text()
    assert any("Pythia was trained with tanh's" in one for one in written.notices)
    exported = export_model(written.path, tmp_path / "hub2", ExportSettings())
    assert json.loads((tmp_path / "hub2" / "config.json").read_text())["hidden_act"] == "gelu_fast"
    assert any("--hidden-act gelu" in one for one in exported.notices)
    same = export_model(written.path, tmp_path / "hub3", ExportSettings(hidden_act="gelu"))
    assert json.loads((tmp_path / "hub3" / "config.json").read_text())["hidden_act"] == "gelu"
    assert any("another GELU" in one for one in same.notices)

    keys |= {"num_layers": 4, "rotary_pct": 0.5, "tp_bias_multiplicity": 2}
    given.write_text(yaml.safe_dump(keys))
    with pytest.raises(ConfigError, match=r"(?s)num_layers is 2 in .* and 4 .*rotary_dims is 2"):
        there(source, tmp_path / "third", config_files=[given])
    with pytest.raises(ConfigError, match=r"tp_bias_multiplicity is 2 in .* and 4 is asked for"):
        there(source, tmp_path / "third", config_files=[given], bias_multiplicity=4)
    assert not (tmp_path / "third").exists()
