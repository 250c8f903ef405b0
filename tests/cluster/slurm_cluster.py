"""A SLURM cluster of several hosts on this machine: the test-bed's scripts as methods."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["REPOSITORY", "Job", "SlurmCluster", "wait_until"]

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "testbed"
_OURS = ("DEEPY_", "NEOX_", "PYTEST_", "SLURM_", "OMPI_")


class SlurmCluster:
    """Hosts head, node1, node2, …, each with its own network, processes, name and daemons.

    Files are shared, as over NFS.

    Args:
        state: the test-bed's directory; must not exist.
        num_nodes: besides the head.
        options: settings of ``start.sh``, such as TESTBED_PREEMPT.
    """

    def __init__(self, state: Path, num_nodes: int, **options: str) -> None:
        self.state = state
        self.num_nodes = num_nodes
        self._environ = {
            name: value for name, value in os.environ.items() if not name.startswith(_OURS)
        } | {
            "TESTBED": str(state),
            "PYTHON": sys.executable,
            "PYTHONUNBUFFERED": "1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **options,
        }

    @classmethod
    @contextlib.contextmanager
    def running(cls, state: Path, num_nodes: int, **options: str) -> Iterator["SlurmCluster"]:
        """Start a cluster; it is stopped at the end, also if this process dies before."""
        cluster = cls(state, num_nodes, **options)
        # Reads until the other end of its pipe is closed, by us or by our death.
        stop = f"cat >/dev/null; exec {SCRIPTS}/stop.sh"
        guard = subprocess.Popen(
            ["setsid", "sh", "-c", stop], stdin=subprocess.PIPE, env=cluster._environ
        )
        try:
            cluster._script("start.sh", str(num_nodes))
            yield cluster
        finally:
            assert guard.stdin is not None
            guard.stdin.close()
            guard.wait(60)

    def on(self, host: str, *command: str, timeout_s: float = 60.0, **environ: str) -> str:
        """Run a command on a host, in the repository's folder, and return what it printed.

        Raises:
            AssertionError: it failed; the message has its output.
        """
        return self._script("on.sh", host, *command, timeout_s=timeout_s, environ=environ)

    @contextlib.contextmanager
    def started(
        self, host: str, *command: str, log: Path, **environ: str
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a command on a host, its output going to ``log``; it is ended at the end."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(SCRIPTS / "on.sh"), host, *command],
                cwd=REPOSITORY,
                env=self._environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def submit(self, script: str, *arguments: str, options: Sequence[str], **environ: str) -> "Job":
        """Submit a batch job from the repository's folder."""
        command = ("sbatch", "--parsable", *options, script, *arguments)
        return Job(self, int(self.on("head", *command, **environ)))

    def power_off(self, node: str) -> None:
        """Cut a node's network, then end all its processes: nothing says goodbye."""
        self._script("node.sh", "kill", node)

    def power_on(self, node: str) -> None:
        """Boot a node that was switched off."""
        self._script("node.sh", "boot", node)

    def cut(self, node: str) -> None:
        """Unplug a node's network; its processes go on."""
        self._script("node.sh", "cut", node)

    def heal(self, node: str) -> None:
        """Plug a node's network in again."""
        self._script("node.sh", "heal", node)

    def restart_controller(self, *, down_s: float = 2.0) -> None:
        """SIGKILL slurmctld and start it again."""
        self._script("node.sh", "slurmctld-restart", "head", environ={"DOWN_S": str(down_s)})

    def idle_nodes(self) -> list[str]:
        """Return the nodes that could run a job now."""
        command = ("sinfo", "--noheader", "-N", "-p", "low", "-t", "idle", "-o", "%N")
        return self.on("head", *command).split()

    def ranks_of(self, launch: str, script: str) -> dict[int, int]:
        """Return the ranks of a launch that live: rank -> process, as this machine counts.

        Args:
            launch: its $NEOX_LAUNCH_ID.
            script: what a rank runs.
        """
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                variables = dict(
                    variable.partition(b"=")[::2]
                    for variable in (entry / "environ").read_bytes().split(b"\0")
                )
                is_rank = script.encode() in (entry / "cmdline").read_bytes()
                if is_rank and variables.get(b"NEOX_LAUNCH_ID") == launch.encode():
                    found[int(variables[b"RANK"])] = int(entry.name)
        return found

    def logs(self, num_lines: int = 25) -> str:
        """Return the end of what the controller said."""
        path = self.state / "head" / "slurmctld.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"--- {path}", *lines[-num_lines:]])

    def _script(
        self,
        name: str,
        *arguments: str,
        timeout_s: float = 90.0,
        environ: Mapping[str, str] | None = None,
    ) -> str:
        done = subprocess.run(
            [str(SCRIPTS / name), *arguments],
            cwd=REPOSITORY,
            env=self._environ | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, (
            f"{name} {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout


class Job:
    """A batch job."""

    def __init__(self, cluster: SlurmCluster, number: int) -> None:
        self.cluster = cluster
        self.number = number

    def facts(self) -> dict[str, str]:
        """Return what ``scontrol show job`` says; nothing while the controller is away."""
        try:
            text = self.cluster.on("head", "scontrol", "-o", "show", "job", str(self.number))
        except AssertionError as error:
            if "Unable to contact" in str(error) or "Connection refused" in str(error):
                return {}
            raise
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.facts().get("JobState", "")

    def is_running(self, *, restarts: int) -> bool:
        """Whether it runs for the ``restarts``-th time after the first."""
        facts = self.facts()
        return facts.get("JobState") == "RUNNING" and facts["Restarts"] == str(restarts)

    def restarts(self) -> int:
        """Return how often it was requeued."""
        return int(self.facts().get("Restarts", 0))

    def nodes(self) -> list[str]:
        """Return the nodes it runs on."""
        names = self.facts()["NodeList"]
        return self.cluster.on("head", "scontrol", "show", "hostnames", names).split()


def wait_until(
    condition: Callable[[], object],
    what: str,
    *,
    timeout_s: float,
    every_s: float = 0.3,
    is_hopeless: Callable[[], object] = bool,
    otherwise: Callable[[], str] = str,
) -> float:
    """Return once ``condition()`` is true, with the seconds since the epoch.

    Raises:
        AssertionError: it isn't within ``timeout_s``, or won't be; ``otherwise`` tells more.
    """
    began = look_again = time.monotonic()
    while not condition():
        now = time.monotonic()
        if now > began + timeout_s:
            raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{otherwise()}")
        if now > look_again:
            look_again = now + 3.0
            if is_hopeless() and not condition():
                raise AssertionError(f"{what}: given up after {now - began:.0f} s\n{otherwise()}")
        time.sleep(every_s)
    return time.time()
