"""A whole checkpoint has no structural problem; every kind of part that isn't its own is named."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.safe_torch import read_torch_file
from megatron.checkpoint.stored_values import value_problems
from megatron.checkpoint.structure import (
    checksum_problems,
    structural_problems,
    torch_files,
)
from tests.architecture.test_imports import HEAVY, modules_after

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
TP2_PP2 = ORACLE / "ckpt_b" / "global_step10"
LAYER_5 = "layer_05-model_01-model_states.pt"
OPTIMIZER_3 = "zero_pp_rank_0_mp_rank_03_optim_states.pt"
METADATA_1 = "mp_rank_01_model_states.pt"


def copied(source, target):
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    return target


def rewritten(name, *, at, value=None, change=None):
    def damage(directory):
        content = read_torch_file(directory / name)
        inner = content
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = change(inner[at[-1]]) if change is not None else value
        torch.save(content, directory / "new")
        (directory / "new").replace(directory / name)

    return damage


def swapped(one, other):
    def damage(directory):
        (directory / one).rename(directory / "swap")
        (directory / other).rename(directory / one)
        (directory / "swap").rename(directory / other)

    return damage


def both(*damages):
    return lambda directory: [damage(directory) for damage in damages]


def halved(name, tensor):
    return rewritten(name, at=(tensor,), change=lambda value: value[: len(value) // 2].clone())


DAMAGES = {
    "a layer file is missing": (
        lambda directory: (directory / LAYER_5).unlink(),
        [f"{LAYER_5} is missing"],
    ),
    "a layer is missing": (
        lambda directory: [path.unlink() for path in directory.glob("layer_05*")],
        [f"layer_05-model_00-model_states.pt, {LAYER_5} are missing"],
    ),
    "a metadata file is missing": (
        lambda directory: (directory / METADATA_1).unlink(),
        [f"{METADATA_1} is missing"],
    ),
    "an optimizer file is missing": (
        lambda directory: (directory / OPTIMIZER_3).unlink(),
        [f"{OPTIMIZER_3} is missing"],
    ),
    "all optimizer files are missing": (
        lambda directory: [path.unlink() for path in directory.glob("zero*")],
        [
            "zero_pp_rank_0_mp_rank_00_optim_states.pt: no optimizer file is there, of 4: the "
            "weights can be loaded, but not gone on from exactly"
        ],
    ),
    "a file is truncated": (
        lambda directory: os.truncate(directory / LAYER_5, 5000),
        [
            f"{LAYER_5} (5000 bytes) cannot be read; it is truncated, damaged, or not a checkpoint "
            "file: the end of the archive is missing"
        ],
    ),
    "a file is empty": (
        lambda directory: os.truncate(directory / OPTIMIZER_3, 0),
        [
            f"{OPTIMIZER_3} (0 bytes) cannot be read; it is truncated, damaged, or not a "
            "checkpoint file: it begins like none of torch's"
        ],
    ),
    "a file is a link": (
        lambda directory: [
            (directory / LAYER_5).rename(directory / "elsewhere"),
            (directory / LAYER_5).symlink_to(directory / "elsewhere"),
        ],
        [
            f"{LAYER_5}: a symbolic link; copy its file (cp -rL)",
            f"{LAYER_5} is a symbolic link; links in a checkpoint are refused, since they lead "
            "anywhere. Copy the checkpoint with its files: cp -rL",
        ],
    ),
    "the directory has another name": (
        lambda directory: directory.rename(directory.with_name("global_step11")),
        ["mp_rank_00_model_states.pt: of step 10, in a directory called global_step11"],
    ),
    "a metadata file is of another step": (
        rewritten(METADATA_1, at=("iteration",), value=9),
        [f"{METADATA_1}: iteration is 9, but 10 in mp_rank_00_model_states.pt"],
    ),
    "a metadata file is of another topology": (
        rewritten(METADATA_1, at=("dp_world_size",), value=2),
        [f"{METADATA_1}: data_parallel_size is 2, but 1 in mp_rank_00_model_states.pt"],
    ),
    "an optimizer file is of another step": (
        both(
            rewritten(
                OPTIMIZER_3,
                at=("optimizer_state_dict", "base_optimizer_state", "state", 0, "step"),
                value=11,
            ),
        ),
        [
            f"{OPTIMIZER_3}: its number of steps is 11, but 10 in "
            "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        ],
    ),
    "optimizer files of two stages are swapped": (
        swapped(OPTIMIZER_3, "zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        [
            "zero_pp_rank_0_mp_rank_01_optim_states.pt: all ranks together hold 1344 elements of "
            "parameter group 1, its parameters have 1216",
            f"{OPTIMIZER_3}: all ranks together hold 1216 elements of parameter group 1, its "
            "parameters have 1344",
        ],
    ),
    "layers are swapped": (
        swapped(LAYER_5, "layer_07-model_01-model_states.pt"),
        [
            f"{LAYER_5}: layer 5 has other tensors than on tensor rank 0: "
            "attention.dense.bias, attention.dense.weight, attention.query_key_value.bias, "
            "attention.query_key_value.weight",
            "layer_07-model_01-model_states.pt: layer 7 has other tensors than on tensor rank 0: "
            "attention.dense.bias, attention.dense.weight, attention.query_key_value.bias, "
            "attention.query_key_value.weight",
            *[
                f"mp_rank_03_model_states.pt: it counts on {name} of layer {layer}, which is not "
                "stored"
                for layer, name in [
                    (5, "attention.query_key_value.weight"),
                    (5, "attention.dense.weight"),
                    (5, "mlp.linear1.weight"),
                    (5, "mlp.linear2.weight"),
                    (5, "input_layernorm.weight"),
                    (5, "input_layernorm.bias"),
                    (5, "attention.query_key_value.bias"),
                    (5, "attention.dense.bias"),
                    (5, "post_attention_layernorm.weight"),
                    (5, "post_attention_layernorm.bias"),
                    (5, "mlp.linear1.bias"),
                    (5, "mlp.linear2.bias"),
                    (7, "norm.weight"),
                    (7, "norm.bias"),
                ]
            ],
        ],
    ),
    "a tensor has another shape": (
        halved(LAYER_5, "attention.query_key_value.bias"),
        [
            f"{LAYER_5}: attention.query_key_value.bias of layer 5 is float32 [48], but float32 "
            "[96] in layer_02-model_00-model_states.pt",
            "mp_rank_03_model_states.pt: attention.query_key_value.bias of layer 5 is [96] for the "
            "optimizer and [48] as a weight",
        ],
    ),
    "a tensor doesn't fit the arguments": (
        halved("layer_00-model_00-model_states.pt", "word_embeddings.weight"),
        [
            "layer_00-model_00-model_states.pt: word_embeddings.weight of layer 0 has shape "
            "[96, 64], the stored arguments make it [192, 64]",
            "layer_00-model_01-model_states.pt: word_embeddings.weight of layer 0 is float32 "
            "[192, 64], but float32 [96, 64] in layer_00-model_00-model_states.pt",
            "mp_rank_00_model_states.pt: word_embeddings.weight of layer 0 is [192, 64] for the "
            "optimizer and [96, 64] as a weight",
        ],
    ),
    "a tensor has another type": (
        rewritten(LAYER_5, at=("mlp.linear1.bias",), change=torch.Tensor.half),
        [
            f"{LAYER_5}: mlp.linear1.bias of layer 5 is float16 [128], but float32 [128] in "
            "layer_02-model_00-model_states.pt"
        ],
    ),
    "moments are shorter than the masters": (
        rewritten(
            OPTIMIZER_3,
            at=("optimizer_state_dict", "base_optimizer_state", "state", 1, "exp_avg"),
            change=lambda moments: moments[:1000].clone(),
        ),
        [
            f"{OPTIMIZER_3}: exp_avg has [61440, 1000] elements, the parameters' copies have "
            "[61440, 1344]"
        ],
    ),
    "a file of a larger topology was left": (
        lambda directory: shutil.copyfile(
            directory / LAYER_5, directory / "layer_05-model_02-model_states.pt"
        ),
        ["layer_05-model_02-model_states.pt: left by another save, layer 5 was saved in 2 parts"],
    ),
    "the loss scalers differ": (
        rewritten(
            OPTIMIZER_3,
            at=("optimizer_state_dict", "loss_scaler"),
            change=lambda scaler: vars(scaler).update(cur_scale=2.0) or scaler,
        ),
        [
            f"{OPTIMIZER_3}: its loss scaler's cur_scale is 2.0, but 1.0 in "
            "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        ],
    ),
    "the ledger is damaged": (
        lambda directory: (directory / "ledger.json").write_text('{"model": {}, "step": 3}'),
        [
            "ledger.json is not a ledger (KeyError: 'format'); it was damaged or edited. Load "
            "another checkpoint, or restore that file"
        ],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_said_and_nothing_else(name, tmp_path):
    damage, expected = DAMAGES[name]
    directory = copied(TP2_PP2, tmp_path / "global_step10")
    damage(directory)
    [directory] = tmp_path.glob("global_step*")
    assert structural_problems(directory) == expected


@pytest.mark.parametrize(
    "checkpoint",
    [TP2_PP2, ORACLE / "ckpt_a/global_step10", ORACLE / "ckpt_b_step0/global_step0"],
    ids=["TP2 x PP2", "one process", "weights alone"],
)
def test_neox_checkpoints_are_whole(checkpoint):
    assert structural_problems(checkpoint) == []
    assert checksum_problems(checkpoint, torch_files(checkpoint)) == []
    assert value_problems(checkpoint, torch_files(checkpoint)) == []


def test_optimizer_state_is_asked_for_only_where_it_is_wanted(tmp_path):
    directory = copied(TP2_PP2, tmp_path / "global_step10")
    for path in directory.glob("zero*"):
        path.unlink()
    assert structural_problems(directory, needs_optimizer=False) == []


def test_a_directory_without_checkpoint_files_is_none(tmp_path):
    assert structural_problems(tmp_path) == [
        "no layer_*.pt and no mp_rank_*.pt: it is not a checkpoint"
    ]
    assert structural_problems(tmp_path / "gone") == [
        f"{tmp_path / 'gone'} cannot be listed: No such file or directory"
    ]


def test_the_structure_needs_no_torch():
    assert modules_after("import megatron.checkpoint.structure") & set(HEAVY) == set()


def test_a_flipped_bit_is_found_by_the_checksums_alone(tmp_path):
    directory = copied(TP2_PP2, tmp_path / "global_step10")
    data = bytearray((directory / LAYER_5).read_bytes())
    data[len(data) // 2] ^= 4
    (directory / LAYER_5).write_bytes(bytes(data))
    assert structural_problems(directory) == []
    [problem] = checksum_problems(directory, sorted(torch_files(directory)))
    assert problem.startswith(f"{LAYER_5} ({len(data)} bytes) cannot be read; it is damaged: the")


@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        (LAYER_5, ("mlp.linear1.bias",), f"{LAYER_5}: mlp.linear1.bias holds 1 NaN"),
        (
            OPTIMIZER_3,
            ("optimizer_state_dict", "base_optimizer_state", "state", 0, "exp_avg_sq"),
            f"{OPTIMIZER_3}: optimizer_state_dict.base_optimizer_state.state.0.exp_avg_sq holds "
            "1 NaN",
        ),
    ],
)
def test_values_that_are_no_numbers_are_named(name, at, expected, tmp_path):
    def with_nan(tensor):
        tensor = tensor.clone()
        tensor[7] = float("nan")
        return tensor

    directory = copied(TP2_PP2, tmp_path / "global_step10")
    rewritten(name, at=at, change=with_nan)(directory)
    assert value_problems(directory, torch_files(directory)) == [expected]
