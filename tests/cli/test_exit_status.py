"""How a rank ends: at once, with its status, and with nothing left unsaid."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import atexit
from megatron.base.errors import ConfigError
from megatron.cli.exit_status import run_rank

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(print, "handler ran")

def command():
    print("worked")
    {fails}

run_rank(command)
"""


@pytest.mark.parametrize(
    ("fails", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise ConfigError('no')", 1, "ConfigError: no\n"),
        ("raise RuntimeError('peer is gone')", 1, "RuntimeError: peer is gone\n"),
    ],
)
def test_a_rank_ends_with_its_status_and_output_but_isnt_taken_apart(fails, status, said):
    script = textwrap.dedent(SCRIPT).format(fails=fails)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout) == (status, "worked\nhandler ran\n")
    assert ended.stderr.endswith(said)
    assert ("Traceback" in ended.stderr) == ("RuntimeError" in fails)
