"""Launches of small scripts, and what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SMALL_CONFIG = {
    "num_gpus": 2,
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 1,
    "data_path": "none",
    "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
}
_MARK = "NEOX_LAUNCH_TEST"


@dataclass
class Launch:
    """A launcher at work. Everything it starts carries ``mark`` in its environment."""

    process: subprocess.Popen[str]
    mark: str

    def finish(self, timeout_s: float = 90.0) -> "Finished":
        """Wait for the launcher's end and for its output to be closed."""
        start = time.monotonic()
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return Finished(self.process.returncode, stdout, stderr, time.monotonic() - start)

    def marked(self) -> list[int]:
        """Return the processes of this launch that are alive, launcher and guard included."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                is_ours = f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if is_ours and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def guard(self) -> int:
        """Return the process id of the guard."""
        for process in self.marked():
            if b"sessions.py" in Path(f"/proc/{process}/cmdline").read_bytes():
                return process
        raise AssertionError("the launcher has no guard")


@dataclass(frozen=True)
class Finished:
    status: int
    stdout: str
    stderr: str
    seconds: float


@contextlib.contextmanager
def launch(
    script: str,
    num_ranks: int,
    tmp_path: Path,
    *,
    command: list[str] | None = None,
    stdout: int = subprocess.PIPE,
    **environ: str,
) -> Iterator[Launch]:
    """Start ``num_ranks`` ranks of ``script``, in ``tmp_path``; afterwards nothing is left."""
    file = tmp_path / "user_script.py"
    file.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n")
    with file.open("a") as stream:
        stream.write(textwrap.dedent(script))
    if command is None:
        agent = [sys.executable, "-m", "tests.launch.run_agent"]
        command = [*agent, str(num_ranks), str(file)]
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), _MARK: mark, **environ},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_obey_hangups,
    )
    running = Launch(process, mark)
    try:
        yield running
    finally:
        left = running.marked()
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _obey_hangups() -> None:
    # Tests started under nohup would hand its ignored SIGHUP on.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run(script: str, num_ranks: int, tmp_path: Path, **options: Any) -> Finished:
    """Launch, wait for the end, and require that nothing is left."""
    with launch(script, num_ranks, tmp_path, **options) as running:
        finished = running.finish()
        assert running.marked() == []
        return finished


def deepy(
    script: str, config: dict[str, Any], tmp_path: Path, *options: str, **environ: str
) -> contextlib.AbstractContextManager[Launch]:
    """Start ``script`` through the real deepy.py, with a small configuration and ``config``."""
    (tmp_path / "small.yml").write_text(json.dumps(SMALL_CONFIG | config))
    command = [sys.executable, str(REPOSITORY / "deepy.py"), *options]
    command += ["user_script.py", "small.yml"]
    environ = {"DLTS_HOSTFILE": "none", "DS_ACCELERATOR": "cpu"} | environ
    return launch(script, 0, tmp_path, command=command, **environ)


def run_deepy(
    script: str, config: dict[str, Any], tmp_path: Path, *options: str, **environ: str
) -> Finished:
    """Start through deepy.py, wait for the end, and require that nothing is left."""
    with deepy(script, config, tmp_path, *options, **environ) as running:
        finished = running.finish()
        assert running.marked() == []
        return finished


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Return once ``condition()`` is true.

    Raises:
        AssertionError: it isn't within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.02)
