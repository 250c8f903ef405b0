"""NeoX v1.0's optimizer files in any layout: intervals, padding, ranks, both forms."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.base.errors import CheckpointError
from megatron.checkpoint.parameter_state import ParameterStates, open_parameter_states
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_layout import parameter_key
from megatron.checkpoint.structure import examine, structural_problems
from megatron.checkpoint.weight_copies import differing_weights
from tests.pythia.v1_writer import KINDS, V1Layout, V1Model, Values, write_checkpoint

MODEL = V1Model()
MATRICES, OTHERS = (
    sum(torch.Size(shape).numel() for shape in MODEL.shapes(1).values() if len(shape) == dims)
    for dims in (2, 1)
)


@st.composite
def layouts(draw: st.DrawFn) -> V1Layout:
    ranks = draw(st.integers(1, 7))
    tensor = draw(st.sampled_from([1, 2]))
    intervals = [draw(st.integers(1, 4)) for _ in range(2)]
    # From the smallest sub-partition that makes so many intervals do, to one with much padding.
    sizes = [
        draw(st.integers(-(-count // (ranks * number)), count // (ranks * number) + count // ranks))
        for count, number in zip((MATRICES // tensor, OTHERS // tensor), intervals, strict=True)
    ]
    return V1Layout(
        data_ranks=ranks,
        sub_sizes=(sizes[0], sizes[1]),
        extra_intervals=draw(st.sampled_from([0, 0, 1, 2])),
        is_elastic=draw(st.booleans()),
        tensor_ranks=tensor,
        stages=draw(st.sampled_from([1, 1, 2])),
        has_underscore=draw(st.booleans()),
    )


def opened(directory: Path, **options: str) -> ParameterStates:
    return open_parameter_states(StoredCheckpoint(directory), MODEL.settings, **options)


def require_equal(states: ParameterStates, written: Values) -> None:
    for rank, kinds in enumerate(written):
        for kind in KINDS:
            for name, expected in kinds[kind].items():
                found = states.part(*parameter_key(name), kind, size=len(written), rank=rank)
                assert torch.equal(found, expected), f"{kind} of {name} on rank {rank}"


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_whatever_the_layout_every_value_is_found(
    layout: V1Layout, seed: int, tmp_path_factory: pytest.TempPathFactory
):
    directory = tmp_path_factory.mktemp("v1") / "global_step9"
    written = write_checkpoint(directory, layout, seed=seed)
    assert structural_problems(directory) == []
    assert differing_weights(examine(directory)) == []
    states = opened(directory)
    require_equal(states, written)
    assert states.step == 8
    assert states.scaler is not None
    assert (states.scaler.last_overflow_iteration, states.scaler.hysteresis) == (3, 1)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_pipelines_stages_have_an_optimizer_each(zero_stage: int, tmp_path: Path):
    layout = V1Layout(stages=2, tensor_ranks=2, zero_stage=zero_stage)
    written = write_checkpoint(tmp_path / "global_step9", layout)
    assert len(list((tmp_path / "global_step9").glob("mp_rank_*"))) == 4
    assert structural_problems(tmp_path / "global_step9") == []
    require_equal(opened(tmp_path / "global_step9"), written)


@pytest.mark.parametrize("is_elastic", [True, False])
def test_the_parts_of_one_interval_are_dealt_before_those_of_the_next(tmp_path, is_elastic):
    layout = V1Layout(data_ranks=3, sub_sizes=(200, 30), is_elastic=is_elastic)
    assert [layout.of_group(MATRICES, 0)[1], layout.of_group(OTHERS, 1)[1]] == [3, 3]
    written = write_checkpoint(tmp_path / "global_step9", layout)
    require_equal(opened(tmp_path / "global_step9"), written)


def test_partitions_may_be_empty_and_files_larger_than_their_tensors(tmp_path: Path):
    layout = V1Layout(data_ranks=7, sub_sizes=(MATRICES, OTHERS), extra_intervals=1)
    written = write_checkpoint(tmp_path / "global_step9", layout)
    content = torch.load(
        tmp_path / "global_step9" / "zero_pp_rank_6_mp_rank_00_optim_states.pt", weights_only=False
    )
    masters = content["optimizer_state_dict"]["local_sub_partitions_of_fp32_groups"]
    assert [part.numel() for part in masters[0]][-1] == 0
    assert masters[0][-1].untyped_storage().nbytes() > 0
    require_equal(opened(tmp_path / "global_step9"), written)


def test_the_old_resume_rule_counts_from_one_where_nothing_is_stored(tmp_path: Path):
    write_checkpoint(tmp_path / "elastic" / "global_step9", V1Layout())
    write_checkpoint(tmp_path / "rigid" / "global_step9", V1Layout(is_elastic=False))
    steps = {
        (form, rule): opened(tmp_path / form / "global_step9", adam_step=rule).step
        for form in ("elastic", "rigid")
        for rule in ("continue", "neox-v1-resume")
    }
    assert steps == {
        ("elastic", "continue"): 8,  # 7 updates and the dummy step; 2 more steps overflowed
        ("elastic", "neox-v1-resume"): 1,
        ("rigid", "continue"): 8,
        ("rigid", "neox-v1-resume"): 8,  # v1.0 restores it there
    }


def test_iteration_0_has_taken_the_dummy_step_and_no_other(tmp_path: Path):
    written = write_checkpoint(tmp_path / "global_step0", V1Layout(updates=0, skipped=0))
    states = opened(tmp_path / "global_step0")
    assert (states.stored.iteration, states.step, states.has_moments) == (0, 1, True)
    require_equal(states, written)


def test_the_files_may_lie_in_a_directory_of_any_name(tmp_path: Path):
    written = write_checkpoint(tmp_path / "pythia-70m", V1Layout())
    states = opened(tmp_path / "pythia-70m")
    assert states.stored.iteration == 9
    require_equal(states, written)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
@pytest.mark.parametrize("is_fp16", [True, False])
@pytest.mark.parametrize("is_pipeline", [True, False])
def test_without_zero_the_optimizer_is_in_the_metadata_files(
    is_pipeline: bool, is_fp16: bool, tensor_ranks: int, tmp_path: Path
):
    layout = V1Layout(
        zero_stage=0, is_pipeline=is_pipeline, is_fp16=is_fp16, tensor_ranks=tensor_ranks
    )
    written = write_checkpoint(tmp_path / "global_step9", layout)
    assert structural_problems(tmp_path / "global_step9") == []
    states = opened(tmp_path / "global_step9", adam_step="neox-v1-resume")
    require_equal(states, written)
    assert states.step == 8  # stored here, and so restored by v1.0 too
    assert (states.scaler is not None) == is_fp16
    if states.scaler is not None:
        assert (states.scaler.last_overflow_iteration, states.scaler.hysteresis) == (3, None)


def test_bf16_has_no_loss_scale(tmp_path: Path):
    written = write_checkpoint(tmp_path / "global_step9", V1Layout(is_fp16=False))
    states = opened(tmp_path / "global_step9")
    assert states.scaler is None
    assert states.weight_dtype == torch.bfloat16
    require_equal(states, written)


def test_weights_that_are_not_the_masters_rounded_are_found(tmp_path: Path):
    directory = tmp_path / "global_step9"
    write_checkpoint(directory, V1Layout(data_ranks=3, sub_sizes=(200, 30), tensor_ranks=2))
    assert differing_weights(examine(directory)) == []
    path = directory / "layer_03-model_01-model_states.pt"
    content = torch.load(path)
    content["post_attention_layernorm.bias"][5] *= 1.001
    content["mlp.dense_4h_to_h.weight"][-1, -1] *= 1.001
    torch.save(content, path)
    (problem,) = differing_weights(examine(directory))
    assert problem.startswith(
        "layer_03-model_01-model_states.pt: mlp.dense_4h_to_h.weight, "
        "post_attention_layernorm.bias of layer 3 differ from the optimizer's copies"
    )


def test_a_missing_file_is_named(tmp_path: Path):
    write_checkpoint(tmp_path / "global_step9", V1Layout(data_ranks=3))
    (tmp_path / "global_step9" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"3 data-parallel ranks, but .* ranks 1 are missing"):
        opened(tmp_path / "global_step9")


def test_a_file_of_another_layout_is_refused(tmp_path: Path):
    one, other = tmp_path / "one" / "global_step9", tmp_path / "other" / "global_step9"
    write_checkpoint(one, V1Layout(sub_sizes=(300, 30)))
    write_checkpoint(other, V1Layout(sub_sizes=(700, 30)))
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (one / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CheckpointError, match="intervals of group 0: they come from different"):
        opened(one).part(0, "word_embeddings.weight", "master", size=1, rank=0)


def test_a_part_with_elements_too_few_is_refused(tmp_path: Path):
    directory = tmp_path / "global_step9"
    write_checkpoint(directory, V1Layout())
    path = directory / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    masters = content["optimizer_state_dict"]["local_sub_partitions_of_fp32_groups"]
    masters[1][0] = masters[1][0].detach()[:-1].clone()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"groups of \[{MATRICES}, {OTHERS - 1}\] elements"):
        opened(directory).part(2, "input_layernorm.bias", "master", size=1, rank=0)


def test_a_moment_of_another_size_is_refused(tmp_path: Path):
    directory = tmp_path / "global_step9"
    write_checkpoint(directory, V1Layout())
    path = directory / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    entry = content["optimizer_state_dict"]["base_optimizer_state"][0][0]
    entry["exp_avg"] = entry["exp_avg"][:-1].clone()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"exp_avg of group 0 has .* elements in each interv"):
        opened(directory).part(0, "word_embeddings.weight", "exp_avg", size=1, rank=0)
