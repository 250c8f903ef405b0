"""What the documents point at exists."""

import re
import textwrap
from pathlib import Path

import pytest

from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from tests.architecture.source_tree import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "configs/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MAKE_COMMAND = re.compile(r"(?:^ {4}|`)make ([a-z][a-z-]*)", re.MULTILINE)


def prose(path: Path) -> str:
    return CODE_BLOCK.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The anchors GitHub makes of the headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in HEADING.findall(prose(path))
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    broken = []
    for link in LINK.findall(prose(ROOT / document)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_make_command_named_is_a_target(document):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(MAKE_COMMAND.findall((ROOT / document).read_text())) - targets == set()


def test_the_readmes_configuration_can_be_launched(tmp_path):
    block = re.search(r"^    # my\.yml\n((?:    .*\n)+)", (ROOT / "README.md").read_text(), re.M)[1]
    mine = tmp_path / "my.yml"
    mine.write_text(textwrap.dedent(block))
    files = [ROOT / "configs/160M.yml", mine]
    config = load_config(files, local_slots=lambda: 1, environ={})
    check_launch(config)
    assert config.training.load == config.training.save == "runs/first"


def test_the_demos_configuration_can_be_launched():
    config = load_config([ROOT / "configs/demo.yml"], local_slots=lambda: 1, environ={})
    assert check_launch(config) == []
    assert config.topology.world_size == 4
