"""The guard tells NVIDIA's apex from the project that has its name on PyPI."""

import subprocess
import sys
from pathlib import Path

GUARD = Path(__file__).parents[2] / "tools/dev/check_apex.py"


def install(folder, files):
    dist_info = folder / "apex-0.9.8.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.8\n")
    (dist_info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def run_guard(folder):
    return subprocess.run(
        [sys.executable, str(GUARD)],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_other_apex_is_named_as_such(tmp_path):
    install(tmp_path, ["apex/__init__.py", "apex/velruse.py"])
    result = run_guard(tmp_path)
    assert result.returncode == 1
    assert "the installed apex 0.9.8 has no apex/optimizers/fused_adam.py" in result.stderr
    assert "make setup-apex" in result.stderr


def test_nvidias_apex_passes(tmp_path):
    install(tmp_path, ["apex/__init__.py", "apex/optimizers/fused_adam.py"])
    assert run_guard(tmp_path).returncode == 0


def test_a_missing_apex_is_said(tmp_path):
    result = run_guard(tmp_path)
    assert result.returncode == 1
    assert "apex is not installed" in result.stderr
