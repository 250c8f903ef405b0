"""Whatever a checkpoint file holds, nothing in it runs: both readers refuse it, saying why."""

import os
import re
import resource
import sys

import pytest

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import inspect_torch_file
from megatron.checkpoint.safe_torch import read_torch_file
from tests.checkpoint.malicious_files import ATTACKS

READERS = {"without torch": inspect_torch_file, "with torch": read_torch_file}
FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
_watched: list[list[str]] = []


def _watch(event, arguments):
    if _watched and event in FORBIDDEN:
        _watched[-1].append(event)


sys.addaudithook(_watch)  # for as long as the process lives


def refusal_of(reader, path):
    """Return the message, having seen that nothing was looked up or started meanwhile."""
    _watched.append([])
    try:
        with pytest.raises(CheckpointError) as refusal:
            reader(path)
    finally:
        seen = _watched.pop()
    assert seen == []
    return str(refusal.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_runs_nothing(name, reader, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "layer_00-model_00-model_states.pt"
    ATTACKS[name].write(path, canary)
    message = refusal_of(READERS[reader], path)
    assert message.startswith(str(path))
    assert re.search(ATTACKS[name].message, message), message
    assert len(message) < 600
    assert not canary.exists()


def test_no_attack_takes_more_than_500_megabytes(tmp_path):
    for number, attack in enumerate(ATTACKS.values()):
        attack.write(tmp_path / f"{number}.pt", tmp_path / "canary")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + (500 << 20),) * 2)
            for path in sorted(tmp_path.glob("*.pt")):
                with pytest.raises(CheckpointError):
                    read_torch_file(path)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "is a symbolic link; links in a checkpoint"),
        (os.mkfifo, "is a FIFO, not a file"),
        (lambda path: path.mkdir(), "is a directory, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link"),
        (lambda path: path.symlink_to(path), "is a symbolic link"),
    ],
    ids=["link", "FIFO", "directory", "link to a device", "link to itself"],
)
def test_what_is_no_regular_file_is_not_opened(make, message, reader, tmp_path):
    path = tmp_path / "layer_00-model_00-model_states.pt"
    make(path)
    assert message in refusal_of(READERS[reader], path)
