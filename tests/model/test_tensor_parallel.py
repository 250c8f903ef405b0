"""Two tensor ranks compute what one computes: first values, loss and gradients."""

import io
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import deepspeed  # noqa: F401 - warm before ranks are forked
import pytest
import torch
import torch.distributed

from megatron.model.parallel_layers import TensorParallel
from megatron.model.tp_layout import merge, split
from tests.model.composed import ComposedModel, random_samples, randomise, settings_of
from tests.worlds import RankContext, run_ranks

LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "intermediate_size": 96,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sequential residual": {},
    "parallel residual, biases once": {"gpt_j_residual": True},
    "parallel residual, biases twice": {"gpt_j_residual": True, "multiplicity": 2},
    "parallel residual, biases three times": {"gpt_j_residual": True, "multiplicity": 3},
    "parallel residual, one norm": {"gpt_j_residual": True, "gpt_j_tied": True},
    "parallel residual, no biases": {
        "gpt_j_residual": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
    "tied embedding, learned positions": {"no_weight_tying": False, "pos_emb": "learned"},
    "no positions": {"pos_emb": "none"},
    "llama": LLAMA,
    "grouped queries": {**LLAMA, "num_kv_heads": 2, "use_bias_in_attn_linear": True},
    "relative positions": {"pos_emb": "rpe"},
    "ALiBi in a window": {"pos_emb": "alibi", "sliding_window_width": 3},
    "sinusoids, ScaleNorm": {"pos_emb": "sinusoidal", "norm": "scalenorm"},
    "LayerNorm without parameters, GEGLU": {
        "norm": "non_parametric_layernorm",
        "activation": "geglu",
        "intermediate_size": 96,
    },
    "normed queries and keys": {**LLAMA, "use_qk_layernorm": True},
    "saved frequencies": {"rotary_save_freqs_buffer": True},
    "hidden dropout": {"hidden_dropout": 0.2},
    "hidden dropout, parallel residual": {"hidden_dropout": 0.2, "gpt_j_residual": True},
    "a vocabulary that does not divide": {"vocabulary": 131},
    "the same, tied": {"vocabulary": 131, "no_weight_tying": False},
}


def _settings(variant: str):
    return settings_of(**{"pos_emb": "rotary", "no_weight_tying": True, **VARIANTS[variant]})


def _two_ranks(tmp_path, worker: Callable[[TensorParallel], Any]) -> list[Any]:
    def connected(context: RankContext) -> bytes:
        torch.distributed.init_process_group(
            "gloo", init_method=context.init_method, rank=context.rank, world_size=2
        )
        result = io.BytesIO()  # a tensor sent as it is needs its rank alive to be received
        torch.save(worker(TensorParallel.of_group(torch.distributed.group.WORLD)), result)
        return result.getvalue()

    return [torch.load(io.BytesIO(result)) for result in run_ranks(connected, 2, tmp_path)]


def _loss_and_gradients(model: ComposedModel, settings) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(99)  # hidden dropout draws from the default generator
    loss = model.loss(random_samples(settings))
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients


@pytest.mark.distributed
def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path):
    whole_models = {}
    for variant in VARIANTS:
        model = ComposedModel(_settings(variant))
        randomise(model)
        whole_models[variant] = model

    def worker(tensor_parallel: TensorParallel) -> dict[str, Any]:
        results = {}
        for variant, whole in whole_models.items():
            settings = _settings(variant)
            model = ComposedModel(settings, tensor_parallel)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    full = whole.state_dict()[name]
                    mine = split(name, full, size=2, rank=tensor_parallel.rank, settings=settings)
                    assert mine.shape == parameter.shape, (variant, name)
                    parameter.copy_(mine)
            results[variant] = _loss_and_gradients(model, settings)
        return results

    ranks = _two_ranks(tmp_path, worker)
    for variant, whole in whole_models.items():
        settings = _settings(variant)
        expected_loss, expected = _loss_and_gradients(whole, settings)
        losses, gradients = zip(*(rank[variant] for rank in ranks), strict=True)
        assert losses[0] == losses[1], variant
        assert losses[0] == pytest.approx(expected_loss, rel=1e-6), variant
        assert set(gradients[0]) == set(gradients[1]) == set(expected), variant
        for name, gradient in expected.items():
            merged = merge(name, [part[name] for part in gradients], settings)
            torch.testing.assert_close(
                merged, gradient, rtol=1e-4, atol=1e-6, msg=f"{variant}: {name}"
            )
            if merged is gradients[0][name]:  # held by both ranks: they must not drift apart
                torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
def test_first_values_do_not_depend_on_the_tensor_parallel_size(tmp_path):
    def worker(tensor_parallel: TensorParallel) -> dict[str, Any]:
        return {
            variant: ComposedModel(_settings(variant), tensor_parallel).state_dict()
            for variant in VARIANTS
        }

    ranks = _two_ranks(tmp_path, worker)
    for variant in VARIANTS:
        settings = _settings(variant)
        for name, whole in ComposedModel(settings).state_dict().items():
            merged = merge(name, [rank[variant][name] for rank in ranks], settings)
            assert torch.equal(merged, whole), (variant, name)


@pytest.mark.distributed
def test_rows_beyond_the_vocabulary_get_no_probability_and_no_gradient(tmp_path):
    settings = _settings("a vocabulary that does not divide")

    def worker(tensor_parallel: TensorParallel) -> Any:
        model = ComposedModel(settings, tensor_parallel)
        logits = model(random_samples(settings)[:, :-1])
        model.loss(random_samples(settings)).backward()
        head = model.get_submodule("6").final_linear.weight
        words = model.get_submodule("0").word_embeddings.weight
        return logits[..., -1].detach(), head.detach()[-1], head.grad[-1], words.grad[-1]

    first, second = _two_ranks(tmp_path, worker)
    assert torch.isfinite(first[0]).all()
    assert first[2].abs().max() > 0
    assert torch.isneginf(second[0]).all()
    assert all(not tensor.any() for tensor in second[1:])


@pytest.mark.distributed
def test_a_parallel_residual_costs_one_all_reduce_per_block(tmp_path):
    def worker(tensor_parallel: TensorParallel) -> list[int]:
        counts = []
        for gpt_j_residual in (True, False):
            settings = settings_of(
                pos_emb="rotary", gpt_j_residual=gpt_j_residual, no_weight_tying=True
            )
            model = ComposedModel(settings, tensor_parallel)
            with _counted_all_reduces() as calls, torch.no_grad():
                model(random_samples(settings)[:, :-1])
            counts.append(len(calls))
        return counts

    # One more for the embedding.
    assert _two_ranks(tmp_path, worker) == [[2 + 1, 4 + 1]] * 2


@contextmanager
def _counted_all_reduces():
    calls = []
    original = torch.distributed.all_reduce

    def counted(*positional, **named):
        calls.append(positional)
        return original(*positional, **named)

    torch.distributed.all_reduce = counted
    try:
        yield calls
    finally:
        torch.distributed.all_reduce = original
