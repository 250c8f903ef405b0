"""Runs that are killed, changed and launched again, and what their attempt files say."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.cli.ledger.main import main
from megatron.cli.train import train
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment
from tests.engine.training_runs import TrainedRun, neox_config, run_training, world_size
from tests.worlds import RankContext, WorldFailed, run_ranks

__all__ = ["SEED", "SEQ_LENGTH", "InterruptedRun", "Read", "lines_of_lineage"]

SEQ_LENGTH = 16
SEED = 1234
MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": SEQ_LENGTH,
    "max_position_embeddings": SEQ_LENGTH,
    "attention_config": [[["global"], 2]],
}
SCHEDULE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "train_iters": 12,
    "lr_decay_iters": 100,
    "checkpoint_factor": 3,
    "eval_interval": 6,
    "eval_iters": 1,
    "zero_optimization": {"stage": 0},
    # These runs are about what is read after a kill: a save is over before the next step.
    "async_save": False,
}


@dataclass(frozen=True)
class Read:
    """What the lines of a lineage say was read: position, samples, digest."""

    steps: dict[int, tuple[int, int, str]]
    evaluations: list[tuple[int, tuple[int, int, str]]]  # (after step, ...), of the loop
    at_end: dict[str, tuple[int, int, str]]  # evaluations after the loop, by stream


class InterruptedRun:
    """One run directory and the launches that write there.

    Args:
        folder: for everything.
        data: keys that say which data is read.
        changes: to the usual configuration, in every launch.
    """

    def __init__(self, folder: Path, data: Mapping[str, Any], **changes: Any) -> None:
        self.folder = folder
        self.save = folder / "save"
        self._launches = 0
        folder.mkdir(parents=True, exist_ok=True)
        config = neox_config(folder, **MODEL, **SCHEDULE)
        for key in ("data_path", "split"):
            del config[key]
        self.config = config | {"save": str(self.save), "load": str(self.save)} | changes | data

    def launch(self, **changes: Any) -> TrainedRun:
        """Train to the end; a key changed to None is left out."""
        return run_training(self.changed(changes), self._next_folder())

    def refused(self, match: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
        """Launch, and return the message of a refusal that comes before a model is built."""

        def build(*_: Any) -> None:
            raise AssertionError("a model is built")

        with monkeypatch.context() as patched:
            patched.setattr("megatron.cli.train._build_module", build)
            with pytest.raises(WorldFailed, match=match) as failed:
                self.launch(**changes)
        return str(failed.value)

    def launch_killed(self, *, after: int, **changes: Any) -> None:
        """Train, and SIGKILL every rank in the step that follows the ``after``-th."""
        config = self.changed(changes)
        folder = self._next_folder()
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump(config))
        resolved = load_config([path], {}, local_slots=lambda: world_size(config))

        def rank_main(context: RankContext) -> None:
            def die(loss: float) -> None:
                if last_recorded_step(Path(config["save"])) >= after:
                    os.kill(os.getpid(), signal.SIGKILL)

            environment = RankEnvironment(
                context.rank, context.rank, context.world_size, context.init_method
            )
            output = (folder / f"stdout-{context.rank}.txt").open("w")
            os.dup2(output.fileno(), 1)
            train(resolved, environment, on_loss=die)

        with pytest.raises(WorldFailed, match="died without an answer"):
            run_ranks(rank_main, world_size(config), folder)
        assert last_recorded_step(Path(config["save"])) == after

    def changed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration with changes."""
        return {key: value for key, value in (self.config | changes).items() if value is not None}

    def read(self) -> Read:
        """Return what the lineage says was read."""
        return lines_of_lineage(self.save)

    def verify(self, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
        """Return the exit status of ``neox-ledger verify --all`` and what it printed."""
        capsys.readouterr()
        status = main(["verify", "--run", str(self.save), "--all", *options])
        return status, capsys.readouterr().out

    def _next_folder(self) -> Path:
        self._launches += 1
        folder = self.folder / f"launch-{self._launches}"
        folder.mkdir()
        return folder


def last_recorded_step(save: Path) -> int:
    """Return the last step in the newest attempt's lines, 0 if it has none."""
    files = sorted((save / "attempts").glob("*.jsonl"))
    lines = [json.loads(text) for text in files[-1].read_text().splitlines()] if files else []
    return max((line["step"] for line in lines if "step" in line), default=0)


def lines_of_lineage(save: Path) -> Read:
    """Follow the newest attempt back as a reader with nothing but the files would.

    What it began with names the attempts before it, and each one's last line before the checkpoint.
    """
    attempts = save / "attempts"
    newest = sorted(attempts.glob("*.jsonl"))[-1]
    begin = json.loads(newest.with_suffix(".json").read_text())["begin"]
    lines: list[dict[str, Any]] = []
    for span in begin["spans"]:
        if span["run_id"] == begin["run_id"]:
            lines += _lines(attempts / f"{span['attempt']:04d}.jsonl", span["chain"])
    lines += _lines(newest, None)
    evaluations = [line for line in lines if "stream" in line]
    return Read(
        {line["step"]: _values(line) for line in lines if "stream" not in line},
        [(line["after_step"], _values(line)) for line in evaluations if not line["at_end"]],
        {line["stream"]: _values(line) for line in evaluations if line["at_end"]},
    )


def _lines(path: Path, last_chain: str | None) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    if last_chain is None:
        return lines
    return lines[: [line["chain"] for line in lines].index(last_chain) + 1]


def _values(line: Mapping[str, Any]) -> tuple[int, int, str]:
    return line["position"], line["samples"], line["digest"]
