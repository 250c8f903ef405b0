"""What follows from the keys: the examples run on real NeoX (spec/config.md §7), and rules."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.config.load import load_config
from tests.config.configurations import MODEL, load, no_slots

sizes = st.integers(min_value=1, max_value=64)


def load_batch(**keys):
    """As `load`, but nothing is said of the batch unless by ``keys``."""
    values = {**MODEL, "global_num_gpus": 4, **keys}
    return load_config([], values, local_slots=no_slots, environ={})


def batch(config):
    """Total, micro, accumulation."""
    keys = config.deepspeed
    return (
        keys.train_batch_size,
        keys.train_micro_batch_size_per_gpu,
        keys.gradient_accumulation_steps,
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, (8, 2, 1)),
        ({"train_batch_size": 16}, (16, 4, 1)),
        (
            {
                "train_batch_size": 16,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": None,
            },
            (16, 2, 2),
        ),
        ({"train_batch_size": 16, "gradient_accumulation_steps": None}, (16, 4, 1)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": None}, (8, 2, 1)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (24, 2, 3)),
        (
            {
                "train_batch_size": 16,
                "gradient_accumulation_steps": 2,
                "pipe_parallel_size": 2,
                "model_parallel_size": 2,
            },
            (16, 8, 2),
        ),
        ({"train_micro_batch_size_per_gpu": 2, "gas": 2}, (16, 2, 2)),  # v1.0's spelling
    ],
)
def test_batch_sizes_complete_each_other(keys, expected):
    config = load_batch(**keys)
    assert batch(config) == expected
    assert config.geometry.global_batch_size == expected[0]
    assert config.training.batch_size == expected[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "how large is a batch? set train_micro_batch_size_per_gpu"),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2},
            "train_batch_size=16 (override) is not micro batch 2 x gradient_accumulation_steps=1 "
            "(default) x data-parallel size 4 = 8; write gradient_accumulation_steps: 2, or null",
        ),
        (
            {"train_batch_size": 1000, "train_micro_batch_size_per_gpu": 32},
            "train_batch_size=1000 (override) must be a multiple of micro batch 32 x data-parallel "
            "size 4 = 128; nearest: 896, 1024",
        ),
        (
            {"train_batch_size": 3},
            "train_batch_size=3 (override) must be a multiple of gradient_accumulation_steps 1 x "
            "data-parallel size 4 = 4; nearest: 4",
        ),
        (
            {"train_micro_batch_size_per_gpu": 0},
            "train_micro_batch_size_per_gpu must be at least 1 samples, got 0",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_batch(**keys)


@given(total=st.none() | sizes, micro=st.none() | sizes, accumulation=st.none() | sizes)
def test_a_batch_is_micro_times_accumulation_times_ranks_or_refused(total, micro, accumulation):
    keys = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    try:
        found = batch(load_batch(**keys))
    except ConfigError:
        # only where no whole numbers fit what was given
        fits = [
            (micro or m) * (accumulation or a) * 4
            for m in range(1, 65)
            for a in range(1, 65)
            if total is None or (micro or m) * (accumulation or a) * 4 == total
        ]
        is_unsaid = total is None and micro is None
        assert is_unsaid or not fits
        return
    assert found[0] == found[1] * found[2] * 4
    given_sizes = (total, micro, accumulation)
    assert all(wanted in (None, got) for wanted, got in zip(given_sizes, found, strict=True))


def test_ranks_are_divided_by_pipeline_and_tensor():
    config = load(global_num_gpus=8, pipe_parallel_size=2, model_parallel_size=2)
    topology = config.topology
    assert (topology.pipeline_parallel_size, topology.tensor_parallel_size) == (2, 2)
    assert topology.data_parallel_size == 2
    assert topology.uses_pipeline_engine
    assert config.parallelism.is_pipe_parallel


def test_no_pipeline_is_one_stage_without_the_engine():
    config = load(pipe_parallel_size=0)
    assert config.topology.pipeline_parallel_size == 1
    assert not config.topology.uses_pipeline_engine


def test_a_model_parallel_size_below_one_is_one():
    assert load(model_parallel_size=0).parallelism.model_parallel_size == 1


def test_ranks_that_cannot_be_divided_are_refused():
    message = (
        "3 ranks (global_num_gpus=3 (override)) can't be divided by pipe_parallel_size=0 (default) "
        "x model_parallel_size=2 (override) = 2: the data-parallel size must be a whole number; "
        "nearest: 2 or 4 ranks"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(global_num_gpus=3, model_parallel_size=2)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "fp32"),
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "FP16"}, "fp16"),  # NeoX silently trains in fp32
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"deepspeed_extra_args": {"bf16": {"enabled": True}}}, "bfloat16"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "bfloat16"),  # v1.0's spelling
        ({"precision": "fp16", "fp16": {"enabled": True}}, "fp16"),
        ({"precision": "fp16", "fp16": {"enabled": False}}, "fp16"),
    ],
)
def test_precision_follows_from_its_three_keys(keys, precision):
    assert load(**keys).model.precision == precision


def test_fp16_gets_its_block_enabled():
    assert load(precision="fp16").deepspeed.fp16 == {"type": "fp16", "enabled": True}
    block = {"enabled": False, "loss_scale": 0}
    assert load(precision="fp16", fp16=block).deepspeed.fp16 == {"enabled": True, "loss_scale": 0}
    assert block["enabled"] is False, "the user's own dictionary is left alone"


def test_bfloat16_without_a_block_reaches_deepspeed():
    extra = load(precision="bfloat16").deepspeed.deepspeed_extra_args
    assert extra == {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"precision": "bfloat16", "fp16": {"enabled": True}},
            "conflicting precisions: precision=bfloat16 (override) means bfloat16 but "
            "fp16={'enabled': True} (override) means fp16; keep one",
        ),
        (
            {"precision": "fp32", "bf16": {"enabled": True}},
            "conflicting precisions: precision=fp32 (override) means fp32 but",
        ),
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "conflicting precisions: fp16=",
        ),
        (
            {"precision": "fp32", "deepspeed_extra_args": {"bf16": {"enabled": True}}},
            "conflicting precisions: precision=fp32 (override) means fp32 but deepspeed_extra_args",
        ),
        ({"fp16": {"loss_scale": 0}}, 'override: fp16 must say "enabled": true or false'),
        ({"precision": "fp8"}, "precision must be one of fp16, fp32, bfloat16, got 'fp8'"),
    ],
)
def test_precisions_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(**keys)


def test_no_zero_block_is_stage_0_with_neox_s_buckets():
    config = load()
    assert config.deepspeed.zero_optimization == {
        "stage": 0,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": False,
        "reduce_bucket_size": 500_000_000,
        "contiguous_gradients": False,
    }


def test_a_zero_block_is_repeated_flat():
    flat = load(zero_optimization={"stage": 1, "reduce_bucket_size": "5e7"}).optimizer
    assert (flat.zero_stage, flat.zero_reduce_bucket_size) == (1, 50_000_000)
    assert flat.zero_allgather_bucket_size == 500_000_000
    assert (flat.zero_reduce_scatter, flat.zero_contiguous_gradients) == (True, False)


@pytest.mark.parametrize("block", [{}, {"stage": 4}, {"stage": "1"}, {"stage": True}])
def test_zero_needs_a_stage_from_0_to_3(block):
    with pytest.raises(ConfigError, match="stage"):
        load(zero_optimization=block)


def test_the_optimizer_gives_type_and_learning_rate():
    config = load(optimizer={"type": "Adam", "params": {"lr": "6e-4"}}, lr=0.1)
    assert (config.optimizer.optimizer_type, config.optimizer.lr) == ("adam", 6e-4)


def test_an_optimizer_without_a_learning_rate_has_0_001():
    assert load(optimizer={"type": "Adam", "params": {}}).optimizer.lr == 0.001


def test_no_optimizer_is_allowed_for_evaluation():
    config = load()
    assert config.deepspeed.optimizer is None
    assert (config.optimizer.optimizer_type, config.optimizer.lr) == ("adam", 0.001)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "Adam"}, 'override: optimizer must have "params"'),
        ({"params": {}}, 'override: optimizer must have "type"'),
        ({"type": "AdamW", "params": {}}, "NeoX's Adam is AdamW: write Adam"),
        ({"type": "Adam", "params": {"lr": "fast"}}, "optimizer.params.lr must be a number"),
    ],
)
def test_an_incomplete_optimizer_is_refused(block, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(optimizer=block)


def test_one_bit_adam_gets_its_schedule():
    block = {"type": "OneBitAdam", "params": {"lr": 0.01}}
    config = load(optimizer=block, train_iters=1000, warmup=0.05)
    assert config.deepspeed.scheduler == {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 0.01,
            "warmup_num_steps": 50,
            "total_num_steps": 1000,
        },
    }
    with pytest.raises(ConfigError, match="one-bit Adam needs train_iters"):
        load(optimizer=block)


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        (None, ["global", "global"]),
        ([[["global", "local"], "all"]], ["global", "local"]),
        ([[["flash"], 2]], ["flash", "flash"]),
        ([[["global"], 1], [["flash"], 1]], ["global", "flash"]),
        (["flash", "global"], ["flash", "global"]),
    ],
)
def test_attention_is_spelled_out_per_layer(written, layers):
    assert load(attention_config=written).model.attention_config == layers


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([[["global"], 3]], "attention_config gives 3 layers, but num_layers=2 (override)"),
        ([[["global"] * 3, "all"]], "3 types can't repeat over num_layers=2"),
        ([[["dense"], 2]], "unknown type 'dense'; there are global, local"),
        ([["global", 2]], 'should be [[type, ...], count or "all"]'),
        ([[["global"], "2"]], "'2' should be a number of layers"),
    ],
)
def test_attention_that_does_not_fit_is_refused(written, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(attention_config=written)


def test_datasets_weigh_the_same_unless_written():
    paths = {"train_data_paths": ["a", "b"], "valid_data_paths": ["c"], "test_data_paths": ["d"]}
    config = load(**paths, valid_data_weights=[2.0])
    training = config.training
    assert (training.train_data_weights, training.valid_data_weights) == ([1.0, 1.0], [2.0])
    assert training.test_data_weights == [1.0]


def test_mirrors_repeat_what_they_mirror():
    training = load(gradient_clipping=0.5, clip_grad=2.0, batch_size=7).training
    assert (training.clip_grad, training.batch_size) == (0.5, 1)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "unconditional"),
        ({"sample_input_file": "prompts.txt"}, "input-file"),
        ({"sample_input_file": "prompts.txt", "text_gen_type": "interactive"}, "interactive"),
    ],
)
def test_text_is_generated_from_the_prompt_file_if_there_is_one(keys, expected):
    assert load(**keys).text_generation.text_gen_type == expected


def test_sparsity_options_and_loss_scale_have_their_neox_meaning():
    assert load().model.sparsity_config == {}
    assert load().training.dynamic_loss_scale is True
    assert load(loss_scale=128.0).training.dynamic_loss_scale is False


def test_a_tokenizer_may_be_spelled_in_any_case():
    assert load(tokenizer_type="hftokenizer").tokenizer.tokenizer_type == "HFTokenizer"


def test_deriving_again_changes_nothing():
    config = load(
        precision="bfloat16",
        fp16={"enabled": False},
        gas=2,
        attention_config=[[["flash"], "all"]],
        zero_optimization={"stage": 1},
        optimizer={"type": "Adam", "params": {"lr": 0.01}},
    )
    again = load_config([], config.flat(), local_slots=no_slots, environ={})
    assert again.flat() == config.flat()
