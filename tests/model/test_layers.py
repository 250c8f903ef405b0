"""Dropout, bias multiplicity, data types, loss and first values on one rank."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from megatron.model.initialisation import parameter_seed
from megatron.model.layer_plan import layer_plan
from megatron.model.loss import cross_entropy_loss, token_losses
from megatron.model.parallel_layers import TensorParallel
from megatron.model.rotary import RotaryTable
from tests.model.composed import ComposedModel, random_samples, randomise, settings_of

ROTARY = {"pos_emb": "rotary", "no_weight_tying": True}


def test_the_loss_is_the_masked_mean_of_torchs_cross_entropy():
    logits = torch.randn(2, 5, 11, requires_grad=True)
    reference = logits.detach().clone().requires_grad_()
    labels = torch.randint(0, 11, (2, 5))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 0, 1]], dtype=torch.float32)
    before = logits.detach().clone()
    loss = cross_entropy_loss(logits, labels, mask, TensorParallel())
    each = F.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="none")
    expected = (each * mask.flatten()).sum() / mask.sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, reference.grad)
    assert torch.equal(logits.detach(), before)  # evaluation may still want them


def test_the_loss_of_half_precision_logits_is_computed_in_float32():
    logits = torch.randn(2, 5, 11).bfloat16().requires_grad_()
    labels = torch.randint(0, 11, (2, 5))
    losses = token_losses(logits, labels, TensorParallel())
    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.flatten(), expected)
    losses.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_a_batch_without_a_counting_token_has_no_mean():
    labels = torch.zeros(1, 3, dtype=torch.int64)
    loss = cross_entropy_loss(torch.zeros(1, 3, 4), labels, torch.zeros(1, 3), TensorParallel())
    assert math.isnan(loss)


def test_a_repeated_bias_has_the_gradient_of_one_copy():
    """m copies of b compute what one copy of m*b does, and b gets that copy's gradient."""
    thrice = ComposedModel(settings_of(gpt_j_residual=True, multiplicity=3, **ROTARY))
    once = ComposedModel(settings_of(gpt_j_residual=True, multiplicity=1, **ROTARY))
    randomise(thrice)
    once.load_state_dict(thrice.state_dict())
    with torch.no_grad():
        for name, parameter in once.named_parameters():
            if name.endswith(("dense.bias", "linear2.bias")):
                parameter.mul_(3)
    samples = random_samples(settings_of())
    losses = []
    for model in (thrice, once):
        losses.append(model.loss(samples))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, ours), other in zip(thrice.named_parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("gpt_j_residual", [True, False])
def test_branches_draw_hidden_dropout_masks_of_their_own(gpt_j_residual):
    settings = settings_of(gpt_j_residual=gpt_j_residual, hidden_dropout=0.5, **ROTARY)
    block = ComposedModel(settings).get_submodule("2")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.attention.dense.bias.fill_(1.0)
        block.mlp.linear2.bias.fill_(10.0)
    hidden = torch.zeros(16, 2, 32)
    # Each branch is dropped or doubled on its own: all four sums occur.
    assert set(block(hidden).unique().tolist()) == {0.0, 2.0, 20.0, 22.0}
    assert set(block.eval()(hidden).unique().tolist()) == {11.0}


def test_dropout_follows_the_embedding():
    settings = settings_of(hidden_dropout=0.5, **ROTARY)
    embedding = ComposedModel(settings).get_submodule("0")
    tokens = random_samples(settings)[:, :-1]
    plain = embedding.eval()(tokens)
    dropped = embedding.train()(tokens)
    assert torch.equal(dropped[dropped != 0], 2 * plain[dropped != 0])
    assert 0.4 < (dropped == 0).float().mean() < 0.6


def test_attention_dropout_happens_inside_the_given_random_context():
    entered = []

    @contextmanager
    def own_generator():
        """Draw from another stream and leave the default one as it was."""
        before = torch.get_rng_state()
        torch.manual_seed(7)
        entered.append(True)
        yield
        torch.set_rng_state(before)

    settings = settings_of(attention_dropout=0.5, **ROTARY)
    model = ComposedModel(settings, dropout_rng=own_generator)
    randomise(model)
    tokens = random_samples(settings)[:, :-1]
    state = torch.get_rng_state()
    first = model(tokens)
    assert len(entered) == settings.num_layers
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(tokens), first)
    evaluated = model.eval()(tokens)
    assert len(entered) == 2 * settings.num_layers
    assert not torch.allclose(evaluated, first)


def test_attention_dropout_scales_what_it_keeps():
    settings = settings_of(attention_dropout=0.25, hidden_size=8, num_attention_heads=1, **ROTARY)
    attention = ComposedModel(settings).get_submodule("2").attention
    value = torch.ones(1, 1, 16, 8)
    torch.manual_seed(0)
    rows = torch.stack([attention._attend(value * 0, value * 0, value) for _ in range(2000)])
    torch.testing.assert_close(rows.mean(0), value, atol=0.1, rtol=0)


def test_attention_sees_the_past_only():
    settings = settings_of(**ROTARY)
    model = ComposedModel(settings).eval()
    randomise(model)
    tokens = random_samples(settings, rows=1)[:, :-1]
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % settings.padded_vocab_size
    ours, others = model(tokens), model(changed)
    assert torch.equal(ours[0, :9], others[0, :9])
    assert not torch.allclose(ours[0, 9:], others[0, 9:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_half_precision_stays_close_to_float32(dtype, norm):
    settings = settings_of(norm=norm, gpt_j_residual=True, rotary_pct=0.25, **ROTARY)
    exact = ComposedModel(settings)
    half = ComposedModel(settings, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    samples = random_samples(settings)
    assert half(samples[:, :-1]).dtype == dtype
    assert half.loss(samples).item() == pytest.approx(exact.loss(samples).item(), rel=2e-3)
    # First values are drawn in float32 and rounded.
    for ours, other in zip(half.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, other.to(dtype))


def test_a_sequence_longer_than_the_rotary_table_is_refused():
    model = ComposedModel(settings_of(**ROTARY))
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer than the 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(("head_size", "radians"), [(64, 0.37), (80, 0.42), (128, 0.82)])
def test_rotary_angles_in_half_precision_are_as_far_off_as_in_pythia(head_size, radians):
    exact = RotaryTable(2048, head_size // 4, 10000.0, torch.float64)
    rounded = RotaryTable(2048, head_size // 4, 10000.0, torch.float16, torch.float16)
    cosines, sines = rounded.cosines.double(), rounded.sines.double()
    difference = torch.atan2(
        sines * exact.cosines - cosines * exact.sines,
        cosines * exact.cosines + sines * exact.sines,
    )
    assert difference.abs().max().item() == pytest.approx(radians, abs=0.006)


def test_rotary_tables_of_bfloat16_pythia_are_far_from_those_of_main():
    exact = RotaryTable(2048, 64, 10000.0, torch.bfloat16)
    rounded = RotaryTable(2048, 64, 10000.0, torch.bfloat16, torch.bfloat16)
    error = (rounded.cosines.float() - exact.cosines.float()).abs().mean().item()
    assert error == pytest.approx(0.127, abs=0.002)


@pytest.mark.parametrize(
    ("method", "deviation"),
    [
        ("normal", 0.02),
        ("scaled_normal", 0.02 / math.sqrt(12)),
        ("single_residual_scaled_normal", 0.02 / math.sqrt(6)),
        ("small_init", 0.02795),
        ("wang_init", 0.01473),
        ("xavier_normal", math.sqrt(2 / 1024)),
        ("xavier_uniform", math.sqrt(2 / 1024)),
        ("orthogonal", math.sqrt(2 / 512)),
        ("scaled_orthogonal", math.sqrt(2 / 6 / 512)),
    ],
)
def test_first_values_have_neox_deviations(method, deviation):
    """Square matrices of width 512 in a 6-layer model (spec/model.md §10)."""
    settings = settings_of(
        hidden_size=512, num_layers=6, output_layer_init_method=method, vocabulary=8, **ROTARY
    )
    block = layer_plan(settings, TensorParallel(), seed=1)[2].factory()
    assert block.attention.dense.weight.std().item() == pytest.approx(deviation, rel=0.01)
    assert block.attention.query_key_value.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not block.attention.dense.bias.any()
    assert (block.input_layernorm.weight == 1).all()


def test_every_parameter_has_first_values_of_its_own():
    settings = settings_of(**ROTARY)
    matrices = [p for p in ComposedModel(settings).parameters() if p.dim() > 1]
    assert len({p.flatten()[0].item() for p in matrices}) == len(matrices)
    again = [p for p in ComposedModel(settings).parameters() if p.dim() > 1]
    assert all(torch.equal(ours, other) for ours, other in zip(matrices, again, strict=True))
    other = [p for p in ComposedModel(settings, seed=1235).parameters() if p.dim() > 1]
    assert not any(torch.equal(ours, that) for ours, that in zip(matrices, other, strict=True))


def test_building_a_model_draws_nothing_from_the_default_generator():
    before = torch.get_rng_state()
    ComposedModel(settings_of(pos_emb="learned", init_method="scaled_orthogonal"))
    assert torch.equal(torch.get_rng_state(), before)


def test_parameter_seeds_are_the_same_on_every_machine():
    # Of this very run: another number would mean other first values after an upgrade.
    assert parameter_seed(1234, 0, "word_embeddings.weight") == 782512742166537991
