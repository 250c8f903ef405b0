"""``tools/ckpts/inspect_checkpoints.py``: what is in a checkpoint, and where two differ."""

import json
import shutil

import pytest
import torch

from megatron.cli.checkpoints.inspect import main
from tests.architecture.source_tree import ROOT
from tests.architecture.test_imports import HEAVY, modules_after
from tests.checkpoint.malicious_files import ATTACKS

ORACLE = ROOT / "tests/data/oracle"
TP2_PP2 = ORACLE / "ckpt_b/global_step10"
METADATA = "mp_rank_00_model_states.pt"


def answer(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_is_described(capsys):
    facts = answer(capsys, TP2_PP2)
    assert facts["step"] == 10
    assert facts["topology"] == ("pipeline stages 2, data-parallel ranks 1, tensor-parallel size 2")
    assert facts["files"] == "14 layer, 4 model-states, 4 optimizer"
    assert facts["layers"][0] == {
        "layer": 0,
        "tensor": "word_embeddings.weight",
        "dtype": "float32",
        "shape": [192, 64],
        "parts": 2,
    }
    # 2 x 384 x 64 for embedding and head, 4 layers of 49,984, the final norm's 128
    assert facts["parameters"].startswith("249,216 as stored")
    assert (facts["weights"], facts["optimizer"]) == ("float32", "ZeRO 1, step 10")
    assert facts["arguments"]["hidden_size"] == 64


def test_of_a_save_the_newest_is_described(tmp_path, capsys):
    shutil.copytree(TP2_PP2, tmp_path / "global_step10")
    shutil.copytree(ORACLE / "ckpt_b_step0/global_step0", tmp_path / "global_step0")
    (tmp_path / "latest").write_text("global_step0")
    assert answer(capsys, tmp_path)["step"] == 0


def test_a_files_attributes_are_listed_and_chosen(capsys):
    attributes = answer(capsys, TP2_PP2 / METADATA)["attributes"]
    assert attributes["args/num_layers"] == "4"
    assert attributes["param_shapes/0/0.word_embeddings.weight"] == "(192, 64)"
    chosen = answer(
        capsys, TP2_PP2 / METADATA, "--attributes", "lr_scheduler/num_iters", "args/hidden_size"
    )
    assert chosen["attributes"] == {"lr_scheduler/num_iters": "10", "args/hidden_size": "64"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_chosen_tensor_shows_its_first_values(dtype, tmp_path, capsys):
    values = torch.tensor([[1, 2, 4], [8, 16, -3], [7, 9, 5]], dtype=dtype)
    torch.save({"a": {"w": values.t()}}, tmp_path / "x.pt")
    [(name, shown)] = answer(capsys, tmp_path / "x.pt", "--attributes", "a/w")["attributes"].items()
    kind = str(dtype).removeprefix("torch.")
    assert (name, shown) == ("a/w", f"{kind} [3, 3] (1, 8, 7, 2, 16, 9, ...)")


def test_two_checkpoints_are_compared(tmp_path, capsys):
    other = tmp_path / METADATA
    content = torch.load(TP2_PP2 / METADATA, weights_only=False)  # NeoX's own, of our recordings
    content["iteration"] = 11
    torch.save(content, other)
    assert main([f"{TP2_PP2 / METADATA},{other}", "--diff"]) == 1
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["attribute", str(TP2_PP2 / METADATA), str(other)]
    assert line.split() == ["iteration", "10", "11"]
    assert main([f"{TP2_PP2 / METADATA},{TP2_PP2 / METADATA}", "--diff"]) == 0
    assert capsys.readouterr().out == ""


def test_what_a_file_holds_does_not_act_on_the_terminal(tmp_path, capsys):
    torch.save({"\x1b[2J": "\x1b]0;title\x07"}, tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt")]) == 0
    assert capsys.readouterr().out == "\\x1b[2J: \\x1b]0;title\\x07\n"


def test_code_is_refused_and_not_run(tmp_path, capsys):
    ATTACKS["os.system"].write(tmp_path / "x.pt", tmp_path / "canary")
    assert main([str(tmp_path / "x.pt")]) == 2
    assert "is refused: it names posix.system," in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_nothing_heavy_is_loaded():
    assert modules_after("import megatron.cli.checkpoints.inspect") & set(HEAVY) == set()
