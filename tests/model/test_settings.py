"""What a configuration means for the model, and what is refused."""

import pytest

from megatron.base.errors import ConfigError
from megatron.model.facts import ModelFacts
from megatron.model.settings import mlp_sizes
from tests.model.composed import settings_of


@pytest.mark.parametrize(
    ("hidden", "keys", "sizes"),
    [
        (32, {}, (128, 128)),
        (32, {"intermediate_size": 100, "multiple_of": 64}, (128, 128)),
        (32, {"intermediate_size": 96, "gated": True}, (64, 32)),
        (32, {"intermediate_size": 100, "multiple_of": 32, "gated": True}, (128, 64)),
        (4096, {"intermediate_size": 32768, "multiple_of": 256, "gated": True}, (22016, 11008)),
        (64, {"expansion_factor": 2.5}, (160, 160)),
    ],
)
def test_mlp_sizes_are_neox(hidden, keys, sizes):
    defaults = {
        "intermediate_size": None,
        "expansion_factor": None,
        "multiple_of": 1,
        "gated": False,
    }
    assert mlp_sizes(hidden, **{**defaults, **keys}) == sizes


def test_halves_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="halves of 43 but a second matrix of 42"):
        settings_of(activation="swiglu")


def test_two_widths_are_refused():
    with pytest.raises(ConfigError, match="intermediate_size=64 and expansion_factor=2"):
        settings_of(intermediate_size=64, expansion_factor=2)


def test_rotary_fraction_counts_dimensions():
    assert settings_of(pos_emb="rotary", rotary_pct=0.25).rotary_dims == 2
    assert settings_of(pos_emb="rotary", rotary_pct=1).rotary_dims == 8
    with pytest.raises(ConfigError, match="rotates 1 of 8 dimensions"):
        settings_of(pos_emb="rotary", rotary_pct=0.2)


def test_the_epsilon_is_that_of_the_norm():
    assert settings_of(norm="layernorm").norm_epsilon == 1e-5
    assert settings_of(norm="rmsnorm").norm_epsilon == 1e-8


def test_what_is_not_built_yet_is_named():
    with pytest.raises(ConfigError) as caught:
        settings_of(norm="te_rmsnorm", attention_config=["global", "local"], mlp_type="x")
    assert caught.value.problems == (
        "known to NeoX, not supported here yet: norm: te_rmsnorm (supported: layernorm, rmsnorm, "
        "scalenorm, non_parametric_layernorm)",
        "known to NeoX, not supported here yet: attention_config: local (supported: global, flash)",
    )


def test_heads_must_divide_the_width_and_each_other():
    with pytest.raises(ConfigError, match=r"hidden_size \(32\) must be a multiple.*\(5\)"):
        settings_of(num_attention_heads=5)
    with pytest.raises(ConfigError, match=r"multiple of num_kv_heads \(3\)"):
        settings_of(num_kv_heads=3)


def test_positions_must_cover_the_sequence():
    with pytest.raises(ConfigError, match="needs 18 learned positions"):
        settings_of(pos_emb="learned", opt_pos_emb_offset=2)


def test_a_tensor_parallel_size_that_does_not_divide_is_refused():
    settings = settings_of(num_kv_heads=2)
    settings.require_divisible(2)
    with pytest.raises(ConfigError, match=r"num_kv_heads \(2\) must be a multiple of .* \(4\)"):
        settings.require_divisible(4)


def test_a_new_run_pins_the_tensor_parallel_size_only_with_a_parallel_residual():
    def facts(**keys):
        return ModelFacts.of_new_run(padded_vocab_size=256, tensor_parallel_size=4, **keys)

    assert facts(gpt_j_residual=True) == ModelFacts(256, 4)
    assert facts(gpt_j_residual=False) == ModelFacts(256, 1)
    assert facts(gpt_j_residual=True, configured_multiplicity=2) == ModelFacts(256, 2)
    with pytest.raises(ConfigError, match="tp_bias_multiplicity=2 needs gpt_j_residual"):
        facts(gpt_j_residual=False, configured_multiplicity=2)
