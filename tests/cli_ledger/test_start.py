"""What a question costs before it is answered: modules loaded, processor time."""

import importlib
import json
import os
import resource
import subprocess
import sys
import tomllib

import pytest

from megatron.cli.ledger.main import main
from tests.architecture.source_tree import ROOT
from tests.ledger.queries.histories import eventful_run

HEAVY = {
    *("torch", "deepspeed", "transformers", "tokenizers", "wandb", "pydantic", "yaml", "rich"),
    *("pyarrow", "pandas", "scipy"),
}
MAX_CPU_SECONDS = 0.4


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    return eventful_run(tmp_path_factory.mktemp("eventful")).save


def run_command(save, *arguments, after=""):
    code = (
        "import json, sys\n"
        "from megatron.cli.ledger.main import main\n"
        f"status = main({[*arguments, '--run', str(save)]!r})\n"
        f"{after}\n"
        "sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("step", "3"),
        ("step", "3", "--json"),
        ("document", "30"),
        ("log",),
        ("verify",),
    ],
)
def test_questions_load_nothing_heavy(save, arguments):
    report = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    modules = set(json.loads(run_command(save, *arguments, after=report).splitlines()[-1]))
    assert modules & HEAVY == set()


def test_the_console_script_is_this_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["neox-ledger"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_a_step_is_shown_in_less_than_the_promised_time(save):
    run_command(save, "step", "3")  # byte code and page cache are warm
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_command(save, "step", "3")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < MAX_CPU_SECONDS
