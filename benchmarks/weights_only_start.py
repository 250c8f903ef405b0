"""How far from an undisturbed run is one that began from weights alone?

    python benchmarks/weights_only_start.py [--precision fp32 bfloat16] [--start 400] [--steps 100]

A small Pythia is trained on the Python standard library's text under `neox_version: v1.0`, through
deepy.py, and never stopped: the truth. Its weights at a step are exported to Hugging Face's form,
imported by tools/pythia.py with each choice of --moments, and trained on, on the same samples. So
is its own checkpoint, which has everything.

Printed is the loss beside the truth's, in nats: the mean distance over the
first 10 steps and over all, the largest distance, and the mean of loss minus truth, which says who
is worse off.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CORPUS_BYTES = 4_000_000
VOCABULARY = 2048
FIRST = 10  # steps in which a start shows most

MODEL: dict[str, Any] = {
    "neox_version": "v1.0",
    "pipe_parallel_size": 1,
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "bias_gelu_fusion": True,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "tokenizer_type": "HFTokenizer",
    "make_vocab_size_divisible_by": 128,
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": None,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "min_lr": 2e-4,
    "lr_decay_style": "cosine",
    "warmup": 0.01,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "zero_optimization": {"stage": 1},
    "eval_iters": 0,
    "log_interval": 100,
    "use_wandb": False,
}


def main() -> None:
    """Run the study and print one table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bfloat16"])
    parser.add_argument("--start", type=int, default=400, help="the step begun from")
    parser.add_argument("--steps", type=int, default=100, help="trained from there")
    parser.add_argument("--moments", nargs="+", default=["cold", "warm:20", "warm:100"])
    parser.add_argument("--seed", type=int, nargs="+", default=[1234])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(Path(folder))
        for precision in options.precision:
            for seed in options.seed:
                out = Path(folder) / f"{precision}-{seed}"
                out.mkdir()
                study = Study(out, {**MODEL, **data, "precision": precision, "seed": seed}, options)
                study.run(f"{precision}, seed {seed}")


class Study:
    """One run and what is begun from it."""

    def __init__(self, out: Path, keys: dict[str, Any], options: argparse.Namespace) -> None:
        self.out = out
        self.start, self.steps, self.moments = options.start, options.steps, options.moments
        self.stop = self.start + self.steps
        self.keys = {**keys, "train_iters": 2 * self.stop}
        self.config = out / "model.yml"
        self.config.write_text(yaml.safe_dump(self.keys))

    def run(self, title: str) -> None:
        """Train, start again in each way, and print how far each is from the truth."""
        truth = self.launch("truth", None)[-self.steps :]
        checkpoint = self.out / "truth" / f"global_step{self.start}"
        hub = self.out / "hub" / f"step{self.start}"
        tool("tools/ckpts/convert_neox_to_hf.py", checkpoint, hub)
        print(
            f"{title}: loss {truth[0]:.4f} at step {self.start + 1}, {truth[-1]:.4f} at {self.stop}"
        )
        own = self.launch("resumed", self.out / "truth", iteration=self.start)
        report("its own optimizer state", own, truth)
        for how in self.moments:
            begun = time.monotonic()
            save = self.out / f"start-{how.replace(':', '-')}"
            arguments = ["import", "--config", self.config, "--step", self.start, "--from", hub]
            arguments += ["--to", save, "--moments", how]
            if how.startswith("warm"):
                machine = self.out / "machine.yml"
                machine.write_text("num_gpus: 1\n")
                arguments += ["--launch", machine]
            tool("tools/pythia.py", *arguments)
            took = time.monotonic() - begun
            report(how, self.launch(f"run-{how.replace(':', '-')}", save), truth, took)

    def launch(self, name: str, load: Path | None, **keys: Any) -> list[float]:
        """Train to the last step of the study and return the losses on record."""
        save = self.out / name
        changes = {"save": str(save), "num_gpus": 1, "exit_interval": self.stop, **keys}
        if load is not None:
            changes["load"] = str(load)
        changes["extra_save_iters"] = [self.start]
        changes["checkpoint_factor"] = 10**6
        file = self.out / f"{name}.yml"
        file.write_text(yaml.safe_dump(changes))
        tool("deepy.py", "train.py", self.config, file)
        lines = (save / "attempts" / "0001.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "step" in record]


def report(
    name: str, losses: list[float], truth: list[float], seconds: float | None = None
) -> None:
    """Print how far ``losses`` are from those of the undisturbed run."""
    differences = [loss - true for loss, true in zip(losses, truth, strict=True)]
    distances = [abs(one) for one in differences]
    print(
        f"  {name:24} first {FIRST}: {statistics.mean(distances[:FIRST]):.6f}  "
        f"all {len(distances)}: {statistics.mean(distances):.6f}  last {FIRST}: "
        f"{statistics.mean(distances[-FIRST:]):.6f}  largest {max(distances):.6f}  "
        f"loss - truth {statistics.mean(differences):+.6f}"
        + (f"  (import {seconds:.0f} s)" if seconds is not None else ""),
        flush=True,
    )


def prepare_data(folder: Path) -> dict[str, Any]:
    """Make corpus, tokenizer and dataset; return their keys."""
    corpus, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    tool("tools/datasets/stdlib_corpus.py", "--output", corpus, "--max-bytes", str(CORPUS_BYTES))
    tool(
        "megatron/tokenizer/train_tokenizer.py",
        *("--json_input_dir", corpus, "--tokenizer_output_path", tokenizer),
        *("--vocab_size", VOCABULARY),
    )
    tool(
        "tools/datasets/preprocess_data.py",
        *("--input", corpus, "--output-prefix", folder / "text"),
        *("--tokenizer-type", "HFTokenizer", "--vocab-file", tokenizer, "--append-eod"),
    )
    prefix = str(folder / "text_text_document")
    paths = {f"{split}_data_paths": [prefix] for split in ("train", "valid", "test")}
    return {**paths, "vocab_file": str(tokenizer)}


def tool(*command: object) -> None:
    """Run one of our scripts to its end.

    Raises:
        RuntimeError: it failed; the message has its last lines.
    """
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stdout + done.stderr).splitlines()[-30:]
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n" + "\n".join(tail))


if __name__ == "__main__":
    main()
