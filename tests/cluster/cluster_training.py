"""A tiny training whose launches are counted, disturbed and compared, by its files alone.

No torch is imported here: ranks need the cores.
"""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.slurm_cluster import REPOSITORY

__all__ = ["TP2_PP2", "Attempt", "ClusterTraining", "Step"]

SCRIPT = Path("tests/cluster/slow_train.py")  # relative: launches begin in the repository's folder
_CORPUS = REPOSITORY / "tests/data/stream/oracle/corpus_a_text_document"
_TOKENIZER = REPOSITORY / "tests/data/tokenizer/tok.json"

TP2_PP2 = {"pipe_parallel_size": 2, "model_parallel_size": 2}
_SETTINGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "attention_config": [[["global"], 2]],
    "pos_emb": "rotary",
    "norm": "layernorm",
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "precision": "fp32",
    "hidden_dropout": 0.1,  # random state that must come back
    "split": "900,70,30",
    "tokenizer_type": "HFTokenizer",
    "make_vocab_size_divisible_by": 64,
    "optimizer": {"type": "Adam", "params": {"lr": 0.002, "betas": [0.9, 0.95], "eps": 1e-8}},
    "min_lr": 0.0002,
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "train_iters": 30,
    "checkpoint_factor": 5,
    "eval_interval": 10,
    "eval_iters": 1,
    "log_interval": 1,
    "distributed_backend": "gloo",
    "use_wandb": False,
}

Step = tuple[int, int, str, float, float, float]
"""Position, samples, digest, loss, lr, grad_norm."""


@dataclass(frozen=True)
class Attempt:
    """One launch of the run, as its files say."""

    number: int
    facts: dict[str, Any]
    steps: list[dict[str, Any]]  # one line each

    @property
    def loaded_step(self) -> int:
        loaded = self.facts["loaded"]
        return 0 if loaded is None else int(loaded["step"])

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else self.loaded_step

    @property
    def saved_step(self) -> int:
        """The newest checkpoint it left; what it began with if it made none."""
        return max([one["step"] for one in self.facts["committed"]], default=self.loaded_step)

    @property
    def stop_reason(self) -> str | None:
        stop = self.facts["stop"]
        return None if stop is None else str(stop["reason"])

    @property
    def startup_s(self) -> dict[str, float]:
        """Seconds of each phase until its first step; empty if they aren't recorded yet."""
        return dict(self.facts.get("startup_s") or {})


class ClusterTraining:
    """A run directory and its configuration.

    Args:
        folder: for everything.
        keys: added to the tiny configuration; None leaves a key out.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any]) -> None:
        self.folder = folder
        self.save = folder / "save"
        self.config_path = folder / "config.yml"
        self.log = folder / "job.log"
        folder.mkdir(parents=True)
        for suffix in (".bin", ".idx"):
            shutil.copy(_CORPUS.with_suffix(suffix), folder / f"corpus{suffix}")
        shutil.copy(_TOKENIZER, folder / "tok.json")
        places = {
            "data_path": str(folder / "corpus"),
            "vocab_file": str(folder / "tok.json"),
            "save": str(self.save),
            "load": str(self.save),
        }
        self.config = _SETTINGS | places | dict(keys)
        self.config.setdefault("lr_decay_iters", self.config["train_iters"])
        self.write_config()
        self.pause(0.0)

    def write_config(self, **changes: Any) -> None:
        """Write the configuration, with ``changes`` from now on."""
        self.config |= changes
        config = {name: value for name, value in self.config.items() if value is not None}
        self.config_path.write_text(json.dumps(config, indent=1))

    def pause(self, seconds: float) -> None:
        """Set the pause after each step, also of a launch that is running."""
        new = self.folder / "pause.new"
        new.write_text(str(seconds))
        new.rename(self.folder / "pause")

    def train_here(self, **environ: str) -> None:
        """Train to the end on this machine, no cluster involved."""
        command = [sys.executable, "deepy.py", str(SCRIPT), str(self.config_path)]
        path = ["/usr/bin/env", "-u", "SLURM_JOB_ID", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
        with self.log.open("ab") as log:
            done = subprocess.run([*path, *command], cwd=REPOSITORY, stdout=log, stderr=log)
        assert done.returncode == 0, self.tail()

    def attempts(self) -> list[Attempt]:
        """Return all launches, oldest first."""
        found = []
        for path in sorted((self.save / "attempts").glob("*.json")):
            text = path.read_text()
            if text:
                lines = _lines(path.with_suffix(".jsonl"))
                steps = [line for line in lines if "stream" not in line]
                found.append(Attempt(int(path.stem), json.loads(text), steps))
        return found

    def last_step(self, *, attempt: int | None = None) -> int:
        """Return the last step recorded in the newest attempt (or since ``attempt``); 0: none."""
        newest = self.attempts()[-1:]
        if not newest or (attempt is not None and newest[0].number < attempt):
            return 0
        return newest[0].steps[-1]["step"] if newest[0].steps else 0

    def is_finished(self) -> bool:
        """Whether the newest attempt says that the last step is done."""
        newest = self.attempts()[-1:]
        return bool(newest) and (
            newest[0].stop_reason == "finished"
            and newest[0].facts["stop"]["step"] >= self.config["train_iters"]
        )

    def lineage(self) -> dict[int, Step]:
        """Return the steps of the newest attempt's lineage."""
        newest = self.attempts()[-1]
        lines: list[dict[str, Any]] = []
        for span in newest.facts["begin"]["spans"]:
            of_span = _lines(self.save / "attempts" / f"{span['attempt']:04d}.jsonl")
            chains = [line["chain"] for line in of_span]
            lines += of_span[: chains.index(span["chain"]) + 1]
        lines += newest.steps
        steps: dict[int, Step] = {}
        for line in lines:
            if "stream" not in line:
                assert line["step"] not in steps, f"step {line['step']} stands twice"
                steps[line["step"]] = tuple(
                    line[name]
                    for name in ("position", "samples", "digest", "loss", "lr", "grad_norm")
                )
        return steps

    def verify(self) -> None:
        """Require that ``neox-ledger verify`` finds nothing."""
        command = [sys.executable, "tools/ledger.py", "verify", "--all", "--run", str(self.save)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, f"verify: status {done.returncode}\n{done.stdout}{done.stderr}"

    def assert_whole(self, undisturbed: "ClusterTraining | None" = None) -> None:
        """Require a finished run with each step once, no more repeats than saves explain.

        Args:
            undisturbed: whose every number it must repeat; None: samples only are checked.
        """
        assert self.is_finished(), self.tail()
        steps = self.lineage()
        assert sorted(steps) == list(range(1, self.config["train_iters"] + 1))
        attempts = self.attempts()
        for before, after in itertools.pairwise(attempts):
            assert after.loaded_step >= before.saved_step, (
                f"attempt {after.number} goes on from step {after.loaded_step}, though attempt "
                f"{before.number} saved step {before.saved_step}"
            )
        if undisturbed is not None:
            expected = undisturbed.lineage()
            different = [step for step in expected if expected[step] != steps[step]]
            assert not different, f"other numbers in steps {different}"
        self.verify()

    def repeated_steps(self) -> int:
        """Return how many steps were done more than once, over all attempts."""
        attempts = self.attempts()
        return sum(
            max(0, before.last_step - after.loaded_step)
            for before, after in itertools.pairwise(attempts)
        )

    def tail(self, num_lines: int = 60) -> str:
        """Return the end of the log, with its place."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- end of {self.log}", *lines[-num_lines:]])


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
