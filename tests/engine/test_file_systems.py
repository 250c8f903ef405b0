"""Nodes that don't share a file system: every node has its data, and builds its own index maps."""

import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron.cli.run_data import builders_per_node, open_run_data
from megatron.cli.saved_state import Checkpoints
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment, connect
from megatron.stream import component_plans
from megatron.stream.index_map_files import MapRequest, build_map_files
from tests.engine.slow_orders import write_dataset
from tests.engine.training_runs import neox_config
from tests.worlds import RankContext, WorldFailed, run_ranks

RANKS_PER_NODE = 2
NAMES = ("a", "b", "v")
BLEND = {
    "train_data_paths": ["data/a", "data/b"],
    "train_data_weights": [2.0, 1.0],
    "valid_data_paths": ["data/v"],
    "test_data_paths": ["data/v"],
}
ONE = {"data_path": "data/a", "split": "80,10,10"}


@dataclass(frozen=True)
class Opened:
    """What one rank saw."""

    builds: int  # index maps it was the one to build
    tokens: np.ndarray | None  # of the first samples; None: it reads no data


@pytest.fixture
def nodes(tmp_path: Path) -> list[Path]:
    """Two folders with the same data; a rank works in that of its node."""
    folders = [tmp_path / f"node{number}" for number in range(2)]
    for folder in folders:
        for seed, name in enumerate(NAMES):
            write_dataset(folder / "data" / name, seed)
    return folders


def open_data(nodes: list[Path], tmp_path: Path, data: dict[str, Any], **keys: Any) -> list[Opened]:
    """Let two ranks of each node open the data as a launch does."""
    config = neox_config(tmp_path, num_gpus=2 * RANKS_PER_NODE, **keys)
    for key in ("data_path", "split"):
        del config[key]
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({**config, "use_shared_fs": False, **data}))
    resolved = load_config([path], local_slots=lambda: 4)

    def rank_main(context: RankContext) -> Opened:
        node, local_rank = divmod(context.rank, RANKS_PER_NODE)
        os.chdir(nodes[node])
        builds = []

        def counted(request: MapRequest[Any]) -> None:
            builds.append(request.stem)
            build_map_files(request)

        component_plans.build_map_files = counted
        me = RankEnvironment(context.rank, local_rank, context.world_size, context.init_method)
        groups = connect(me, resolved.topology, backend="gloo")
        launch = Checkpoints.open(resolved, groups).launch
        opened = open_run_data(resolved, groups, launch.plan)
        stream = opened.streams.get("train")
        return Opened(len(builds), None if stream is None else stream.read(np.arange(50)))

    return run_ranks(rank_main, 2 * RANKS_PER_NODE, tmp_path)


def maps(node: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (node / "data").glob("*.npy")}


@pytest.mark.distributed
@pytest.mark.parametrize("data", [BLEND, ONE], ids=["train_data_paths", "data_path"])
def test_index_maps_are_built_once_per_node_also_for_lists_of_datasets(
    data: dict[str, Any], nodes: list[Path], tmp_path: Path
):
    opened = open_data(nodes, tmp_path, data)
    per_launch = len({name for name in maps(nodes[0]) if name.endswith("_shuffle_idx.npy")})
    assert per_launch >= 3
    assert [rank.builds for rank in opened] == [per_launch, 0, per_launch, 0]
    assert maps(nodes[0]) == maps(nodes[1])
    assert all(np.array_equal(rank.tokens, opened[0].tokens) for rank in opened)


@pytest.mark.distributed
def test_a_node_whose_ranks_read_nothing_needs_no_data(nodes: list[Path], tmp_path: Path):
    shutil.rmtree(nodes[1] / "data")
    opened = open_data(nodes, tmp_path, ONE, model_parallel_size=4, num_attention_heads=4)
    assert [rank.tokens is None for rank in opened] == [False, True, True, True]


def _another_dataset(folder: Path) -> None:
    write_dataset(folder / "a", 77)


def _other_bytes(folder: Path) -> None:
    content = bytearray((folder / "a.bin").read_bytes())
    content[100] ^= 1
    (folder / "a.bin").write_bytes(content)


@pytest.mark.distributed
@pytest.mark.parametrize("damage", [_another_dataset, _other_bytes])
def test_a_node_with_other_data_is_named_before_anything_is_read(
    damage: Callable[[Path], None], nodes: list[Path], tmp_path: Path
):
    damage(nodes[1] / "data")
    message = (
        rf"{socket.gethostname()} has other data than the node of rank 0, whose "
        rf"{re.escape(str(nodes[0]))}/data/a has 40 documents, \d+ tokens, content [0-9a-f]{{12}}. "
        r"Here is data/a: 40 documents, \d+ tokens, content .*Copy the same files to every node"
    )
    with pytest.raises(WorldFailed, match=message):
        open_data(nodes, tmp_path, BLEND)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=5))
def test_each_node_that_reads_has_one_builder_and_it_reads(reads_of_nodes: list[list[bool]]):
    local_ranks = [local for node in reads_of_nodes for local in range(len(node))]
    reads = [does for node in reads_of_nodes for does in node]
    nodes = [number for number, node in enumerate(reads_of_nodes) for _ in node]
    builders = builders_per_node(local_ranks, reads)
    assert all(reads[rank] for rank in builders)
    assert sorted(nodes[rank] for rank in builders) == [
        number for number, node in enumerate(reads_of_nodes) if any(node)
    ]
