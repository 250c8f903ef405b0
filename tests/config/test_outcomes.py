"""At launch every key that differs from its default works, has no effect, or stops the run."""

import json
import re
import sys
import typing

import pytest

from megatron.base.errors import ConfigError
from megatron.config.declare import OutcomeKind
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch, judge
from megatron.config.registry import keys
from tests.config.configurations import DATA, load, no_slots, trainable


def notices(**values):
    return check_launch(load(**trainable(**values)))


def another_value(entry):
    """A value of the key's type that is not its default."""
    candidates = {bool: not entry.default, int: 7, float: 0.5, str: "text"}
    members = typing.get_args(entry.annotation) or (entry.annotation,)
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            others = [choice for choice in typing.get_args(member) if choice != entry.default]
            return others[0] if others else None
        if typing.get_origin(member) is list:
            return ["global"]
        if typing.get_origin(member) is dict:
            return {"enabled": True, "type": "Adam", "stage": 1}
        if member in candidates:
            return candidates[member]
    return "anything"


@pytest.mark.parametrize("name", sorted(keys()))
def test_every_key_has_one_outcome_away_from_its_default(name):
    entry = keys()[name]
    flat = {**load(**trainable()).flat(), name: another_value(entry)}
    assert flat[name] != entry.default
    outcome = judge(entry, flat)
    assert outcome.kind in OutcomeKind
    assert bool(outcome.text) != (outcome.kind is OutcomeKind.WORKS)


def test_an_ordinary_training_configuration_has_nothing_to_say():
    assert notices() == []


@pytest.mark.parametrize(
    ("values", "notice"),
    [
        (
            {"hysteresis": 3},
            "hysteresis=3 (override) has no effect here: NeoX doesn't read it either; "
            "set it in the fp16 block",
        ),
        (
            {"rope_fusion": True},
            "rope_fusion=True (override) leaves the numbers alone: one kernel serves both settings",
        ),
        ({"moe_top_k": 2}, "has no effect here: it only tunes moe_num_experts, which is off"),
        ({"lr": 0.5}, "lr=0.5 (override) has no effect here: it is always worked out, as 0.001"),
        (
            {"batch_size": 9},
            "batch_size=9 (override) has no effect here: it is always worked out, as 1",
        ),
        ({"world_size": 9}, "world_size=9 (override) has no effect here: the launcher decides it"),
        ({"curriculum_learning": {"enabled": False}}, "has no effect here: it is not enabled"),
    ],
)
def test_a_key_without_effect_is_said_once(values, notice):
    (said,) = notices(**values)
    assert notice in said


def test_defaults_and_agreeing_mirrors_are_not_mentioned():
    assert notices(hysteresis=2, lr=0.001, clip_grad=1.0, batch_size=1) == []


def test_labels_are_given_for_all_three_or_for_none():
    lists = {f"{split}_data_paths": ["t"] for split in ("train", "valid", "test")}
    labels = {f"{split}_label_data_paths": ["l"] for split in ("train", "valid", "test")}
    assert notices(data_path=None, **lists, **labels) == []
    del labels["test_label_data_paths"]
    said = "train_label_data_paths and valid_label_data_paths given without test_label_data_paths"
    with pytest.raises(ConfigError, match=said):
        notices(data_path=None, **lists, **labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pos_emb": "rpe", "pipe_parallel_size": 2}, "pos_emb=rpe (its one table"),
        ({"norm": "te_rmsnorm"}, "norm=te_rmsnorm (use layernorm or rmsnorm, which have the same"),
        ({"attention_config": [[["local"], 2]]}, "(use global or flash instead of local)"),
        ({"optimizer": {"type": "Lion", "params": {}}}, "optimizer={'type': 'Lion', 'params'"),
        ({"moe_num_experts": 8}, "moe_num_experts=8 (train a dense model: 1)"),
        ({"use_mup": True}, "use_mup=True (set it to false)"),
        ({"train_impl": "dpo"}, "train_impl=dpo (use normal)"),
        ({"curriculum_learning": {"enabled": True}}, "(train at full sequence length)"),
        ({"autotuning_run": "tune"}, "autotuning_run=tune (drop --autotuning"),
        (
            {"zero_optimization": {"stage": 2}, "pipe_parallel_size": 1},
            "(ZeRO 2 and 3 need pipe_parallel_size: 0; with a pipeline use stage 0 or 1)",
        ),
        ({"communication_data_type": True}, "(write a type, such as fp32, or leave it out)"),
        (
            {"save": "out", "checkpoint_factor": 5, "s3_path": "bucket/a"},
            "s3_path=bucket/a (write s3://bucket/prefix)",
        ),
        (
            {"save": "out", "checkpoint_factor": 5, "s3_path": "s3:///a"},
            "s3_path=s3:///a (write s3://bucket/prefix)",
        ),
        (
            {"save": "out", "checkpoint_factor": 5, "load": "s3://bucket/a/out"},
            "load=s3://bucket/a/out (name a directory; s3_path copies checkpoints to a bucket, and",
        ),
        ({"sequence_parallel": True}, "sequence_parallel=True (set it to false; the numbers"),
    ],
)
def test_what_is_not_supported_yet_stops_the_launch_and_says_what_to_do(values, message):
    known = "known to NeoX, not supported here yet: "
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        notices(**values)
    assert all(known in problem for problem in caught.value.problems)


def test_a_refused_key_of_ours_is_not_said_to_be_neox_s():
    message = (
        r"^override: not supported here yet: neox_version=v1.0 \(NeoX v1.0 had no ZeRO stage 3"
    )
    with pytest.raises(ConfigError, match=message):
        notices(neox_version="v1.0", zero_optimization={"stage": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 1}, "pipe_parallel_size": 2},
        {"activation": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2},
        {"attention_config": [[["flash"], "all"]]},
        {"precision": "bfloat16"},
        {"precision": "fp16", "fp16": {"enabled": True, "loss_scale": 0}},
        {"save": "out", "checkpoint_factor": 5, "extra_save_iters": [0], "checkpoint_scale": "log"},
        {"finetune": True, "load": "in", "no_load_optim": True, "no_load_rng": True},
        {"checkpoint_activations": True, "checkpoint_num_layers": 2},
        {"weight_by_num_documents": True, "weighted_sampler_alpha": 0.3},
        {
            "save": "out",
            "checkpoint_factor": 5,
            "s3_path": "s3://bucket/prefix",
            "s3_chunk_size": 10_000_000,
        },
        {"save": "out", "checkpoint_factor": 5, "checkpoint_validation_with_forward_pass": True},
    ],
)
def test_what_the_trainer_can_do_is_not_commented_on(values):
    assert notices(**values) == []


def test_object_storage_without_its_package_is_found_out_at_launch(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ConfigError,
        match=r"s3_path=s3://b \(override\) needs the package s3fs, which is not installed: "
        r"pip install -r requirements/requirements-s3\.txt",
    ):
        notices(save="out", checkpoint_factor=5, s3_path="s3://b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": None}, "training needs an optimizer"),
        ({"train_iters": None}, "how long? set train_iters"),
        ({"data_path": None}, "which data? set data_path"),
        ({"seq_length": None}, "seq_length is missing"),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}},
            "override: write weight_decay as a key of its own, not inside optimizer.params",
        ),
        (
            {"pipe_parallel_size": 4},
            "pipe_parallel_size=4 (override) stages can't share num_layers=2 (override)",
        ),
    ],
)
def test_what_training_cannot_do_without_is_asked_for(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        notices(**values)


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_relative_positions_work_on_one_stage(stages):
    flat = {**load().flat(), "pos_emb": "rpe", "pipe_parallel_size": stages}
    is_refused = judge(keys()["pos_emb"], flat).kind is OutcomeKind.REFUSED
    assert is_refused == (stages == 2)
    assert judge(keys()["rpe_num_buckets"], flat).kind is OutcomeKind.WORKS
    assert judge(keys()["rpe_num_buckets"], load().flat()).kind is OutcomeKind.NO_EFFECT


@pytest.mark.parametrize("name", ["a", "b", "a_bf16", "a_fp16", "bl_a"])
def test_neox_s_recorded_runs_can_be_launched(name):
    path = DATA / "oracle" / f"{name}.yml"
    config = load_config([path], {"global_num_gpus": 4}, local_slots=no_slots, environ={})
    assert check_launch(config) == [
        f"use_cpu_initialization=True ({name}.yml) leaves the numbers alone: "
        "weights are always drawn so"
    ]


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("pp0", []),
        ("tp2pp2", []),
        ("llama_gqa", []),
        ("tied_learned", []),
        ("bf16pp1", []),
        ("rpe_sliding", []),
    ],
)
def test_a_golden_run_can_be_launched_or_is_refused_by_name(name, refused):
    values = json.loads((DATA / "golden_run_configs.json").read_text())[name]
    config = load_config([], values, local_slots=no_slots, environ={})
    if not refused:
        assert check_launch(config) == []
        return
    with pytest.raises(ConfigError) as caught:
        check_launch(config)
    assert len(caught.value.problems) == len(refused)
    for problem, key in zip(caught.value.problems, refused, strict=True):
        assert f"not supported here yet: {key} (" in problem
