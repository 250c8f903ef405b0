"""Checkpoints of real NeoX v1.0: masters and moments to the last bit, at every reader."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.flat_partitions import KINDS
from megatron.checkpoint.parameter_state import ParameterStates, open_parameter_states
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_layout import parameter_key
from megatron.checkpoint.structure import structural_problems
from tests.pythia.recorded_runs import RUNS, digest, golden, model_settings, unpack


@pytest.fixture(scope="module", params=RUNS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(request.param, tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def states(recorded: Path) -> ParameterStates:
    return open_parameter_states(
        StoredCheckpoint(recorded / "global_step5"), model_settings(recorded)
    )


def test_every_master_and_moment_is_the_recorded_one(recorded: Path, states: ParameterStates):
    ranks = golden(recorded)
    assert len(ranks) == states.tensor_parallel_size
    for rank, parameters in enumerate(ranks.values()):
        assert {parameter_key(name) for name in parameters} == set(states.names)
        for name, expected in parameters.items():
            for kind in KINDS:
                part = states.part(*parameter_key(name), kind, size=len(ranks), rank=rank)
                assert part.dtype == torch.float32
                assert list(part.shape) == expected["shape"]
                assert digest(part) == expected[kind], f"{kind} of {name} on rank {rank}"


def test_the_masters_rounded_are_the_weights(recorded: Path, states: ParameterStates):
    for layer, name in states.names:
        for rank in range(states.tensor_parallel_size):
            master = states.part(layer, name, "master", size=states.tensor_parallel_size, rank=rank)
            _, weights = states.stored.weights(layer, rank)
            assert torch.equal(master.half(), weights[name])


def test_adam_has_counted_the_dummy_step_and_the_scaler_comes_along(states: ParameterStates):
    assert states.step == 6
    assert states.scaler is not None
    assert (states.scaler.scale, states.scaler.iteration) == (4096.0, 5)
    assert states.scaler.last_overflow_iteration == -1
    assert states.gradient_multiple == 1
    assert states.notices == ()


def test_both_groups_have_the_parameters_v1_gave_them(states: ParameterStates):
    decaying, others = states.groups
    assert (decaying.name, others.name) == ("weight_decay_params", "no_weight_decay_params")
    shapes = {key: len(states.part(*key, "master", size=1, rank=0).shape) for key in states.names}
    assert {shapes[key] for key in decaying.keys} == {2}
    assert {shapes[key] for key in others.keys} == {1}


def test_the_structure_of_a_v1_checkpoint_is_found_whole(recorded: Path):
    assert structural_problems(recorded / "global_step5") == []
