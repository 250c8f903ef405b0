"""Checkpoints that NeoX wrote, in transformers; and runs of ours that begin from the hub's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.checkpoint.hugging_face.to_neox import ImportSettings, import_model
from tests.engine.training_runs import ORACLE, neox_config, run_training
from tests.hugging_face.hub_models import load, logits, our_model, random_model, save, tokens
from tools.ckpts import convert_hf_to_neox, convert_neox_to_hf

DATA = Path(__file__).parents[1] / "data"
V1 = DATA / "hugging_face" / "v1_tp2" / "global_step5"
# Rows of oracle run `a` in the order it trained on them, BATCH a step.
SAMPLES = np.load(DATA / "checkpoint" / "oracle_train_tokens.npy").reshape(160, 65)
BATCH = 8
TOKENIZER = DATA / "tokenizer" / "tok.json"


def parts_of(name: str) -> list[dict[str, torch.Tensor]]:
    return [
        torch.load(V1 / f"{name}-model_0{rank}-model_states.pt", weights_only=True)
        for rank in (0, 1)
    ]


def test_v1_biases_are_summed_over_the_ranks(tmp_path):
    written = export_model(V1, tmp_path / "hub", ExportSettings())
    model = load(written.path)
    assert model.dtype == torch.float16
    assert model.config.vocab_size == 256
    block = model.gpt_neox.layers[1]
    first, second = parts_of("layer_03")
    dense = block.attention.dense
    assert torch.equal(dense.bias, first["attention.dense.bias"] + second["attention.dense.bias"])
    halves = first["attention.dense.weight"], second["attention.dense.weight"]
    assert torch.equal(dense.weight, torch.cat(halves, dim=1))
    down, name = block.mlp.dense_4h_to_h, "mlp.dense_4h_to_h.bias"
    assert torch.equal(down.bias, first[name] + second[name])
    assert first[name].abs().max() > 0
    name = "attention.query_key_value.bias"
    assert torch.equal(block.attention.query_key_value.bias, torch.cat([first[name], second[name]]))
    assert torch.equal(block.input_layernorm.weight, first["input_layernorm.weight"])
    heads = [part["final_linear.weight"] for part in parts_of("layer_06")]
    assert torch.equal(model.lm_head.weight, torch.cat(heads))
    assert model.config.hidden_act == "gelu_fast"
    assert any("multiplied by 2" in one for one in written.notices)


def test_copies_that_came_apart_are_summed(tmp_path):
    checkpoint = tmp_path / "global_step5"
    shutil.copytree(V1, checkpoint)
    path = checkpoint / "layer_02-model_01-model_states.pt"
    changed = torch.load(path, weights_only=True)
    changed["mlp.dense_4h_to_h.bias"] += 0.25
    changed["input_layernorm.weight"] += 0.5
    torch.save(changed, path)
    written = export_model(checkpoint, tmp_path / "hub", ExportSettings())
    block = load(written.path).gpt_neox.layers[0]
    first, second = (parts_of("layer_02")[0], changed)
    name = "mlp.dense_4h_to_h.bias"
    total = (first[name].double() + second[name].double()).half()
    torch.testing.assert_close(block.mlp.dense_4h_to_h.bias, total, rtol=1e-3, atol=1e-6)
    name = "input_layernorm.weight"
    torch.testing.assert_close(block.input_layernorm.weight, first[name] + 0.25, rtol=1e-3, atol=0)
    assert any(
        "copies of input_layernorm.weight of layer 2, mlp.linear2.bias of layer 2 differ" in one
        for one in written.notices
    )


@pytest.mark.parametrize("run", ["a", "b"])
def test_neox_main_computes_the_same_in_transformers(run, tmp_path):
    checkpoint = ORACLE / f"ckpt_{run}" / "global_step10"
    written = export_model(checkpoint, tmp_path / "hub", ExportSettings(max_shard_bytes=100_000))
    model = load(written.path)
    ids = tokens(model)
    expected = logits(our_model(checkpoint), ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_root_layout_with_its_yaml_beside_it(tmp_path):
    root = tmp_path / "neox-ckpt"
    root.mkdir()
    for path in V1.glob("*.pt"):
        shutil.copy(path, root)
    shutil.copy(next((V1 / "configs").iterdir()), root / "160M.yml")
    written = export_model(root, tmp_path / "hub", ExportSettings(dtype=torch.float32))
    direct = export_model(V1, tmp_path / "hub2", ExportSettings(dtype=torch.float32))
    file = "model.safetensors"
    assert (written.path / file).read_bytes() == (direct.path / file).read_bytes()


def test_layer_files_alone_at_the_top_are_a_checkpoint(tmp_path):
    root = tmp_path / "layers"
    root.mkdir()
    for path in V1.glob("layer_*.pt"):
        shutil.copy(path, root)
    config = next((V1 / "configs").iterdir())
    arguments = [str(root), str(tmp_path / "hub"), "--config", str(config), "--dtype", "fp32"]
    convert_neox_to_hf.main(arguments)
    direct = export_model(V1, tmp_path / "hub2", ExportSettings(dtype=torch.float32))
    file = "model.safetensors"
    assert (tmp_path / "hub" / file).read_bytes() == (direct.path / file).read_bytes()


@pytest.mark.parametrize("rows", ["0", "-5", "all"])
def test_what_is_no_number_of_rows_is_refused(rows, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert_neox_to_hf.main([str(V1), str(tmp_path / "hub"), f"--vocab-size={rows}"])
    assert f"is no number of rows: '{rows}'" in capsys.readouterr().err


def test_the_tokenizer_goes_along_both_ways(tmp_path, capsys):
    hub = save(random_model(vocab_size=384), tmp_path / "hub")
    shutil.copy(TOKENIZER, hub / "tokenizer.json")
    keep = tmp_path / "save"
    convert_hf_to_neox.main([str(hub), str(keep), "--tp", "2", "--step", "6"])
    keys = yaml.safe_load((keep / "global_step6" / "model.yml").read_text())
    assert keys["vocab_file"] == str(keep / "tokenizer" / "tokenizer.json")
    out = tmp_path / "out"
    arguments = ["--input_dir", str(keep), "--output_dir", str(out), "--cut-padding"]
    convert_neox_to_hf.main(arguments)
    assert f"{out}: 4 files" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("the same words")["input_ids"]) == "the same words"
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == 300
    assert tokenizer.eos_token_id == config["eos_token_id"]
    again = tmp_path / "again"
    convert_neox_to_hf.main([str(keep / "global_step6"), str(again), "--no_save_tokenizer"])
    assert sorted(path.name for path in again.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("keys", "pipe_size"),
    [({"finetune": True}, 2), ({"no_load_optim": True}, 2), ({"no_load_optim": True}, 0)],
    ids=["new run", "at its step", "at its step, sequential"],
)
def test_a_run_begins_from_it(keys, pipe_size, tmp_path):
    """Its first loss is transformers' on the samples that it should see."""
    config = neox_config(tmp_path, exit_interval=1, checkpoint_factor=1)
    model = random_model(
        vocab_size=384, hidden_size=64, num_hidden_layers=4, max_position_embeddings=64
    )
    hub = save(model, tmp_path / "hub")
    converted, kept = tmp_path / "converted", tmp_path / "save"
    step = 2
    settings = ImportSettings(tensor_parallel_size=2, step=step, uses_pipeline_engine=pipe_size > 0)
    import_model(hub, converted, settings)
    places = {"load": str(converted), "save": str(kept)}
    ranks = {"pipe_parallel_size": pipe_size, "num_gpus": max(1, pipe_size)}
    run = run_training(config | places | ranks | keys, tmp_path / "run")
    first = 1 if "finetune" in keys else step + 1
    assert [record.step for record in run.records] == [first]
    samples = torch.from_numpy(SAMPLES[(first - 1) * BATCH : first * BATCH].astype("int64"))
    expected = torch.nn.functional.cross_entropy(
        logits(model, samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten()
    )
    torch.testing.assert_close(torch.tensor(run.losses[0]), expected, rtol=1e-5, atol=0)
    facts = json.loads((sorted(kept.glob("global_step*"))[-1] / "ledger.json").read_text())
    assert facts["model"]["padded_vocab_size"] == 384
    assert facts["model"]["tp_bias_multiplicity"] == 1
