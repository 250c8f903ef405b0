"""What ranks find in their environment; slots, cores and ports."""

import ast
import socket
import subprocess
import sys

import pytest

from megatron.base.errors import LaunchError
from megatron.engine.launch import placement as placement_module
from megatron.engine.launch.devices import count_devices, local_slots
from megatron.engine.launch.placement import NodePlacement, rank_environment
from megatron.engine.launch.port import reserve_port
from tests.launch.launches import REPOSITORY

TWO_RANKS = NodePlacement(slots=(0, 1), master_port=29500)


@pytest.mark.parametrize(
    ("environ", "cores", "threads"),
    [({}, 8, "4"), ({}, 3, "1"), ({}, 1, "1"), ({"OMP_NUM_THREADS": "6"}, 8, "6")],
)
def test_ranks_share_the_cores_evenly_unless_the_user_has_chosen(environ, cores, threads):
    assert rank_environment(TWO_RANKS, 0, environ, cores)["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("slots", "environ", "visible"),
    [
        ((0, 1), {}, "0,1"),
        ((0, 2), {}, "0,2"),
        ((0, 2), {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "4,6"),
        ((1,), {"CUDA_VISIBLE_DEVICES": "GPU-aa, GPU-bb"}, "GPU-bb"),
        ((0, 1), {"CUDA_VISIBLE_DEVICES": ""}, "0,1"),
    ],
)
def test_slots_count_within_the_devices_left_visible(slots, environ, visible):
    place = NodePlacement(slots=slots, master_port=29500)
    assert rank_environment(place, 0, environ, 1)["CUDA_VISIBLE_DEVICES"] == visible


def test_a_later_node_counts_on_from_the_ranks_before_it():
    place = NodePlacement(
        slots=(0, 1),
        master_port=1,
        master_addr="n0",
        first_rank=4,
        world_size=6,
        node_index=2,
        num_nodes=3,
    )
    environment = rank_environment(place, 1, {}, 1)
    expected = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "CROSS_RANK": "2",
        "CROSS_SIZE": "3",
    }
    assert expected.items() <= environment.items()
    assert environment["MASTER_ADDR"] == "n0"


def test_the_smallest_quota_of_a_cgroup_and_those_around_it_counts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/x\n0::/job/step\n")
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    assert placement_module._cgroup_quota(membership, tmp_path) == 2.5
    assert placement_module._cgroup_quota(tmp_path / "none", tmp_path) == float("inf")


def test_a_machine_without_gpus_has_one_slot():
    environ = {"DS_ACCELERATOR": "cpu"}
    assert (count_devices(environ), local_slots(environ)) == (0, 1)


def test_launches_at_the_same_time_get_different_ports():
    with reserve_port(None) as first, reserve_port(None) as second:
        assert first != second
        # Rank 0 can listen on the port kept for it, as torch's store does.
        with socket.socket() as store:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("", second))
            store.listen()


def test_a_named_port_that_is_taken_is_an_error():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(LaunchError, match=f"master_port {port} is taken on this machine"),
            reserve_port(port),
        ):
            pass


def test_launching_imports_nothing_heavy():
    code = "import sys, megatron.engine.launch.agent, megatron.engine.launch.multi_node\n"
    code += "import megatron.engine.launch.devices, megatron.engine.launch.port\n"
    code += "print(sorted(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    loaded = {name.partition(".")[0] for name in ast.literal_eval(printed)}
    assert not loaded & {"torch", "deepspeed", "numpy", "yaml"}
