"""Every dependency is pinned, has its reason written down, and is one the code uses."""

import re

import pytest

from tests.architecture.source_tree import ROOT, imports_below, our_modules

REQUIREMENTS = sorted((ROOT / "requirements").glob("requirements*.txt"))
# Where the name on PyPI isn't the name imported.
IMPORT_NAMES = {"megatron-core": "megatron.core", "pyyaml": "yaml"}
DOCUMENT = (ROOT / "docs/dependencies.md").read_text()


def requirements_in(file):
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def is_imported(name, imported):
    module = IMPORT_NAMES.get(name, name)
    return any(f"{found}.".startswith(f"{module}.") for found in imported)


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_every_requirement_is_pinned_exactly(file):
    loose = [line for line in requirements_in(file) if "==" not in line and " @ git+" not in line]
    assert loose == []


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_every_requirement_has_a_reason(file):
    listed = [name_of(line) for line in requirements_in(file)]
    assert [name for name in listed if not re.search(rf"\| .*\b{name}\b.* \|", DOCUMENT)] == []
    assert file.name in DOCUMENT


def test_training_requires_what_our_code_imports_and_nothing_else():
    required = {
        name_of(line).lower() for line in requirements_in(ROOT / "requirements/requirements.txt")
    }
    imported = {entry.name for entry in imports_below("megatron", "tools", "tests", "setup.py")}
    # Optional libraries are asked for by name, where they are needed.
    named = "\n".join(path.read_text() for path in our_modules().values())
    unused = [
        name
        for name in sorted(required)
        if f'"{name}"' not in named and not is_imported(name, imported)
    ]
    assert unused == []


def test_apex_is_never_taken_from_pypi():
    for file in (ROOT / "requirements").glob("*.txt"):
        for line in requirements_in(file):
            if name_of(line) == "apex":
                assert "git+https://github.com/NVIDIA/apex" in line
