"""run.json and what is known of an attempt's surroundings."""

import json

import pytest

from megatron.base.errors import RunDirectoryError
from megatron.config.topology import Topology
from megatron.ledger.environment import describe_environment, numerics_hash
from megatron.ledger.ledger_file import Parent
from megatron.ledger.run_file import RUN_FILE, config_hash, new_run, read_run_file, write_run_file

TOPOLOGY = Topology(1, 2, 1)
CONFIG = {"seed": 1, "lr_decay_iters": 100, "train_iters": 100, "train_data_paths": ["a", "b"]}


def test_a_run_keeps_its_id_and_its_parents(tmp_path):
    grandparent = Parent(run_id="g", step=5, chain="c", save="/g", is_continued=False)
    parent = Parent(run_id="p", step=9, chain="d", save="/p", is_continued=True, parent=grandparent)
    run = new_run(CONFIG, now=123.5, parent=parent)
    write_run_file(tmp_path, run)
    assert read_run_file(tmp_path) == run
    assert run.run_id != new_run(CONFIG, now=123.5).run_id


def test_a_directory_without_a_run_holds_none(tmp_path):
    assert read_run_file(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "run', "does not say which run this is"),
        ('{"format": 1}', "does not say which run this is .KeyError: 'run_id'"),
        ('{"format": 2}', "format 2 is not known; this release reads 1"),
    ],
)
def test_a_damaged_run_file_is_an_error(tmp_path, text, message):
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(RunDirectoryError, match=rf"{tmp_path}/run\.json.*{message}"):
        read_run_file(tmp_path)


def test_a_configurations_hash_tells_any_key_and_no_order_of_keys():
    assert config_hash(CONFIG) == config_hash(dict(reversed(CONFIG.items())))
    assert config_hash(CONFIG) != config_hash(CONFIG | {"seed": 2})


def test_the_environment_is_plain_and_names_the_job():
    environ = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2", "HF_TOKEN": "secret"}
    environment = describe_environment(environ, device="cpu", num_threads=2, git_commit="abc")
    assert json.loads(json.dumps(environment)) == environment
    assert environment["job"] == {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}
    assert environment["git_commit"] == "abc"
    assert {"python", "torch", "numpy"} <= environment["versions"].keys()


def numerics(config=CONFIG, topology=TOPOLOGY, **environment):
    described = describe_environment({}, device="cpu", num_threads=1)
    return numerics_hash(config, topology, described | environment)


@pytest.mark.parametrize(
    "change",
    [
        {"config": CONFIG | {"seed": 2}},
        {"config": CONFIG | {"lr": 1e-3}},
        {"config": CONFIG | {"lr_decay_iters": None}},
        {"topology": Topology(2, 1, 1)},
        {"device": "NVIDIA H100"},
        {"num_threads": 2},
        {"versions": {"torch": "9.9"}},
    ],
)
def test_what_acts_on_numbers_is_told_apart(change):
    assert numerics(**change) != numerics()


@pytest.mark.parametrize(
    "change",
    [
        {"config": CONFIG | {"train_iters": 200}},
        {"config": CONFIG | {"iteration": 50, "load": "/x", "save": "/y"}},
        {"config": CONFIG | {"train_data_paths": ["moved"], "num_workers": 4}},
        {"config": CONFIG | {"use_wandb": True, "log_interval": 3, "hostfile": "/h"}},
        {"host": "another", "pid": 1},
    ],
)
def test_what_leaves_numbers_alone_is_not(change):
    assert numerics(**change) == numerics()


def test_a_longer_run_has_other_numbers_where_the_learning_rate_follows_its_length():
    free = CONFIG | {"lr_decay_iters": None}
    assert numerics(config=free) != numerics(config=free | {"train_iters": 200})
