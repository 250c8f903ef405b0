"""A configuration arrives on every rank as it left the launcher."""

import base64
import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.config.transport import encode_config, load_transported, spilled_files
from tests.config.configurations import DATA, load, no_slots, trainable


def decoded(text):
    return json.loads(base64.urlsafe_b64decode(text))


@pytest.mark.parametrize("path", sorted(DATA.glob("*/*.yml")), ids=lambda path: path.stem)
def test_real_configurations_survive_the_journey(path):
    config = load_config([path], {"global_num_gpus": 4}, local_slots=no_slots, environ={})
    assert load_transported(encode_config(config)) == config


@given(
    seed=st.integers(1, 2**31),
    text=st.text(),
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=2),
    stage=st.integers(0, 3),
    accumulation=st.none() | st.integers(1, 8),
    precision=st.sampled_from([None, "fp16", "bfloat16", "fp32"]),
)
def test_any_configuration_survives_the_journey(
    seed, text, weights, stage, accumulation, precision
):
    config = load(
        seed=seed,
        wandb_group=text,
        train_data_paths=["a", text],
        valid_data_paths=["a"],
        test_data_paths=["a"],
        train_data_weights=weights,
        zero_optimization={"stage": stage},
        gradient_accumulation_steps=accumulation,
        precision=precision,
    )
    assert load_transported(encode_config(config)) == config


def test_arguments_are_neox_s():
    arguments = encode_config(load(user_script="train.py", seed=1))
    assert arguments[::2] == ["--deepspeed_config", "--megatron_config"]
    megatron = decoded(arguments[3])
    # derived values travel too; defaults don't
    assert megatron["seed"] == 1
    assert megatron["train_batch_size"] == 4
    assert megatron["attention_config"] == ["global", "global"]
    assert megatron["sparsity_config"] == {}
    assert megatron["user_script"] == "train.py"
    assert "warmup" not in megatron
    assert "rank" not in megatron


def test_deepspeed_is_always_told_the_clipping():
    assert decoded(encode_config(load())[1])["gradient_clipping"] == 1.0
    assert decoded(encode_config(load(gradient_clipping=0.0))[1])["gradient_clipping"] == 0.0


def test_extra_arguments_are_deepspeed_s_own():
    told = decoded(encode_config(load(deepspeed_extra_args={"comms": 1}))[1])
    assert told["comms"] == 1
    assert "deepspeed_extra_args" not in told


def test_the_launcher_s_own_arguments_are_left_alone():
    config = load()
    argv = ["--local_rank=3", *encode_config(config), "--unknown", "x"]
    assert load_transported(argv) == config


def test_batch_sizes_that_deepspeed_changed_are_taken_over():
    arguments = encode_config(load())
    told = decoded(arguments[1]) | {"train_micro_batch_size_per_gpu": 3, "train_batch_size": 12}
    arguments[1] = base64.urlsafe_b64encode(json.dumps(told).encode()).decode()
    assert load_transported(arguments).geometry.global_batch_size == 12


def test_v1_0_s_plain_json_is_understood():
    values = load().non_default()
    config = load_transported(["--megatron_config", json.dumps(values)])
    assert config.flat() == load().flat()


def test_overwriting_wins_and_is_derived_again():
    config = load_transported(
        encode_config(load()),
        {"checkpoint-activations": False, "train_batch_size": None, "gas": 2, "optimizer": None},
    )
    assert config.geometry.global_batch_size == 8
    assert {"optimizer", "gradient_accumulation_steps"} <= config.written


def test_a_rank_says_no_more_than_the_launcher():
    config = load(**trainable(lr=0.1, hysteresis=3))
    assert len(check_launch(config)) == 2
    on_rank = load_transported(encode_config(config))
    assert on_rank.written == config.written
    assert [note.split("=")[0] for note in check_launch(on_rank)] == ["hysteresis"]


def test_a_long_configuration_travels_in_a_private_file(tmp_path):
    config = load(train_data_paths=["x" * 200_000], valid_data_paths=["v"], test_data_paths=["t"])
    arguments = encode_config(config, spill_directory=tmp_path)
    assert max(map(len, arguments)) < 4096
    files = spilled_files(arguments)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert load_transported(arguments) == config


def test_a_short_configuration_makes_no_file(tmp_path):
    arguments = encode_config(load(), spill_directory=tmp_path)
    assert spilled_files(arguments) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no --megatron_config among the arguments; start this script through deepy.py"),
        (["--megatron_config", "%%%"], "--megatron_config can't be decoded"),
        (["--megatron_config", "@/nowhere"], "--megatron_config can't be decoded"),
        (["--megatron_config", "W10="], "--megatron_config holds list, not a mapping of keys"),
        (["--megatron_config", "{}"], "the launch arguments don't say global_num_gpus"),
    ],
)
def test_damaged_arguments_are_refused(argv, message):
    with pytest.raises(ConfigError) as caught:
        load_transported(argv)
    assert message in str(caught.value)
