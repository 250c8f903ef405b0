"""Logits are those of transformers' GPT-NeoX and Llama with the same weights."""

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from megatron.model.settings import ModelSettings
from tests.model.composed import ComposedModel, random_samples, randomise, settings_of

NEOX_NAMES = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp.linear1": "mlp.dense_h_to_4h",
    "mlp.linear2": "mlp.dense_4h_to_h",
}


def _as_gpt_neox(model: ComposedModel, settings: ModelSettings) -> GPTNeoXForCausalLM:
    """The same weights in transformers' model, which counts each bias once."""
    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=settings.padded_vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.mlp_down_size,
            hidden_act="gelu_fast" if settings.activation == "gelu_tanh" else "gelu",
            max_position_embeddings=settings.seq_length,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": settings.rotary_base,
                "partial_rotary_factor": settings.rotary_dims / settings.head_size,
            },
            use_parallel_residual=settings.gpt_j_residual,
            tie_word_embeddings=settings.tied_embedding,
            attn_implementation="eager",
        )
    )
    ours = model.state_dict()
    last = settings.num_layers + 3
    theirs = {
        "gpt_neox.embed_in.weight": ours["0.word_embeddings.weight"],
        "gpt_neox.final_layer_norm.weight": ours[f"{last}.norm.weight"],
        "gpt_neox.final_layer_norm.bias": ours[f"{last}.norm.bias"],
        "lm_head.weight": ours[
            "0.word_embeddings.weight"
            if settings.tied_embedding
            else f"{last + 1}.final_linear.weight"
        ],
    }
    for layer in range(settings.num_layers):
        for our_name, their_name in NEOX_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = ours[f"{layer + 2}.{our_name}.{kind}"]
                counts_often = our_name in ("attention.dense", "mlp.linear2") and kind == "bias"
                factor = settings.tp_bias_multiplicity if counts_often else 1
                theirs[f"gpt_neox.layers.{layer}.{their_name}.{kind}"] = tensor * factor
    missing, unexpected = other.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert all("weight" not in name and "dense" not in name for name in missing)
    return other.eval()


def _as_llama(model: ComposedModel, settings: ModelSettings) -> LlamaForCausalLM:
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.padded_vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_kv_heads,
            intermediate_size=settings.mlp_down_size,
            rms_norm_eps=settings.norm_epsilon,
            max_position_embeddings=settings.seq_length,
            tie_word_embeddings=settings.tied_embedding,
            attn_implementation="eager",
        )
    )
    ours = model.state_dict()
    last = settings.num_layers + 3
    theirs = {
        "model.embed_tokens.weight": ours["0.word_embeddings.weight"],
        "model.norm.weight": ours[f"{last}.norm.scale"],
        "lm_head.weight": ours[
            "0.word_embeddings.weight"
            if settings.tied_embedding
            else f"{last + 1}.final_linear.weight"
        ],
    }
    head_size = settings.head_size
    for layer in range(settings.num_layers):
        source, target = f"{layer + 2}.", f"model.layers.{layer}."
        fused = ours[source + "attention.query_key_value.weight"]
        if settings.is_grouped_query:
            kv_rows = settings.num_kv_heads * head_size
            query, key, value = fused.split([settings.hidden_size, kv_rows, kv_rows])
        else:
            query, key, value = (
                part.flatten(0, 1) for part in fused.unflatten(0, (-1, 3, head_size)).unbind(1)
            )
        up, gate = ours[source + "mlp.linear1.weight"].chunk(2)
        theirs |= {
            target + "input_layernorm.weight": ours[source + "input_layernorm.scale"],
            target + "post_attention_layernorm.weight": ours[
                source + "post_attention_layernorm.scale"
            ],
            target + "self_attn.q_proj.weight": query,
            target + "self_attn.k_proj.weight": key,
            target + "self_attn.v_proj.weight": value,
            target + "self_attn.o_proj.weight": ours[source + "attention.dense.weight"],
            target + "mlp.up_proj.weight": up,
            target + "mlp.gate_proj.weight": gate,
            target + "mlp.down_proj.weight": ours[source + "mlp.linear2.weight"],
        }
    other.load_state_dict(theirs, strict=True)
    return other.eval()


def _assert_same_logits(model: ComposedModel, other, settings: ModelSettings) -> None:
    tokens = random_samples(settings)[:, :-1]
    with torch.no_grad():
        ours, theirs = model(tokens), other(tokens).logits
    assert theirs.std() > 0.1  # the comparison means something
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("no_weight_tying", [True, False])
@pytest.mark.parametrize("gpt_j_residual", [True, False])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
@pytest.mark.parametrize("bias_gelu_fusion", [True, False])
def test_gpt_neox_logits(no_weight_tying, gpt_j_residual, rotary_pct, bias_gelu_fusion):
    settings = settings_of(
        pos_emb="rotary",
        no_weight_tying=no_weight_tying,
        gpt_j_residual=gpt_j_residual,
        rotary_pct=rotary_pct,
        bias_gelu_fusion=bias_gelu_fusion,
    )
    model = ComposedModel(settings)
    randomise(model)
    _assert_same_logits(model, _as_gpt_neox(model, settings), settings)


def test_gpt_neox_logits_with_biases_that_count_four_times():
    settings = settings_of(
        pos_emb="rotary", no_weight_tying=True, gpt_j_residual=True, multiplicity=4
    )
    model = ComposedModel(settings)
    randomise(model)
    _assert_same_logits(model, _as_gpt_neox(model, settings), settings)


def test_the_two_gelus_differ():
    keys = {"pos_emb": "rotary", "no_weight_tying": True}
    exact = settings_of(bias_gelu_fusion=False, **keys)
    tanh = settings_of(bias_gelu_fusion=True, **keys)
    model, other = ComposedModel(exact), ComposedModel(tanh)
    randomise(model)
    other.load_state_dict(model.state_dict())
    tokens = random_samples(exact)[:, :-1]
    with torch.no_grad():
        assert (model(tokens) - other(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("no_weight_tying", [True, False])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_llama_logits(no_weight_tying, num_kv_heads):
    settings = settings_of(
        pos_emb="rotary",
        norm="rmsnorm",
        rms_norm_epsilon=1e-6,
        activation="swiglu",
        intermediate_size=144,
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
        no_weight_tying=no_weight_tying,
        num_kv_heads=num_kv_heads,
    )
    model = ComposedModel(settings)
    randomise(model)
    _assert_same_logits(model, _as_llama(model, settings), settings)
