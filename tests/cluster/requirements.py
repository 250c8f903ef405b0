"""What the test-bed needs of a machine."""

import os
import shutil
from pathlib import Path

__all__ = ["missing"]

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}
_PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
"""Programs and the Debian packages that have them."""


def missing() -> str | None:
    """Say what this machine lacks for the test-bed; None: nothing."""
    if os.geteuid() != 0:
        return "root (the test-bed makes namespaces and network devices)"
    held = int(_status("CapEff"), 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        return f"the capabilities {', '.join(lacking)}"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    packages = [
        package for program, package in _PROGRAMS.items() if not shutil.which(program, path=path)
    ]
    if packages:
        install = Path(__file__).parent / "testbed" / "install.sh"
        return f"the packages {', '.join(packages)} ({install} installs them)"
    return None


def _status(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    raise AssertionError(f"/proc/self/status has no {name}")
