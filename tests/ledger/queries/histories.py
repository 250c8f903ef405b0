"""Runs with a past: a crash, a roll-back, other batches, another blend."""

from pathlib import Path

from tests.ledger.queries.simulated_run import ONE_RANK, SimulatedRun, write_corpus

__all__ = ["blended_run", "eventful_run"]


def eventful_run(folder: Path) -> SimulatedRun:
    """Return a run of 24 steps over one dataset, in four attempts.

    Attempt 1 took 1..10, 2 took 11..20 of which 16..20 were undone by 4, which began at 15 with
    batches of half the size; 3 had gone back to 10 and was killed after 15.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = SimulatedRun(folder / "save", [write_corpus(folder / "corpus")])
    run.launch(12, saves=[5, 10], stop=None)
    run.launch(20, saves=[15], stop="signal")
    run.launch(18, iteration=10, stop=None)
    run.launch(24, iteration=15, saves=[24], geometry=ONE_RANK)
    return run


def blended_run(folder: Path) -> SimulatedRun:
    """Return a run of 18 steps over two datasets whose weights changed twice."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = [
        write_corpus(folder / name, documents=documents, seed=seed)
        for name, documents, seed in (("large", 50, 1), ("small", 9, 2))
    ]
    run = SimulatedRun(folder / "save", datasets)
    run.weights = [1.0, 1.0]
    run.launch(6, saves=[6], stop="signal")
    run.weights = [3.0, 1.0]
    run.launch(12, saves=[12], stop="signal")
    run.weights = [1.0, 1.0]
    run.launch(18, saves=[18], train_iters=24, stop="signal")
    return run
