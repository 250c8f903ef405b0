"""Optimizer state between torch's AdamW and NeoX's FusedAdam."""

import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.optimizer_state import adapt_optimizer_state, with_fused_adam_keys


def neox_state(*, group_step=0, state_steps=(0, 0, 7), betas=(0.9, 0.95)):
    """What DeepSpeed's FusedAdam (steps in the last state) or apex's (in the group) leaves."""
    return {
        "state": {
            index: {
                "step": step,
                "exp_avg": torch.full((4,), 3.0),
                "exp_avg_sq": torch.full((4,), 9.0),
            }
            for index, step in enumerate(state_steps)
        },
        "param_groups": [
            {
                "name": "weight_decay_params",
                "lr": 0.25,
                "bias_correction": True,
                "betas": list(betas),
                "eps": 1e-8,
                "weight_decay": 0.1,
                "step": group_step,
                "params": list(range(len(state_steps))),
            }
        ],
    }


def adamw(parameters=3):
    weights = [torch.nn.Parameter(torch.zeros(4)) for _ in range(parameters)]
    groups = [{"params": weights, "name": "weight_decay_params"}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def adapted(saved, live, **options):
    options = {"gradient_multiple": 1, "source": "optim.pt", **options}
    return adapt_optimizer_state(saved, live.param_groups, **options)


@pytest.mark.parametrize(
    "saved",
    [neox_state(), neox_state(group_step=7, state_steps=(0, 0, 0)), neox_state(group_step=3)],
)
def test_every_parameter_goes_on_from_the_largest_step_count_found(saved):
    live = adamw()
    live.load_state_dict(adapted(saved, live).state)
    assert [float(entry["step"]) for entry in live.state.values()] == [7.0, 7.0, 7.0]


def test_loading_keeps_what_torch_has_beside_neox_keys():
    live = adamw()
    before = {key: value for key, value in live.param_groups[0].items() if key != "params"}
    result = adapted(neox_state(), live)
    live.load_state_dict(result.state)
    after = {key: value for key, value in live.param_groups[0].items() if key != "params"}
    # Loaded as it stands, decoupled_weight_decay would have become False.
    assert after == before | {"lr": 0.25}
    assert after["decoupled_weight_decay"] is True
    assert result.notices == ()


def test_moments_of_summed_gradients_become_those_of_averages():
    live = adamw()
    state = adapted(neox_state(), live, gradient_multiple=2).state["state"][0]
    assert torch.equal(state["exp_avg"], torch.full((4,), 1.5))
    assert torch.equal(state["exp_avg_sq"], torch.full((4,), 2.25))


def test_adapted_moments_do_not_share_memory_with_the_file():
    saved, live = neox_state(), adamw()
    state = adapted(saved, live).state["state"]
    assert state[0]["exp_avg"].data_ptr() != saved["state"][0]["exp_avg"].data_ptr()


def test_changed_betas_are_named_and_the_configured_ones_hold():
    live = adamw()
    result = adapted(neox_state(betas=(0.9, 0.999)), live)
    assert result.state["param_groups"][0]["betas"] == (0.9, 0.95)
    assert result.notices == (
        "optimizer betas: [0.9, 0.999] in the checkpoint, [0.9, 0.95] in the configuration, which "
        "holds from here on",
    )


def test_other_groups_are_refused():
    with pytest.raises(
        CheckpointError,
        match=r"optim\.pt holds optimizer state for weight_decay_params with 3 tensors; this run "
        r"has weight_decay_params with 2 tensors",
    ):
        adapted(neox_state(), adamw(parameters=2))
    with pytest.raises(CheckpointError, match="elastic or older ZeRO format"):
        adapted([neox_state()], adamw())


def test_state_of_another_size_is_refused():
    live = adamw()
    saved = neox_state()
    saved["state"][1]["exp_avg_sq"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"optim\.pt: .*exp_avg_sq has shape \(5,\), this"):
        adapted(saved, live)


def test_written_state_has_the_steps_where_each_fused_adam_looks():
    live = adamw()
    for parameter in live.param_groups[0]["params"]:
        parameter.grad = torch.ones(4)
    live.step()
    live.step()
    state = with_fused_adam_keys(live.state_dict())
    (group,) = state["param_groups"]
    assert (group["step"], group["bias_correction"], group["betas"]) == (2, True, [0.9, 0.95])
    steps = [entry["step"] for entry in state["state"].values()]
    assert steps == [2, 2, 2]
    assert all(type(step) is int for step in steps)
    fresh = adamw()
    fresh.load_state_dict(adapted(state, fresh).state)
    assert torch.equal(
        next(iter(fresh.state.values()))["exp_avg"], next(iter(live.state.values()))["exp_avg"]
    )


def test_writing_does_not_touch_the_live_optimizer():
    live = adamw()
    for parameter in live.param_groups[0]["params"]:
        parameter.grad = torch.ones(4)
    live.step()
    with_fused_adam_keys(live.state_dict())
    assert "step" not in live.param_groups[0]
    assert all(torch.is_tensor(entry["step"]) for entry in live.state.values())
