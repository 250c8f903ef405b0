"""The hosts and slots of a SLURM job, from its environment variables."""

import json

import pytest

from megatron.config.hostfile import list_hosts
from megatron.config.load import load_config
from megatron.config.slurm import allocated_hosts, expand_node_list

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "DLTS_HOSTFILE": "/none"}

LEAST = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b-1", ["a", "b-1"]),
        ("node[1-3,7],x", ["node1", "node2", "node3", "node7", "x"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01,03]", ["r1n01", "r1n03", "r2n01", "r2n03"]),
        ("gpu[1-2]-ib,gpu9-ib", ["gpu1-ib", "gpu2-ib", "gpu9-ib"]),
    ],
)
def test_a_node_list_is_written_out(text, hosts):
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize(
    ("variables", "num_gpus", "devices", "slots"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, None, 8, [8, 8]),
        ({"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu"}, None, 1, [1, 1]),
        ({"SLURM_GPUS_ON_NODE": "8"}, 4, 8, [4, 4]),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}, None, 1, [2, 2]),
        ({"SLURM_TASKS_PER_NODE": "1(x2)"}, None, 4, [4, 4]),
        ({"SLURM_TASKS_PER_NODE": "3,2"}, None, 1, [3, 2]),
        ({"SLURM_TASKS_PER_NODE": "2(x2)"}, None, 1, [2, 2]),
        ({}, None, 1, [1, 1]),
    ],
)
def test_slots_are_gpus_or_tasks(variables, num_gpus, devices, slots):
    found = allocated_hosts(JOB | variables, slots=num_gpus, local_slots=lambda: devices)
    assert found == dict(zip(["node1", "node2"], slots, strict=True))


def test_outside_of_a_job_there_are_none():
    assert allocated_hosts({}, slots=None, local_slots=lambda: 1) is None


def test_a_host_file_comes_before_the_allocation(tmp_path):
    (tmp_path / "hosts").write_text("other slots=3\n")
    asked = {"num_gpus": None, "uses_slurm": True, "local_slots": lambda: 1, "environ": JOB}
    assert list_hosts(str(tmp_path / "hosts"), **asked).slots == {"other": 3}
    found = list_hosts(str(tmp_path / "gone"), **asked)
    assert (found.slots, found.is_allocation) == ({"node1": 1, "node2": 1}, True)
    assert found.source == "SLURM job 7"
    assert not list_hosts(None, **asked | {"uses_slurm": False}).is_allocation


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [
        ({"launcher": "slurm"}, 4),
        ({"deepspeed_slurm": True}, 4),
        ({"launcher": "slurm", "num_nodes": 1}, 2),
        ({"launcher": "slurm", "exclude": "node1"}, 2),
        ({"launcher": "slurm", "num_gpus": 1}, 2),
        ({}, 1),
    ],
)
def test_an_allocation_counts_as_many_ranks_as_it_has_slots(tmp_path, keys, ranks):
    (tmp_path / "least.yml").write_text(json.dumps(LEAST | keys))
    environ = JOB | {"SLURM_NTASKS_PER_NODE": "2"}
    config = load_config([tmp_path / "least.yml"], local_slots=lambda: 1, environ=environ)
    assert config.topology.world_size == ranks
