"""Where the time goes from `kill -9` of a rank to the first new step.

    python benchmarks/restart.py [--restarts 5] [--slurm] [--hidden-size 256]

A training of four ranks (pipeline 2 x tensor 2) that saves is killed again and again, and goes on
each time from its newest checkpoint. Here the same command is started again at once; with --slurm
it runs on two nodes of the SLURM test-bed (tests/cluster, needs root), and the template
tools/slurm/train.sbatch requeues it. Before each kill, while the training rests, the floor is
measured: a script that only imports torch, DeepSpeed and megatron-core, started by the same
launcher on as many ranks, with --slurm as a job on two other nodes.

`ours` is all time but the scheduler's, less the floor of the same round: the median, its quartiles
in brackets. Index maps exist, as they do when a run goes on.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also for use without an install

from tests.cluster.cluster_training import SCRIPT, TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import REPOSITORY, SlurmCluster, wait_until

BARE_SCRIPT = Path("benchmarks/bare_rank.py")
RANKS = 4
KILLED_RANK = 1
REST_S, STEP_S = 120.0, 0.05  # pauses after each step: while the floor is measured, and else
PATIENCE_S = 300.0
LIMIT_S = 5.0


class Place(Protocol):
    """Where the training runs."""

    def wait_for_checkpoint(self) -> None: ...

    def floor(self, folder: Path) -> float: ...

    def kill(self) -> Recovery: ...


@dataclass
class Here:
    """This machine: deepy.py is started again as soon as it has ended."""

    training: ClusterTraining
    process: "subprocess.Popen[bytes]"

    @classmethod
    @contextmanager
    def running(cls, training: ClusterTraining) -> Iterator["Here"]:
        """Start the training; it is ended at the end."""
        here = cls(training, _started(training))
        try:
            yield here
        finally:
            here.process.kill()  # its ranks end with it
            here.process.wait()

    def wait_for_checkpoint(self) -> None:
        """Return when the present launch has saved."""
        _wait(lambda: _has_saved(self.training), "a checkpoint", self.training)

    def floor(self, folder: Path) -> float:
        """Return how long the bare script takes from the launcher's start to its end."""
        command = [sys.executable, "deepy.py", str(BARE_SCRIPT), str(self.training.config_path)]
        began = time.time()
        with (folder / "log").open("wb") as log:
            subprocess.run(
                command, cwd=REPOSITORY, env=_environ(folder), stdout=log, stderr=log, check=True
            )
        return _last_import(folder) - began

    def kill(self) -> Recovery:
        """Kill a rank, start the same command again and wait for its first step."""
        _wake(self.training)
        newest = self.training.attempts()[-1]
        ranks = _ranks_below(self.process.pid)
        began = time.time()
        os.kill(ranks[KILLED_RANK], signal.SIGKILL)
        self.process.wait()
        stopped = time.time()
        self.process = _started(self.training)
        first = _wait(
            lambda: _startup(self.training, newest.number), "the first new step", self.training
        )
        after = self.training.attempts()[-1]
        return Recovery(
            f"kill -9 rank {KILLED_RANK}",
            stopping_s=stopped - began,
            waiting_s=0.0,
            starting_s=first - stopped - sum(after.startup_s.values()),
            startup_s=after.startup_s,
            repeated_steps=newest.last_step - after.loaded_step,
        )


@dataclass
class OnSlurm:
    """Two nodes of the test-bed, submitted with the template; two others for the floor."""

    run: SubmittedRun

    @classmethod
    @contextmanager
    def running(cls, training: ClusterTraining, state: Path) -> Iterator["OnSlurm"]:
        """Start a cluster and submit the training; both are ended at the end."""
        with SlurmCluster.running(state, 4) as cluster:
            tries = {"NEOX_TRIES": "1000"}
            yield cls(SubmittedRun.submit(cluster, training, **tries))

    def wait_for_checkpoint(self) -> None:
        """Return when the present launch has saved."""
        training = self.run.training
        _wait(lambda: _has_saved(training), "a checkpoint", training)

    def floor(self, folder: Path) -> float:
        """Return how long the bare script takes, from its batch script's start to its end."""
        script = folder / "floor.sbatch"
        script.write_text(
            f"#!/bin/bash\ndate +%s.%N > {folder}/began\n"
            f"exec {sys.executable} deepy.py {BARE_SCRIPT} {self.run.training.config_path}\n"
        )
        options = (
            "--nodes=2",
            "--ntasks-per-node=2",
            "--gpus-per-node=0",
            f"--output={folder}/log",
        )
        job = self.run.cluster.submit(
            str(script), options=options, NEOX_FLOOR_OUT=str(folder), NEOX_REQUEUE="no"
        )
        _wait(lambda: len(list(folder.glob("rank*"))) == RANKS, "the floor", self.run.training)
        _wait(lambda: job.state == "COMPLETED", "the end of the floor's job", self.run.training)
        return _last_import(folder) - float((folder / "began").read_text())

    def kill(self) -> Recovery:
        """Kill a rank and wait for the first step of the launch that follows."""
        _wake(self.run.training)
        event = f"kill -9 rank {KILLED_RANK}"
        return self.run.recover(event, lambda: self.run.kill_rank(KILLED_RANK))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--slurm", action="store_true", help="on the SLURM test-bed")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the four layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        training = _training(folder, options.hidden_size, is_on_slurm=options.slurm)
        place: Place = stack.enter_context(
            OnSlurm.running(training, folder / "testbed")
            if options.slurm
            else Here.running(training)
        )
        rounds = []
        for number in range(options.restarts):
            place.wait_for_checkpoint()
            training.pause(REST_S)
            time.sleep(4 * STEP_S)  # for the step that is under way
            out = folder / f"floor{number}"
            out.mkdir()
            floor = place.floor(out)
            recovery = place.kill()
            print(
                f"{recovery.line()}; floor {floor:.1f}, load {os.getloadavg()[0]:.1f}", flush=True
            )
            rounds.append((recovery, floor))
        report(rounds)


def report(rounds: list[tuple[Recovery, float]]) -> None:
    """Print the medians of each phase, and what is ours."""
    rows: dict[str, Callable[[Recovery], float]] = {
        "detection and end": lambda one: one.stopping_s,
        "scheduler": lambda one: one.waiting_s,
        "launcher": lambda one: one.starting_s,
    }
    for phase in rounds[0][0].startup_s:
        rows[phase] = lambda one, phase=phase: one.startup_s[phase]
    rows["kill to first new step"] = lambda one: one.total_s
    for name, seconds in rows.items():
        print_row(name, [seconds(recovery) for recovery, _ in rounds])
    print_row("floor: launcher and bare imports", [floor for _, floor in rounds])
    ours = [one.total_s - one.waiting_s - floor for one, floor in rounds]
    print_row(f"ours beyond the floor (limit {LIMIT_S:.0f} s)", ours)


def print_row(label: str, seconds: list[float]) -> None:
    """Print a median and its quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    print(f"  {label:<40} {middle:>8.2f} s ({low:.2f}..{high:.2f})", flush=True)


def _training(folder: Path, hidden_size: int, *, is_on_slurm: bool) -> ClusterTraining:
    keys: dict[str, Any] = {
        **TP2_PP2,
        "num_layers": 4,
        "attention_config": [[["global"], 4]],
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "train_iters": 100_000,
        "checkpoint_factor": 20,
        "keep_last_n_checkpoints": 2,
        "eval_interval": 100_000,
    }
    keys |= {"launcher": "slurm", "deepspeed_slurm": True} if is_on_slurm else {"num_gpus": RANKS}
    training = ClusterTraining(folder / "training", keys)
    training.pause(STEP_S)
    return training


def _environ(floor: Path | None = None) -> dict[str, str]:
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environ if floor is None else environ | {"NEOX_FLOOR_OUT": str(floor)}


def _started(training: ClusterTraining) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "deepy.py", str(SCRIPT), str(training.config_path)]
    with training.log.open("ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=_environ(), stdout=log, stderr=log)


def _wake(training: ClusterTraining) -> None:
    """Let a training that rests take steps again."""
    resting = training.last_step()
    training.pause(STEP_S)
    _wait(lambda: training.last_step() > resting + 1, "steps after a rest", training)


def _has_saved(training: ClusterTraining) -> bool:
    newest = training.attempts()[-1:]
    return bool(newest) and newest[0].saved_step > newest[0].loaded_step


def _startup(training: ClusterTraining, after: int) -> dict[str, float]:
    newest = training.attempts()[-1]
    return newest.startup_s if newest.number > after else {}


def _ranks_below(launcher: int) -> dict[int, int]:
    """Return the processes that a launcher has started: rank -> process."""
    ranks = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == b"RANK":
                ranks[int(value)] = int(child)
    return ranks


def _last_import(folder: Path) -> float:
    return max(float(path.read_text()) for path in folder.glob("rank*"))


def _wait(condition: Callable[[], object], what: str, training: ClusterTraining) -> float:
    return wait_until(condition, what, timeout_s=PATIENCE_S, every_s=0.05, otherwise=training.tail)


if __name__ == "__main__":
    main()
