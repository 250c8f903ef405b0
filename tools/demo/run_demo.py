"""Train on this machine's own text with four processes, kill the run, resume it, compare.

    python tools/demo/run_demo.py            # what `make demo` runs

Everything it makes lies in demo-out/. The exit status is 0 only if the resumed run repeated the
undisturbed one exactly: same samples, losses, gradient norms and learning rates, to the last bit.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.markup import escape

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.ledger.attempts import StepRecord, attempt_files, read_attempt
from tools.demo.comparison import (
    Passes,
    by_step,
    comparison_table,
    differences,
    evaluation_differences,
    weight_differences,
)

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("demo-out")  # relative to ROOT, as the configuration has it
CONFIG = Path("configs/demo.yml")
CORPUS_BYTES = 2_000_000
VOCABULARY_SIZE = 2048
# Between the saves after steps 20 and 40, whatever happens while the kill is on its way.
KILL_AFTER_STEP = 27
PASS_TIMEOUT_S = 240.0
LEDGER_LINES = 24  # of each answer
TRAIN = [sys.executable, "deepy.py", "train.py", str(CONFIG)]

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """A step of the demo did not do what it must; the message says where to look."""


def main() -> int:
    """Run the demo and return its exit status."""
    started = time.monotonic()
    os.chdir(ROOT)
    settings = yaml.safe_load(CONFIG.read_text())
    run, train_iters = Path(settings["save"]), settings["train_iters"]
    try:
        prepare_data()
        console.print(f"[bold]1. undisturbed[/]: {shlex.join(TRAIN[1:])}")
        train(run, OUT / "undisturbed.log")
        run.rename(OUT / "undisturbed")
        undisturbed = last_attempt(OUT / "undisturbed")

        console.print(f"[bold]2. killed[/] with SIGKILL after step {KILL_AFTER_STEP}: same command")
        train(run, OUT / "killed.log", kill_after_step=KILL_AFTER_STEP)
        killed, saved_step = last_attempt(run), newest_save(run)

        console.print(f"[bold]3. resumed[/] from step {saved_step}: same command")
        train(run, OUT / "resumed.log")
    except DemoError as failure:
        console.print(f"[bold red]demo failed:[/] {escape(str(failure))}")
        return 1
    passes = Passes(by_step(undisturbed), by_step(killed), by_step(last_attempt(run)))
    console.print(comparison_table(passes, saved_step=saved_step))
    last = f"global_step{train_iters}"
    problems = [
        *differences(passes, train_iters=train_iters, saved_step=saved_step),
        *evaluation_differences(
            (OUT / "undisturbed.log").read_text(), (OUT / "resumed.log").read_text()
        ),
        *weight_differences(OUT / "undisturbed" / last, run / last),
    ]
    for problem in problems[:10]:
        console.print(f"[red]{escape(problem)}[/]")
    problems += ask_the_ledger(run, step=saved_step + 1)
    print_places(run)
    verdict = f"[bold red]NOT exact: {len(problems)} differences[/]"
    if not problems:
        verdict = (
            "[bold green]exact[/]: every loss, gradient norm and learning rate, the evaluations "
            f"and the weights of step {train_iters} are the same to the last bit"
        )
    console.print(f"resume {verdict}; {time.monotonic() - started:.0f} s in all")
    return 1 if problems else 0


def prepare_data() -> None:
    """Make the corpus, the tokenizer and the dataset, from nothing."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    corpus, tokenizer = OUT / "stdlib.jsonl", OUT / "tokenizer.json"
    console.print("[bold]0. data[/]: the Python standard library's own text")
    run_tool("tools/datasets/stdlib_corpus.py", "--output", corpus, "--max-bytes", CORPUS_BYTES)
    run_tool(
        "megatron/tokenizer/train_tokenizer.py",
        "--json_input_dir",
        corpus,
        "--tokenizer_output_path",
        tokenizer,
        "--vocab_size",
        VOCABULARY_SIZE,
    )
    run_tool(
        "tools/datasets/preprocess_data.py",
        "--input",
        corpus,
        "--output-prefix",
        OUT / "stdlib",
        "--tokenizer-type",
        "HFTokenizer",
        "--vocab-file",
        tokenizer,
        "--append-eod",
        "--workers",
        2,
    )


def run_tool(*command: object) -> None:
    """Run one of our tools to its end; its output goes to data.log."""
    with (OUT / "data.log").open("a") as log:
        words = [sys.executable, *map(str, command)]
        log.write(f"$ {shlex.join(words[1:])}\n")
        log.flush()
        result = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise DemoError(f"{command[0]} exited with {result.returncode}\n{tail(OUT / 'data.log')}")


def train(run: Path, log_file: Path, *, kill_after_step: int | None = None) -> None:
    """Run the training command; kill everything it started once it has recorded a step.

    Raises:
        DemoError: it failed, ended before it could be killed, or left a rank behind.
    """
    started = time.monotonic()
    known = len(attempt_files(run))
    with log_file.open("w") as log:
        process = subprocess.Popen(
            TRAIN, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        step = watch(process, run, known, kill_after_step, deadline=started + PASS_TIMEOUT_S)
    finally:
        if process.poll() is None:
            kill_all(process)
    seconds = time.monotonic() - started
    if kill_after_step is None and process.returncode != 0:
        raise DemoError(f"training exited with {process.returncode}\n{tail(log_file)}")
    if kill_after_step is not None and process.returncode != -signal.SIGKILL:
        raise DemoError(
            f"training ended by itself (status {process.returncode}) before step "
            f"{kill_after_step} could be seen\n{tail(log_file)}"
        )
    console.print(f"   {'killed' if kill_after_step else 'done'} at step {step}, {seconds:.0f} s")


def watch(
    process: subprocess.Popen[bytes],
    run: Path,
    known_attempts: int,
    kill_after_step: int | None,
    *,
    deadline: float,
) -> int:
    """Follow the attempt's records until the process ends or the step is there; return the last."""
    step = 0
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise DemoError(f"no end after {PASS_TIMEOUT_S:.0f} s, at step {step}")
        records = last_attempt(run) if len(attempt_files(run)) > known_attempts else []
        step = max((record.step for record in records), default=step)
        console.file.write(f"   step {step}\r" if console.is_terminal else "")
        if kill_after_step is not None and step >= kill_after_step:
            return step
        time.sleep(0.05)
    return max((record.step for record in last_attempt(run)), default=step)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the launcher's process group, as a cluster does, and see that no rank lives on."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, survivors = psutil.wait_procs(ranks, timeout=15.0)
    for survivor in survivors:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    if survivors:
        raise DemoError(f"{len(survivors)} ranks outlived the launcher: {survivors}")


def last_attempt(run: Path) -> list[StepRecord]:
    """Return the records of the newest attempt in ``run``."""
    files = attempt_files(run)
    return list(read_attempt(files[-1])) if files else []


def newest_save(run: Path) -> int:
    """Return the step of the checkpoint that ``latest`` names."""
    latest = run / "latest"
    if not latest.is_file():
        raise DemoError(f"{run} has no `latest`: the pass was killed before its first save")
    return int(latest.read_text().strip().removeprefix("global_step"))


def ask_the_ledger(run: Path, *, step: int) -> list[str]:
    """Print what `neox-ledger` says of the resumed run; return what it found wrong."""
    problems = []
    for question in (["verify", "--all", "--run", run], ["step", step, "--run", run]):
        command = [sys.executable, "tools/ledger.py", *map(str, question)]
        console.print(f"\n[bold]neox-ledger {escape(shlex.join(command[2:]))}[/]")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = (result.stdout + result.stderr).rstrip().splitlines()
        shown = lines if len(lines) <= LEDGER_LINES else [*lines[:LEDGER_LINES], "…"]
        console.print(escape("\n".join(shown)))
        if result.returncode != 0:
            problems.append(f"neox-ledger {question[0]} exited with {result.returncode}")
    return problems


def print_places(run: Path) -> None:
    """Say where everything is."""
    for what, place in {
        "console logs": f"{OUT}/undisturbed.log, {OUT}/killed.log, {OUT}/resumed.log",
        "records": f"{OUT}/undisturbed/attempts/, {run}/attempts/",
        "checkpoints": f"{OUT}/undisturbed/, {run}/",
        "data": f"{OUT}/stdlib_text_document.bin and .idx, {OUT}/tokenizer.json",
    }.items():
        console.print(f"{what:>13}: {place}")


def tail(file: Path, num_lines: int = 40) -> str:
    """Return the end of a log, with its name."""
    lines = file.read_text(errors="replace").splitlines()
    return "\n".join([f"--- end of {file}:", *lines[-num_lines:]])


if __name__ == "__main__":
    sys.exit(main())
