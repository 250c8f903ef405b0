"""Clusters and trainings for the tests of this folder, and the seconds that their events cost."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.recovery import Recovery
from tests.cluster.requirements import missing
from tests.cluster.slurm_cluster import SlurmCluster

_recoveries: list[Recovery] = []


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[Callable[..., SlurmCluster]]:
    """Start a cluster of so many nodes; it is stopped after the test."""
    lack = missing()
    if lack is not None:
        pytest.skip(f"the SLURM test-bed needs {lack}")
    with ExitStack() as stack:

        def start(num_nodes: int, **options: str) -> SlurmCluster:
            return stack.enter_context(
                SlurmCluster.running(tmp_path / "testbed", num_nodes, **options)
            )

        yield start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ClusterTraining]:
    """Return the same training done at one go on this machine; each is done once a session."""
    known: dict[str, ClusterTraining] = {}

    def train(**keys: Any) -> ClusterTraining:
        name = repr(sorted(keys.items()))
        if name not in known:
            keys = TP2_PP2 | {"num_gpus": 4} | keys
            training = ClusterTraining(tmp_path_factory.mktemp("undisturbed") / "run", keys)
            training.train_here()
            known[name] = training
        return known[name]

    return train


@pytest.fixture
def note_recovery() -> Callable[[Recovery], None]:
    """Keep a recovery's seconds for the table at the end of the session."""

    def note(recovery: Recovery) -> None:
        print(recovery.line())
        _recoveries.append(recovery)

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the seconds lost to each event."""
    if _recoveries:
        terminalreporter.section("seconds from an event to the first new step")
        for recovery in _recoveries:
            terminalreporter.write_line(recovery.line())
