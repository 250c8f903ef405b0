"""Loading as a whole: origins, overrides, limits, and all problems in one error."""

import dataclasses
import re

import pytest
import yaml

from megatron.base.errors import ConfigError
from megatron.config.load import load_config
from tests.config.configurations import DATA, MODEL, load, no_slots, trainable


def write(tmp_path, name, **keys):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def load_files(*paths, slots=no_slots, environ=None, **overrides):
    return load_config(paths, overrides, local_slots=slots, environ=environ or {})


@pytest.fixture
def model_file(tmp_path):
    return write(tmp_path, "model.yml", **MODEL, train_micro_batch_size_per_gpu=1)


@pytest.mark.parametrize("name", ["a", "b", "a_bf16", "a_fp16", "bl_a"])
def test_configurations_of_real_neox_runs_load_with_their_values(name):
    path = DATA / "oracle" / f"{name}.yml"
    written = yaml.safe_load(path.read_text())
    config = load_files(path, global_num_gpus=4)
    for key, value in written.items():
        if key not in ("attention_config", "fp16", "bf16"):
            assert config.get(key) == value, key
    assert config.model.attention_config == ["global"] * 4
    assert config.config_files == {path.name: path.read_text()}
    assert config.training.config_files == config.config_files


def test_a_real_v1_0_configuration_loads():
    config = load_files(DATA / "pythia" / "tiny.yml", global_num_gpus=4)
    assert config.topology.tensor_parallel_size == 2
    assert config.model.precision == "fp16"
    assert config.deepspeed.fp16["initial_scale_power"] == 12
    assert config.geometry.global_batch_size == 2 * 2 * 2


def test_a_configuration_cannot_be_written_to():
    config = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = None


def test_written_keys_are_known_also_at_their_default():
    config = load(seed=1234, warmup=0.05)
    assert {"seed", "warmup", "num_layers"} <= config.written
    assert "eval_iters" not in config.written


def test_hyphens_and_v1_0_s_gas_are_written_under_their_key(model_file, tmp_path):
    other = write(tmp_path, "b.yml", gas=2, **{"pos-emb": "rotary"})
    config = load_files(model_file, other, global_num_gpus=1)
    assert {"pos_emb", "gradient_accumulation_steps"} <= config.written
    assert config.deepspeed.gradient_accumulation_steps == 2


def test_overrides_win_over_files_whatever_their_spelling(model_file, tmp_path):
    other = write(tmp_path, "b.yml", gas=2, seed=1)
    config = load_files(model_file, other, global_num_gpus=1, gradient_accumulation_steps=4, seed=2)
    assert (config.deepspeed.gradient_accumulation_steps, config.other.seed) == (4, 2)


def test_an_unknown_key_suggests_the_closest(model_file, tmp_path):
    other = write(tmp_path, "b.yml", **{"model-paralel-size": 2})
    message = "b.yml: unknown key 'model-paralel-size'; did you mean 'model_parallel_size'?"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_files(model_file, other, global_num_gpus=2)


def test_an_unknown_key_unlike_any_other_suggests_nothing(model_file):
    with pytest.raises(ConfigError) as caught:
        load_files(model_file, zzzz=1, global_num_gpus=1)
    assert caught.value.problems == ("override: unknown key 'zzzz'",)


def test_gas_and_its_long_name_must_agree(model_file, tmp_path):
    agreeing = write(tmp_path, "b.yml", gas=2, gradient_accumulation_steps=2)
    assert load_files(model_file, agreeing, global_num_gpus=1).geometry.global_batch_size == 2
    other = write(tmp_path, "c.yml", gas=2, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="are the same key; keep one") as caught:
        load_files(model_file, other, global_num_gpus=1)
    assert "gas=2 (c.yml)" in str(caught.value)
    assert "gradient_accumulation_steps=4 (c.yml)" in str(caught.value)


def test_all_problems_come_together_and_none_twice(tmp_path):
    one = write(tmp_path, "a.yml", **{**MODEL, "num_attention_heads": 3, "num_layers": "two"})
    two = write(tmp_path, "b.yml", hidden_size=64, seed=-1, sead=2, fp16={"enabled": 1, "x": 2})
    with pytest.raises(ConfigError) as caught:
        load_files(one, two, global_num_gpus=3, model_parallel_size=2, precision="fp32")
    assert [problem[:60] for problem in caught.value.problems] == [
        "'hidden_size' stands in a.yml and again in b.yml; keep one o",
        "a.yml: num_layers must be a whole number, got 'two'",
        "b.yml: seed must be at least 1, got -1",
        "b.yml: unknown key 'sead'; did you mean 'seed'?",
        "3 ranks (global_num_gpus=3 (override)) can't be divided by p",
        "conflicting precisions: precision=fp32 (override) means fp32",
    ]
    assert str(caught.value).startswith("6 problems in the configuration:\n  - 'hidden_size'")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": 0}, "seed must be at least 1, got 0"),
        ({"hidden_dropout": 1.5}, "hidden_dropout must be at most 1, got 1.5"),
        ({"rotary_emb_base": 1e6}, "rotary_emb_base must be a whole number"),
        ({"extra_save_iters": [1, "x"]}, "extra_save_iters must be a list of whole numbers"),
        ({"deepspeed": False}, "deepspeed=False (override) must be true"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        (
            {"hidden_size": 30},
            "hidden_size=30 (override) must be a multiple of num_attention_heads=4 (override)",
        ),
        (
            {"num_attention_heads": 2, "model_parallel_size": 4},
            "num_attention_heads=2 (override) must be a multiple of model_parallel_size=4",
        ),
        (
            {"seq_length": 32},
            "seq_length=32 (override) is longer than max_position_embeddings=16 (override); "
            "set max_position_embeddings to at least 32",
        ),
        ({"num_kv_heads": 3}, "num_kv_heads=3 (override) must divide num_attention_heads=4"),
        (
            {"num_kv_heads": 1, "model_parallel_size": 2},
            "num_kv_heads=1 (override) must be a multiple of model_parallel_size=2 (override)",
        ),
        (
            {"num_kv_heads": 2, "sparsity_config": {"block": 16}},
            "num_kv_heads=2 (override) can't be combined with sparsity_config",
        ),
        (
            {"num_kv_heads": 2, "attention_config": [[["local"], 2]]},
            "num_kv_heads=2 (override) works with global and flash attention, not local",
        ),
        (
            {"intermediate_size": 64, "expansion_factor": 2.0},
            "intermediate_size=64 (override) and expansion_factor=2.0 (override) both give",
        ),
        ({"min_lr": 0.01}, "min_lr=0.01 (override) is above the peak learning rate 0.001"),
        (
            {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
            "override_lr_scheduler takes the schedule from the configuration and",
        ),
        ({"save": "out"}, "save=out (override) is set, but not when to save"),
        ({"num_unique_layers": 3}, "num_unique_layers=3 (override) must divide num_layers=2"),
        ({"fp16_lm_cross_entropy": True}, "needs precision fp16, not fp32"),
        (
            {"train_data_paths": ["a"]},
            "train_data_paths given without valid_data_paths and test_data_paths",
        ),
        (
            {
                "data_path": "x",
                "train_data_paths": ["a"],
                "valid_data_paths": ["a"],
                "test_data_paths": ["a"],
            },
            "data_path=x (override) and train_data_paths and valid_data_paths and "
            "test_data_paths are both given",
        ),
        (
            {
                "train_data_paths": ["a", "b"],
                "valid_data_paths": ["a"],
                "test_data_paths": ["a"],
                "train_data_weights": [1.0],
            },
            "train_data_weights has 1 weights for 2 train_data_paths (override)",
        ),
        ({"train_label_data_paths": ["l"]}, "train_label_data_paths needs train_data_paths"),
        ({"flops_profiler": {"top": 1}}, 'must say "enabled": true or false'),
        ({"scheduler": {"type": "WarmupLR"}}, 'must have "type", a name, and "params"'),
        (
            {"moe_num_experts": 8, "zero_optimization": {"stage": 2}},
            "moe_num_experts=8 (override) needs ZeRO stage 0 or 1, not 2",
        ),
        (
            {"attention_config": [[["gmlp"], 2]], "partition_activations": True},
            "partition_activations=True (override) can't be combined with gmlp or amlp layers",
        ),
        ({"launcher": "rsh"}, "launcher must be one of pdsh, openmpi, mpich, impi, mvapich, slurm"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_reason(keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(**keys)
    assert len(caught.value.problems) == 1


def test_auto_is_legal_with_the_autotuner_only():
    auto = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 8}
    assert load(**auto, autotuning={"enabled": True}).geometry.micro_batch_size == 2
    with pytest.raises(ConfigError, match="must be a whole number, got 'auto'"):
        load(**auto)


def test_training_keys_load_too():
    config = load(**trainable(save="out", checkpoint_factor=5))
    assert config.training.checkpoint_factor == 5


def test_the_machine_is_asked_when_nothing_else_tells(model_file):
    assert load_files(model_file, slots=lambda: 3).topology.world_size == 3


def test_a_machine_without_devices_is_an_error(model_file):
    with pytest.raises(ConfigError, match="no device to run on; set num_gpus"):
        load_files(model_file, slots=lambda: 0)


def test_num_gpus_is_the_number_of_processes_on_this_machine(model_file):
    assert load_files(model_file, num_gpus=4).topology.world_size == 4


def test_a_hostfile_gives_hosts_times_slots(model_file, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=4\ntwo slots=2\n")
    keys = {"hostfile": str(hostfile)}
    assert load_files(model_file, **keys).topology.world_size == 6
    assert load_files(model_file, **keys, num_gpus=2).topology.world_size == 4
    assert load_files(model_file, **keys, num_nodes=1).topology.world_size == 4
    assert load_files(model_file, **keys, include="two:1").topology.world_size == 1
    assert load_files(model_file, environ={"DLTS_HOSTFILE": str(hostfile)}).topology.world_size == 6


def test_a_hostfile_that_is_not_there_means_this_machine(model_file):
    config = load_files(model_file, hostfile="/mock_path", slots=lambda: 2)
    assert config.topology.world_size == 2


def test_more_ranks_than_slots_are_refused(model_file, tmp_path):
    message = (
        "pipe_parallel_size=2 (override) x model_parallel_size=2 (override) needs 4 ranks, more "
        "than the 2 slots there are (this machine)"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_files(model_file, pipe_parallel_size=2, model_parallel_size=2, slots=lambda: 2)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=2\n")
    with pytest.raises(ConfigError, match="num_gpus=4 asks for more ranks than slots on one"):
        load_files(model_file, hostfile=str(hostfile), num_gpus=4)
