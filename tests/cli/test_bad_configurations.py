"""Configurations that can't be used: deepy.py says why, with status 2, and starts nothing."""

import pytest

from tests.cli.bad_runs import config_file, refusal


@pytest.fixture(autouse=True)
def no_host_file(monkeypatch):
    monkeypatch.setenv("DLTS_HOSTFILE", "none")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_gpus": 2, "train_batch_size": 7},
            "train_batch_size=7 (a.yml) must be a multiple of micro batch 2 x data-parallel size 2 "
            "= 4; nearest: 4, 8",
        ),
        (
            {"num_gpus": 2, "train_batch_size": 8, "gradient_accumulation_steps": 3},
            "train_batch_size=8 (a.yml) is not micro batch 2 x gradient_accumulation_steps=3 "
            "(a.yml) x data-parallel size 2 = 12; write gradient_accumulation_steps: 2, or null to "
            "have it worked out; or elastic_batch: true, which keeps 8 and works out the others",
        ),
        (
            {"train_micro_batch_size_per_gpu": None},
            "how large is a batch? set train_micro_batch_size_per_gpu (samples per rank) or "
            "train_batch_size (samples per step)",
        ),
        (
            {"num_gpus": 4, "model_parallel_size": 4},
            "num_attention_heads=2 (a.yml) must be a multiple of model_parallel_size=4 (a.yml): "
            "every tensor-parallel rank has whole heads",
        ),
        (
            {"num_gpus": 2, "pipe_parallel_size": 2, "model_parallel_size": 2},
            "pipe_parallel_size=2 (a.yml) x model_parallel_size=2 (a.yml) needs 4 ranks, more than "
            "the 2 slots there are (num_gpus=2 (a.yml)); lower one of them, or raise num_gpus or "
            "the hostfile's slots",
        ),
        (
            {"num_gpus": 5, "model_parallel_size": 2},
            "5 ranks (num_gpus=5 (a.yml)) can't be divided by pipe_parallel_size=0 (default) x "
            "model_parallel_size=2 (a.yml) = 2: the data-parallel size must be a whole number; "
            "nearest: 4 or 6 ranks",
        ),
        (
            {"num_gpus": 4, "pipe_parallel_size": 4},
            "pipe_parallel_size=4 (a.yml) stages can't share num_layers=2 (a.yml): every stage "
            "needs a layer",
        ),
        (
            {"seq_length": 16},
            "seq_length=16 (a.yml) is longer than max_position_embeddings=8 (a.yml); set "
            "max_position_embeddings to at least 16",
        ),
        (
            {"fp16": {"enabled": True}},
            "conflicting precisions: precision=fp32 (a.yml) means fp32 but fp16={'enabled': True} "
            "(a.yml) means fp16; keep one",
        ),
        (
            {"precision": None, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "conflicting precisions: fp16={'enabled': True} (a.yml) means fp16 but "
            "bf16={'enabled': True} (a.yml) means bfloat16; keep one",
        ),
        ({"num_layer": 3}, "a.yml: unknown key 'num_layer'; did you mean 'num_layers'?"),
        (
            {"moe_num_experts": 8},
            "a.yml: known to NeoX, not supported here yet: moe_num_experts=8 (train a dense model: "
            "1)",
        ),
        (
            {"optimizer": None},
            'training needs an optimizer: optimizer: {"type": "Adam", "params": {"lr": 0.0006}}',
        ),
        (
            {"optimizer": {"type": "SM3", "params": {"lr": 0.1}}},
            "a.yml: known to NeoX, not supported here yet: optimizer={'type': 'SM3', 'params': "
            '{\'lr\': 0.1}} (use optimizer: {"type": "Adam", ...}, which is AdamW as in NeoX)',
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
            "a.yml: known to NeoX, not supported here yet: optimizer={'type': 'Adam', 'params': "
            "{'amsgrad': True}} (Adam has no amsgrad; its params are betas, eps, lr)",
        ),
        ({"data_path": None}, "which data? set data_path, or train_, valid_ and test_data_paths"),
        (
            {"data_path": None, "train_data_paths": ["text"]},
            "train_data_paths given without valid_data_paths and test_data_paths; give all three "
            "lists, or data_path alone",
        ),
        (
            {"train_iters": None},
            "how long? set train_iters (steps), or train_epochs",
        ),
        (
            {"train_epochs": 1},
            "train_iters=2 (a.yml) and train_epochs=1 (a.yml) both say how long to train; keep one",
        ),
        (
            {"save": "out"},
            "save=out (a.yml) is set, but not when to save: set checkpoint_factor (steps between "
            "checkpoints) or extra_save_iters",
        ),
        (
            {"save": "out", "checkpoint_factor": 1, "checkpoint_scale": "log"},
            "checkpoint_factor=1 (a.yml) must be above 1 with checkpoint_scale log: saves are at "
            "its powers",
        ),
        (
            {"save": "out", "checkpoint_factor": 2.5},
            "checkpoint_factor=2.5 (a.yml) must be a whole number of steps with checkpoint_scale "
            "linear",
        ),
    ],
)
def test_one_mistake_is_one_line_with_key_number_file_and_what_to_do(
    tmp_path, capsys, keys, message
):
    assert refusal(tmp_path, capsys, config_file(**keys)) == f"deepy: {message}\n"


def test_a_key_in_two_files_is_found_however_it_is_spelled(tmp_path, capsys):
    said = refusal(tmp_path, capsys, config_file(), '{"num-layers": 2}')
    assert said == (
        "deepy: 'num-layers' (also spelled 'num_layers') stands in a.yml and again in b.yml; keep "
        "one of them\n"
    )


def test_an_alias_counts_as_the_key_it_stands_for(tmp_path, capsys):
    said = refusal(tmp_path, capsys, config_file(gas=2), "gradient-accumulation-steps: 3")
    assert said == (
        "deepy: gradient-accumulation-steps=3 (b.yml) and gas=2 (a.yml) are the same key; keep "
        "one\n"
    )


def test_a_number_in_exponent_form_is_a_number(tmp_path, capsys):
    # PyYAML reads 5e-4 as text. It is compared with lr, so the message holds it as a number.
    said = refusal(tmp_path, capsys, config_file(), "min_lr: 5e-3")
    assert said == "deepy: min_lr=0.005 (b.yml) is above the peak learning rate 0.001\n"
    optimizer = 'optimizer: {"type": "Adam", "params": {"lr": 5e-4}}'
    said = refusal(tmp_path, capsys, config_file(optimizer=None), f"{optimizer}\nmin_lr: 6e-4")
    assert said == "deepy: min_lr=0.0006 (b.yml) is above the peak learning rate 0.0005\n"


def test_a_broken_file_is_named_with_line_and_column(tmp_path, capsys):
    said = refusal(tmp_path, capsys, config_file(), "lr_decay_iters: 10\nseed: [1,\n")
    assert said == (
        "deepy: b.yml: not valid YAML at line 3, column 1: expected the node content, but found "
        "'<stream end>'\n"
    )


def test_all_mistakes_are_told_at_once(tmp_path, capsys):
    keys = {"num_layer": 3, "seq_length": 16, "fp16": {"enabled": True}, "train_batch_size": 7}
    lines = refusal(tmp_path, capsys, config_file(**keys)).splitlines()
    assert lines[0] == "deepy: 4 problems in the configuration:"
    assert [line.split("=")[0].split(":")[0] for line in lines[1:]] == [
        "  - a.yml",
        "  - train_batch_size",
        "  - conflicting precisions",
        "  - seq_length",
    ]


def test_more_ranks_than_a_host_has_slots_are_refused(tmp_path, capsys):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    said = refusal(tmp_path, capsys, config_file(num_gpus=4, hostfile=str(hosts)))
    assert said.startswith("deepy: num_gpus=4 asks for more ranks than slots on localhost (2")
    assert said.count("\n") == 1
