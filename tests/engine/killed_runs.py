"""Runs whose ranks are killed at a write point or any other instant, and what is left of them."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.base import write_points
from megatron.cli.train import train
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment
from megatron.ledger.manifest import digest_problems, quick_problems, read_manifest
from megatron.ledger.run_directory import read_latest
from tests.engine.training_runs import neox_config, world_size
from tests.worlds import RankContext, WorldFailed, run_ranks

__all__ = [
    "KilledRun",
    "Moment",
    "Step",
    "assert_good",
    "hidden_names",
    "lineage",
    "loaded_step",
    "newest_committed",
    "stop_reason",
]

TINY = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "attention_config": [[["global"], 2]],
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "train_iters": 10,
    "lr_decay_iters": 10,
    "checkpoint_factor": 2,
    "eval_interval": 4,
    "eval_iters": 1,
    "hidden_dropout": 0.1,
    "gradient_clipping": 1.0,
}

Step = tuple[int, int, str, float, float, float]
"""Position, samples, digest, loss, lr, grad_norm."""


@dataclass(frozen=True)
class Moment:
    """A write point reached by a rank, counted over its launch from 1."""

    rank: int
    point: str
    occurrence: int

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.point}, {self.occurrence}"


class KilledRun:
    """One run directory and the launches that write there, all with the same configuration.

    Args:
        folder: for everything.
        changes: to the tiny configuration.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.save = folder / "save"
        folder.mkdir(parents=True, exist_ok=True)
        places = {"save": str(self.save), "load": str(self.save)}
        self.config = neox_config(folder, **(TINY | places | changes))
        self._launches = 0

    def launch(self, **changes: Any) -> list[list[str]]:
        """Train to the end; return the write points of each rank in the order it reached them."""

        def watch(context: RankContext, kill: Callable[[], None]) -> list[str]:
            reached: list[str] = []
            write_points.install(reached.append)  # atomic: from whatever thread
            return reached

        return self._run(watch, changes)

    def launch_killed_at(self, moment: Moment, *, alone: bool = False, **changes: Any) -> bool:
        """Train until ``moment``, when all ranks are killed; return whether it came.

        Args:
            moment: when.
            alone: that rank is killed; the others get seconds to find out.
            changes: to the configuration.
        """

        def watch(context: RankContext, kill: Callable[[], None]) -> None:
            left = moment.occurrence if context.rank == moment.rank else 0

            def at_point(name: str) -> None:
                nonlocal left
                left -= name == moment.point
                if name == moment.point and left == 0:
                    os.kill(os.getpid(), signal.SIGKILL) if alone else kill()

            write_points.install(at_point)

        return self._is_killed(watch, changes, survivors_complain=alone)

    def launch_killed_after(self, step: int, delay_s: float, **changes: Any) -> bool:
        """Train until so many seconds after the loss of a launch's ``step``-th step."""

        def watch(context: RankContext, kill: Callable[[], None]) -> Callable[[float], None]:
            seen = 0

            def on_loss(loss: float) -> None:
                nonlocal seen
                seen += 1
                if seen == step and context.rank == 0:
                    threading.Timer(delay_s, kill).start()

            return on_loss

        return self._is_killed(watch, changes)

    def launch_watched(self, watch: Callable[[RankContext], None], **changes: Any) -> None:
        """Train to the end, after a call of ``watch`` on each rank.

        Raises:
            WorldFailed: a rank failed.
        """
        self._run(lambda context, kill: watch(context), changes)

    def moved(self, folder: Path) -> "KilledRun":
        """Return the same run after its folder was copied to ``folder``."""
        run = KilledRun.__new__(KilledRun)
        run.folder, run.save, run._launches = folder, folder / "save", self._launches
        old, new = str(self.folder), str(folder)
        run.config = {
            key: value.replace(old, new) if isinstance(value, str) else value
            for key, value in self.config.items()
        }
        return run

    def _is_killed(
        self,
        watch: Callable[..., Any],
        changes: Mapping[str, Any],
        *,
        survivors_complain: bool = False,
    ) -> bool:
        try:
            self._run(watch, changes)
        except WorldFailed as failed:
            if "died without an answer" not in str(failed):
                raise
            if "Traceback" in str(failed) and not survivors_complain:
                raise
            return True
        return False

    def _run(self, watch: Callable[..., Any], changes: Mapping[str, Any]) -> list[Any]:
        self._launches += 1
        folder = self.folder / f"launch-{self._launches}"
        folder.mkdir()
        path = folder / "config.yml"
        config = {k: v for k, v in (self.config | changes).items() if v is not None}
        path.write_text(yaml.safe_dump(config))
        ranks = world_size(config)
        resolved = load_config([path], {}, local_slots=lambda: ranks)

        def rank_main(context: RankContext) -> Any:
            (folder / f"pid-{context.rank}").write_text(str(os.getpid()))
            watched = watch(context, lambda: _kill_all(folder, context.world_size))
            environment = RankEnvironment(
                context.rank, context.rank, context.world_size, context.init_method
            )
            on_loss = watched if callable(watched) else lambda loss: None
            with (
                (folder / f"output-{context.rank}.txt").open("w", buffering=1) as output,
                contextlib.redirect_stdout(output),
            ):
                train(resolved, environment, on_loss=on_loss)
            return None if callable(watched) else watched

        return run_ranks(rank_main, ranks, folder)


def _kill_all(folder: Path, num_ranks: int) -> None:
    """Kill every rank, this one last: what the kernel does to a machine that loses power."""
    me = os.getpid()
    pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(num_ranks)]
    for pid in sorted(pids, key=lambda pid: pid == me):
        os.kill(pid, signal.SIGKILL)
    time.sleep(60)  # on this thread nothing happens anymore


def lineage(save: Path) -> dict[int, Step]:
    """Return the steps of the newest attempt's lineage, read as somebody with only files would."""
    attempts = save / "attempts"
    newest = max(attempts.glob("*.jsonl"))
    begin = json.loads(newest.with_suffix(".json").read_text())["begin"]
    lines = [
        line
        for span in begin["spans"]
        for line in _lines(attempts / f"{span['attempt']:04d}.jsonl", span["chain"])
    ]
    lines += _lines(newest, None)
    steps: dict[int, Step] = {}
    for line in lines:
        if "stream" not in line:
            assert line["step"] not in steps
            steps[line["step"]] = tuple(
                line[name] for name in ("position", "samples", "digest", "loss", "lr", "grad_norm")
            )
    return steps


def _lines(path: Path, last_chain: str | None) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    if last_chain is None:
        return lines
    return lines[: [line["chain"] for line in lines].index(last_chain) + 1]


def newest_committed(save: Path) -> int | None:
    """Return the step that ``latest`` names, after a look at every byte of its checkpoint."""
    step = read_latest(save) if save.exists() else None
    if step is not None:
        assert_good(save, step)
    return step


def assert_good(save: Path, step: int) -> None:
    """Compare every file of a checkpoint with its manifest."""
    checkpoint = save / f"global_step{step}"
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert manifest.step == step
    assert quick_problems(checkpoint, manifest) == []
    assert digest_problems(checkpoint, manifest, manifest.files) == []


def loaded_step(save: Path) -> int | None:
    """Return the step that the newest attempt went on from; None: it began at 0."""
    loaded = _newest_facts(save)["loaded"]
    return None if loaded is None else int(loaded["step"])


def stop_reason(save: Path) -> str | None:
    """Return why the newest attempt stopped; None: it was killed."""
    stop = _newest_facts(save)["stop"]
    return None if stop is None else str(stop["reason"])


def _newest_facts(save: Path) -> dict[str, Any]:
    newest = max((save / "attempts").glob("*.jsonl")).with_suffix(".json")
    return dict(json.loads(newest.read_text()))


def hidden_names(save: Path) -> list[str]:
    """Return everything under ``save`` that a save, a lease or a deletion left behind."""
    return sorted(
        str(path.relative_to(save)) for path in save.rglob("*") if path.name.startswith(".")
    )
