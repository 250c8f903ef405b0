"""What docs/slurm says about exit codes, reasons, options and commands is so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.base import exit_codes
from megatron.cli.slurm import decide
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.ledger.launches_file import EndedLaunch, read_launches
from tests.architecture.source_tree import ROOT
from tests.ledger.queries.simulated_run import SimulatedRun, write_corpus

FOLDER = ROOT / "docs" / "slurm"
REASONS = (FOLDER / "stop-reasons.md").read_text()
MINUTES = (FOLDER / "five-minutes.md").read_text()
SCRIPT = (ROOT / "tools/slurm/train.sbatch").read_text()


def table_after(heading: str) -> list[list[str]]:
    section = REASONS.partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_exit_code_has_its_row():
    rows = table_after("Exit statuses of `python deepy.py train.py …`")
    documented = {row[1].strip("`"): int(row[0]) for row in rows if row[1]}
    assert documented == {name: getattr(exit_codes, name) for name in exit_codes.__all__}


def test_every_verdict_has_its_row():
    rows = table_after("Exit statuses of `neox-slurm decide`")
    documented = {row[1].strip("`"): int(row[0]) for row in rows if row[1]}
    assert documented == decide.EXIT_STATUS


def test_every_member_of_a_launchs_line_is_named():
    section = REASONS.partition("## Lines of `launches.jsonl`")[2].partition("\n## ")[0]
    names = set(re.findall(r"`(\w+)`", section))
    assert names >= set(EndedLaunch.__dataclass_fields__)


def test_the_configuration_can_be_launched(tmp_path):
    [keys] = code_blocks(MINUTES, "yaml")
    mine = tmp_path / "cluster.yml"
    mine.write_text(keys)
    # two nodes of eight, as the sbatch line beside it asks for
    environ = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_TASKS_PER_NODE": "1",
    }
    config = load_config([ROOT / "configs/160M.yml", mine], local_slots=lambda: 8, environ=environ)
    check_launch(config)
    assert config.training.save == config.training.load == "runs/first"


@pytest.mark.parametrize("block", [*code_blocks(MINUTES, "bash"), SCRIPT])
def test_shell_code_is_shell_code(block):
    subprocess.run(["bash", "-n", "-c", block], check=True)


def test_environment_variables_named_are_those_of_the_script():
    named = set(re.findall(r"\b(NEOX_[A-Z]+|PYTHON)=", MINUTES))
    assert named == {"NEOX_TRIES", "NEOX_REQUEUE", "PYTHON"}
    assert all(f"${{{name}:-" in SCRIPT for name in named)
    assert "--signal=B:USR1@120" in SCRIPT
    assert "#SBATCH --requeue" in SCRIPT
    assert "#SBATCH --open-mode=append" in SCRIPT
    assert not re.search(r"^trap .*CONT", SCRIPT, re.MULTILINE)


def test_the_loop_without_slurm_goes_on_until_the_run_is_finished(tmp_path):
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    (tmp_path / "my.yml").write_text(json.dumps({"save": str(run.save), "train_iters": 20}))
    [loop] = [block for block in code_blocks(MINUTES, "bash") if "while" in block]
    # launches are played: the first is told to stop, the second finishes
    play = f"""
    launches=0
    python() {{
        launches=$((launches + 1))
        {sys.executable} -c "
from tests.cli_slurm.test_documents import play_launch
play_launch({str(tmp_path)!r}, $launches)"
    }}
    neox-slurm() {{ {sys.executable} -m megatron.cli.slurm "$@"; }}
    {loop.replace("my.yml", str(tmp_path / "my.yml"))}
    exit $launches
    """
    done = subprocess.run(["bash", "-c", play], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 2
    assert [one.action for one in read_launches(run.save)] == ["requeue", "done"]


def play_launch(folder: str, number: int) -> None:
    """Take ten steps, and end as a launch would."""
    run = SimulatedRun(Path(folder) / "save", [f"{folder}/corpus"])
    stop = "signal SIGTERM" if number == 1 else "finished"
    run.launch(10 * number, saves=[10 * number], stop=stop, train_iters=20)
    sys.exit(exit_codes.STOPPED if number == 1 else exit_codes.FINISHED)
