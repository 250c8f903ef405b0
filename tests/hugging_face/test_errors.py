"""What is wrong with a model's files is said before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.base.errors import CheckpointError, ConfigError, MegatronError
from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.checkpoint.hugging_face.to_neox import ImportSettings, import_model
from tests.checkpoint.malicious_files import archive, evil_pickle
from tests.hugging_face.hub_models import random_model, save

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer" / "tok.json"
WHOLE = "model.safetensors"


@pytest.fixture
def hub(tmp_path):
    return save(random_model(), tmp_path / "hub")


@pytest.fixture
def shards(tmp_path):
    return save(random_model(), tmp_path / "shards", max_shard_size="60KB")


def refused(source, error=MegatronError, message="", **settings):
    target = source.parent / "save"
    settings = {"tensor_parallel_size": 2} | settings
    with pytest.raises(error, match=f"(?s){message}"):
        import_model(source, target, ImportSettings(**settings))
    assert [path.name for path in source.parent.iterdir() if "save" in path.name] == []


def change_config(hub, **changes):
    path = hub / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(hub, change):
    tensors = load_file(hub / WHOLE)
    change(tensors)
    save_file(tensors, hub / WHOLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'gpt_neox'"),
        (
            {"architectures": ["GPTNeoXForSequenceClassification"]},
            r"architectures is \['GPTNeoXForSequenceClassification'\]",
        ),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rotary base is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a size"),
        ({"num_attention_heads": 5}, r"hidden_size \(32\) must be a multiple"),
        ({"vocab_size": None}, "vocab_size is None, not a size"),
    ],
)
def test_other_architectures(changes, message, hub):
    change_config(hub, **changes)
    refused(hub, message=message)


def test_no_configuration(hub):
    (hub / "config.json").unlink()
    refused(hub, CheckpointError, "config.json is missing")


def test_a_size_config_json_does_not_say_is_not_made_up(hub):
    config = json.loads((hub / "config.json").read_text())
    del config["intermediate_size"]
    (hub / "config.json").write_text(json.dumps(config))
    refused(hub, CheckpointError, "intermediate_size is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "not those of its config.json .3 layers.*: missing .*layers.2."),
        ({"num_hidden_layers": 1}, "unexpected gpt_neox.layers.1.* and 7 more"),
        ({"vocab_size": 128}, r"embed_in.weight has shape \[120, 32\].*makes it \[128, 32\]"),
        ({"intermediate_size": 64}, r"dense_h_to_4h.weight has shape \[128, 32\].*\[64, 32\]"),
        ({"hidden_size": 64}, r"has shape \[120, 32\], but config.json makes it \[120, 64\]"),
        ({"attention_bias": False}, "unexpected gpt_neox.layers.0.attention.dense.bias"),
        ({"tie_word_embeddings": True}, "embed_out.weight is not gpt_neox.embed_in.weight"),
    ],
)
def test_weights_of_another_size(changes, message, hub):
    change_config(hub, **changes)
    refused(hub, CheckpointError, message)


def test_missing_and_unexpected_tensors(hub):
    def rename(tensors):
        tensors["gpt_neox.layers.1.mlp.scale"] = tensors.pop(
            "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
        )

    change_tensors(hub, rename)
    refused(
        hub,
        CheckpointError,
        "missing gpt_neox.layers.1.mlp.dense_h_to_4h.bias; unexpected gpt_neox.layers.1.mlp.scale",
    )


def test_an_untied_model_without_output_matrix(hub):
    change_tensors(hub, lambda tensors: tensors.pop("embed_out.weight"))
    refused(hub, CheckpointError, "missing embed_out.weight")


@pytest.mark.parametrize(("value", "message"), [("nan", "1 NaN"), ("inf", "1 infinite")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_no_numbers(dtype, value, message, tmp_path):
    hub = save(random_model().to(dtype), tmp_path / "hub")
    name = "gpt_neox.layers.1.attention.dense.weight"

    def spoil(tensors):
        tensors[name][-1, -1] = float(value)

    change_tensors(hub, spoil)
    refused(hub, CheckpointError, f"model.safetensors: {name} holds .*{message}")


def test_values_beyond_the_type_asked_for(hub):
    def widen(tensors):
        tensors["gpt_neox.final_layer_norm.bias"][3] = 1e6

    change_tensors(hub, widen)
    refused(
        hub,
        CheckpointError,
        "final_layer_norm.bias holds 1e.06, which is beyond what fp16 can hold",
        dtype=torch.float16,
    )


def test_types_that_are_no_weights(hub):
    def round_off(tensors):
        name = "gpt_neox.final_layer_norm.bias"
        tensors[name] = tensors[name].to(torch.int32)

    change_tensors(hub, round_off)
    refused(hub, CheckpointError, "final_layer_norm.bias is torch.int32")


def test_a_missing_shard(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    refused(
        shards,
        CheckpointError,
        "model-00002-of-00003.safetensors missing, 1 of the 3 shards that "
        "model.safetensors.index.json names; they hold .* of the 28 tensors, gpt_neox",
    )


def test_a_shard_of_another_release(shards):
    name = "model-00002-of-00003.safetensors"
    shutil.copy(shards / "model-00001-of-00003.safetensors", shards / name)
    refused(shards, CheckpointError, "both in model-00001-of-00003.* and in model-00002")
    save_file({"other": torch.zeros(2)}, shards / name)
    refused(shards, CheckpointError, "not those of their .index.json: .* not in the shard it names")


def test_an_index_that_leads_out(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["embed_out.weight"] = "../hub/model.safetensors"
    save(random_model(), shards.parent / "hub")
    path.write_text(json.dumps(index))
    refused(shards, CheckpointError, "'../hub/model.safetensors' is no file's name")


def test_a_file_cut_short(hub):
    data = (hub / WHOLE).read_bytes()
    (hub / WHOLE).write_bytes(data[:-10])
    refused(hub, CheckpointError, f"{WHOLE} .* is no whole safetensors file: .* cut")


def test_a_pointer_instead_of_the_file(hub):
    (hub / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    refused(hub, CheckpointError, "git-lfs's pointer to a file, not the file: git lfs pull")


def test_no_weights(hub):
    (hub / WHOLE).unlink()
    refused(hub, CheckpointError, "neither model.safetensors nor pytorch_model.bin")


def test_torch_files_that_would_run_code(hub, tmp_path):
    (hub / WHOLE).unlink()
    archive(evil_pickle)(hub / "pytorch_model.bin", tmp_path / "ran")
    refused(hub, CheckpointError, "pytorch_model.bin is refused: it names")
    assert not (tmp_path / "ran").exists()


def test_the_hub_s_cache_of_links(hub, tmp_path):
    cache = tmp_path / "models--tiny"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(hub.iterdir()):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    import_model(snapshot, tmp_path / "new", ImportSettings(tensor_parallel_size=1))
    (snapshot / WHOLE).unlink()
    (snapshot / WHOLE).symlink_to("../../../elsewhere")
    refused(snapshot, CheckpointError, "model.safetensors is a link to .*elsewhere, outside")


def test_a_tokenizer_with_more_entries_than_rows(hub):
    shutil.copy(TOKENIZER, hub / "tokenizer.json")
    entries = json.loads(TOKENIZER.read_text())
    size = len(entries["model"]["vocab"])
    assert size > 120
    refused(hub, CheckpointError, r"tokenizer.json has \d+ entries, but .* has 120 rows")
    (hub / "tokenizer.json").write_text("{}")
    refused(hub, CheckpointError, "tokenizer.json is no tokenizer")


def test_ranks_that_do_not_divide_the_heads(hub):
    refused(
        hub, ConfigError, r"num_attention_heads \(4\) must be a multiple", tensor_parallel_size=3
    )


def test_directories_that_exist(hub, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        import_model(hub, tmp_path / "there", ImportSettings(tensor_parallel_size=1))


def test_damaged_and_foreign_checkpoints_are_not_exported(hub, tmp_path):
    written = import_model(hub, tmp_path / "save", ImportSettings(tensor_parallel_size=2))
    target = tmp_path / "again"

    def not_exported(error, message, **settings):
        with pytest.raises(error, match=f"(?s){message}"):
            export_model(written.path, target, ExportSettings(**settings))
        assert not any("again" in path.name for path in tmp_path.iterdir())

    keys = (written.path / "model.yml").read_text()
    other = tmp_path / "other.yml"
    for change, message in (
        (("num_layers: 2", "num_layers: 3"), r"holds the layers 0, 2-3, 5-6, but a model of 3"),
        (("hidden_size: 32", "hidden_size: 64"), "has shape .* but the configuration's model"),
        (("use_bias_in_attn_linear: true", "use_bias_in_attn_linear: false"), "not the one that"),
        (
            ("use_bias", f"vocab_file: {TOKENIZER}\ntokenizer_type: HFTokenizer\nuse_bias"),
            "300 entr",
        ),
        (("pos_emb: rotary", "pos_emb: none"), "GPTNeoXForCausalLM cannot express pos_emb: none"),
    ):
        assert change[0] in keys
        other.write_text(keys.replace(*change))
        not_exported(MegatronError, message, config_files=[other])
    not_exported(ConfigError, "hidden_act 'relu' is none of gelu", hidden_act="relu")

    path = written.path / "layer_02-model_01-model_states.pt"
    data = path.read_bytes()
    path.write_bytes(data[:-400] + bytes([data[-400] ^ 1]) + data[-399:])
    not_exported(CheckpointError, "is damaged, so nothing was written: layer_02-model_01")
    path.unlink()
    not_exported(CheckpointError, "is damaged, so nothing was written: layer_02-model_01.*missing")
    (written.path / "model.yml").unlink()
    not_exported(CheckpointError, "holds no configs/.*: --config")
