"""What importing us loads, on a machine without a GPU and from any folder."""

import json
import os
import subprocess
import sys

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT, our_modules

# What a look-up tool must never wait for.
HEAVY = ("torch", "deepspeed", "megatron.core", "transformers", "pydantic", "wandb")


def run_python(code, *, cwd=ROOT, **environ):
    # -P: the folder python runs in is not searched, so only what is installed is found.
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def modules_after(statement, **environ):
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    result = run_python(f"{statement}\n{report}", PYTHONPATH=str(ROOT), **environ)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "megatron",
        "megatron.config",
        "megatron.stream",
        "megatron.ledger",
        "megatron.neox_arguments",
        "megatron.data.tokenizers",
    ],
)
def test_the_light_modules_load_nothing_heavy(module):
    assert modules_after(f"import {module}") & set(HEAVY) == set()


def test_every_light_module_loads_nothing_heavy():
    light = [
        name
        for name in our_modules()
        if name.split(".")[1:2] in (["base"], ["config"], ["stream"], ["ledger"])
    ]
    assert modules_after("\n".join(f"import {name}" for name in light)) & set(HEAVY) == set()


def test_every_module_can_be_imported_without_a_gpu():
    code = "import importlib\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in our_modules()
    )
    result = run_python(code, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_the_installed_package_and_megatron_core_share_a_name_from_any_folder(tmp_path):
    code = "import megatron, megatron.core, megatron.config; print(megatron.__file__)"
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == str(PACKAGE / "__init__.py")
