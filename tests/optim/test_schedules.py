"""Learning rates against those real NeoX logged, Pythia's published ones, and each other."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import CheckpointError, ConfigError
from megatron.config.groups.lr_scheduler import LRScheduler
from megatron.config.groups.optimizer import Optimizer
from megatron.config.groups.training import Training
from megatron.optim.schedules import (
    LearningRateSchedule,
    LearningRateScheduler,
    ScheduleSettings,
    continued_schedule,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "data/optim/learning_rates.json").read_text())
STYLES = ("constant", "linear", "cosine", "exponential")
COSINE = ScheduleSettings(
    start_lr=1e-3, min_lr=1e-4, warmup=0.25, decay_iters=8, decay_style="cosine"
)


class Groups:
    def __init__(self, num_groups=2):
        self.param_groups = [{"lr": 99.0} for _ in range(num_groups)]


@st.composite
def all_settings(draw):
    start_lr = draw(st.floats(1e-6, 1.0))
    return ScheduleSettings(
        start_lr=start_lr,
        min_lr=start_lr * draw(st.floats(0.0, 1.0)),
        warmup=draw(st.floats(0.0, 1.0)),
        decay_iters=draw(st.integers(1, 10_000)),
        decay_style=draw(st.sampled_from(STYLES)),
        version=draw(st.sampled_from(["main", "v1.0"])),
    )


def settings_of(config):
    keys = dict(config)
    return ScheduleSettings.from_config(
        optimizer=Optimizer(lr=keys.pop("lr")),
        training=Training(train_iters=keys.pop("train_iters")),
        lr_scheduler=LRScheduler(**keys),
    )


@pytest.mark.parametrize("run", sorted(GOLDEN["runs"]))
def test_the_rate_logged_at_each_step_is_neox_to_the_last_bit(run):
    recorded = GOLDEN["runs"][run]
    optimizer = Groups()
    scheduler = LearningRateScheduler(optimizer, settings_of(recorded["config"]))
    if run == "oracle/a_resume10":
        scheduler.load_state_dict(GOLDEN["checkpoint_states"]["oracle/ckpt_a"])
    for step, rate, is_skipped in recorded["steps"]:
        if not is_skipped:
            scheduler.step()
        assert scheduler.get_lr() == [rate, rate], f"step {step}"


def test_a_checkpoint_of_neox_and_ours_hold_the_same_scheduler_state():
    scheduler = LearningRateScheduler(Groups(), settings_of(GOLDEN["runs"]["oracle/a"]["config"]))
    for _ in range(10):
        scheduler.step()
    assert scheduler.state_dict() == GOLDEN["checkpoint_states"]["oracle/ckpt_a"]


@pytest.mark.parametrize(
    ("count", "rate"),
    [
        (0, 0.0),
        (1000, 6.99301e-4),
        (1430, 1e-3),
        (2000, 9.99961e-4),
        (50_000, 7.41358e-4),
        (100_000, 2.19868e-4),
        (115_000, 1.00917e-4),
        (115_139, 1e-4),
        (143_000, 1e-4),
    ],
)
def test_the_v1_formula_gives_pythias_rates(count, rate):
    pythia = ScheduleSettings(
        start_lr=1e-3,
        min_lr=1e-4,
        warmup=0.01,
        decay_iters=143_000,
        decay_style="cosine",
        version="v1.0",
    )
    assert pythia.schedule().at(count) == pytest.approx(rate, rel=5e-6)


@pytest.mark.parametrize(
    ("style", "halfway", "end"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.5, 0.1),
        ("cosine", 0.55, 0.1),
        ("exponential", math.exp(-0.3465), math.exp(-0.693)),
    ],
)
def test_mains_decay_passes_through_its_middle_and_end(style, halfway, end):
    schedule = LearningRateSchedule(
        start_lr=1.0, min_lr=0.1, warmup_iter=100.0, end_iter=1100, decay_style=style
    )
    assert schedule.at(100) == 1.0
    assert schedule.at(600) == pytest.approx(halfway)
    assert schedule.at(1100) == pytest.approx(end)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("constant", 1.0),
        ("linear", 0.6),
        ("cosine", 0.5 * (math.cos(0.4 * math.pi) + 1)),
        ("exponential", math.exp(-0.693 * 0.4)),
    ],
)
def test_the_v1_decay_is_measured_over_the_whole_length_and_stands_still_for_the_last_warmup(
    style, expected
):
    schedule = LearningRateSchedule(1.0, 0.0, 100.0, 1000, style, version="v1.0")
    assert schedule.at(500) == pytest.approx(expected)
    assert schedule.at(900) == schedule.at(1000) == schedule.at(5000)


@given(all_settings(), st.integers(0, 30_000))
def test_no_rate_of_a_warmup_of_whole_steps_is_above_the_peak(settings, count):
    schedule = settings.schedule()
    if schedule.warmup_iter == 0 or 1 <= schedule.warmup_iter <= schedule.end_iter / 2:
        assert 0.0 <= schedule.at(count) <= settings.start_lr * (1 + 1e-12)


def test_a_warmup_shorter_than_a_step_begins_above_the_peak_as_in_neox():
    schedule = replace(COSINE, warmup=0.01, decay_iters=20).schedule()
    assert schedule.at(0) == pytest.approx(5 * COSINE.start_lr)
    assert schedule.at(1) < COSINE.start_lr


@given(all_settings(), st.integers(0, 30_000))
def test_after_the_warmup_no_rate_is_below_the_floor(settings, count):
    schedule = settings.schedule()
    if count > schedule.warmup_iter:
        assert schedule.at(count) >= settings.min_lr


@given(all_settings(), st.integers(1, 10_000))
def test_rates_fall_from_the_end_of_the_warmup_to_the_end_of_the_decay(settings, count):
    schedule = settings.schedule()
    if schedule.warmup_iter <= count < schedule.end_iter:
        assert schedule.at(count + 1) <= schedule.at(count) * (1 + 1e-12)


@given(all_settings(), st.integers(0, 10_000), st.integers(0, 50))
def test_resuming_at_a_count_equals_having_run_to_it(settings, count, more):
    straight, resumed = (LearningRateScheduler(Groups(), settings) for _ in range(2))
    straight.num_iters = count
    resumed.load_state_dict(straight.state_dict())
    for scheduler in (straight, resumed):
        for _ in range(more):
            scheduler.step()
        scheduler.apply()
    assert resumed.get_lr() == straight.get_lr()
    assert resumed.state_dict() == straight.state_dict()


def test_mains_cosine_rises_again_past_its_end_unless_the_checkpoint_is_followed():
    unclamped = COSINE.schedule()
    clamped = replace(COSINE, follows_checkpoint=True).schedule()
    assert unclamped.at(11) == pytest.approx(5.5e-4)
    assert [clamped.at(count) for count in range(9)] == [unclamped.at(c) for c in range(9)]
    assert clamped.at(11) == clamped.at(8) == 1e-4


def test_the_rate_is_divided_by_a_groups_width_multiplier():
    optimizer = Groups()
    optimizer.param_groups[1]["width_mult"] = 4.0
    scheduler = LearningRateScheduler(optimizer, COSINE)
    assert scheduler.get_lr() == [5e-4, 1.25e-4]


def test_rates_reach_the_groups_an_optimizer_has_after_it_loaded_a_state():
    optimizer = Groups()
    scheduler = LearningRateScheduler(optimizer, COSINE)
    optimizer.param_groups = [{"lr": 99.0}]  # torch replaces the list
    scheduler.step()
    assert optimizer.param_groups == [{"lr": 5e-4}]


@pytest.mark.parametrize(
    ("keys", "decay_iters"),
    [
        ({"train_iters": 100}, 100),
        ({"train_iters": 100, "lr_decay_fraction": 0.9}, 90),
        ({"train_iters": 99, "lr_decay_fraction": 0.5}, 49),
        ({"train_iters": 100, "lr_decay_fraction": 0.9, "lr_decay_iters": 70}, 70),
        ({"train_iters": 0}, 1),
    ],
)
def test_the_decay_length_comes_from_its_key_then_the_fraction_then_train_iters(keys, decay_iters):
    assert settings_of({"lr": 1.0} | keys).decay_iters == decay_iters


STATE = {
    "start_lr": 1e-3,
    "warmup_iter": 1.0,
    "num_iters": 3,
    "decay_style": "cosine",
    "end_iter": 4,
    "min_lr": 1e-4,
}


def test_another_schedule_in_the_checkpoint_is_refused_with_both_rates_and_the_ways_out():
    with pytest.raises(ConfigError) as refused:
        continued_schedule(COSINE, STATE)
    message = str(refused.value)
    assert "warmup_iter 1.0 in the checkpoint, 2.0 configured" in message
    assert "end_iter 4 in the checkpoint, 8 configured" in message
    assert [line.strip() for line in message.splitlines() if "step " in line] == [
        "step         4: 3.250000e-04 -> 9.397114e-04",
        "step         5: 1.000000e-04 -> 7.750000e-04",
        "step         6: 1.000000e-04 -> 5.500000e-04",
        "step         7: 1.000000e-04 -> 3.250000e-04",
        "step         8: 1.000000e-04 -> 1.602886e-04",
    ]
    assert "lr_decay_iters: 4" in message
    assert "override_lr_scheduler: true" in message
    assert "use_checkpoint_lr_scheduler: true" in message


@pytest.mark.parametrize("key", ["start_lr", "warmup_iter", "decay_style", "end_iter", "min_lr"])
def test_each_part_of_the_schedule_is_compared(key):
    state = LearningRateScheduler(Groups(), COSINE).state_dict()
    state[key] = "linear" if key == "decay_style" else state[key] / 2
    with pytest.raises(ConfigError, match=f"{key} .* in the checkpoint, .* configured"):
        continued_schedule(COSINE, state)


def test_overriding_keeps_the_configured_schedule_at_the_checkpoints_count():
    scheduler = LearningRateScheduler(Groups(), replace(COSINE, overrides_checkpoint=True))
    scheduler.load_state_dict(STATE)
    assert scheduler.state_dict() == {
        "start_lr": 1e-3,
        "warmup_iter": 2.0,
        "num_iters": 3,
        "decay_style": "cosine",
        "end_iter": 8,
        "min_lr": 1e-4,
    }


def test_following_takes_the_checkpoints_schedule_and_stays_at_its_end():
    scheduler = LearningRateScheduler(Groups(), replace(COSINE, follows_checkpoint=True))
    scheduler.load_state_dict(STATE)
    assert scheduler.state_dict() == STATE
    for _ in range(20):
        scheduler.step()
    assert scheduler.get_lr() == [1e-4, 1e-4]


def test_a_state_without_its_count_is_refused():
    state = {key: value for key, value in STATE.items() if key != "num_iters"}
    with pytest.raises(CheckpointError, match="lr_scheduler state lacks num_iters"):
        LearningRateScheduler(Groups(), COSINE).load_state_dict(state)


def test_both_ways_out_at_once_are_refused():
    with pytest.raises(ConfigError, match="are both true"):
        replace(COSINE, overrides_checkpoint=True, follows_checkpoint=True)


def test_a_warmup_that_is_no_fraction_is_refused():
    with pytest.raises(ConfigError, match=r"warmup=1\.5 must be a fraction between 0 and 1"):
        replace(COSINE, warmup=1.5)


def test_deepspeed_can_tell_it_from_a_factory():
    # deepspeed.initialize calls whatever is callable with the optimizer.
    assert not callable(LearningRateScheduler(Groups(), COSINE))


def test_a_key_set_to_null_is_refused_by_name():
    with pytest.raises(ConfigError, match="warmup is null"):
        settings_of({"lr": 1.0, "train_iters": 10, "warmup": None})
