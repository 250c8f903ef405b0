"""What ranks hold is arithmetic: every element once, in DeepSpeed's order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.checkpoint.reshape.plan import FlatGroup, StageParameter, stage_bounds

groups = st.builds(
    lambda sizes, ranks: FlatGroup(
        tuple(
            StageParameter(2, f"tensor{number}", f"2.tensor{number}", (size,))
            for number, size in enumerate(sizes)
        ),
        ranks,
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 9),
)


@given(groups)
def test_ranks_together_hold_every_element_of_a_group_once_and_in_order(group):
    held = []
    for rank in range(group.num_partitions):
        end = 0
        for fragment in group.fragments(rank):
            assert fragment.offset == end  # nothing lies between two fragments
            end += fragment.num_elements
            held += [(fragment.parameter.name, i) for i in range(fragment.start, fragment.stop)]
        assert end + group.padding(rank) == group.partition_size
    assert held == [(one.name, i) for one in group.parameters for i in range(one.num_elements)]


@given(groups)
def test_padding_stands_at_the_end_and_makes_parts_of_an_even_number(group):
    assert group.partition_size % 2 == 0
    assert sum(map(group.padding, range(group.num_partitions))) < 2 * group.num_partitions


NAMES = [
    "EmbeddingPipe",
    "to_sequence_first",
    *["ParallelTransformerLayerPipe"] * 4,
    "to_batch_first",
    "NormPipe",
    "ParallelLinearPipe",
]
COUNTS = [640, 0, 100, 100, 100, 100, 0, 8, 640]


@pytest.mark.parametrize(
    ("method", "bounds"),
    [
        ("uniform", [range(5), range(5, 9)]),
        ("parameters", [range(4), range(4, 9)]),
        ("type:transformer|mlp", [range(4), range(4, 9)]),
        ("type:Norm", [range(8), range(8, 9)]),
    ],
)
def test_layers_are_divided_over_two_stages_as_configured(method, bounds):
    assert stage_bounds(NAMES, COUNTS, 2, method=method) == bounds


def test_methods_that_divide_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"'profile' is not known; uniform, parameters"):
        stage_bounds(NAMES, COUNTS, 2, method="profile")
    with pytest.raises(ConfigError, match=r"no layer is of such a type"):
        stage_bounds(NAMES, COUNTS, 2, method="type:mamba")
