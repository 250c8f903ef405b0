"""Every key of NeoX is declared once, as NeoX has it, with a documentation and an outcome."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from megatron.config.declare import WORKS, Outcome, key
from megatron.config.registry import build_table, keys, resolve_alias
from tests.config.configurations import DATA

ROOT = Path(__file__).parents[2]
NEOX_KEYS = json.loads((DATA / "neox_keys.json").read_text())
GROUPS = {
    "DeepspeedRunner": "runner",
    "DeepspeedConfig": "deepspeed",
    "Model": "model",
    "MoE": "moe",
    "LRScheduler": "lr_scheduler",
    "Optimizer": "optimizer",
    "Tokenizer": "tokenizer",
    "Training": "training",
    "Parallelism": "parallelism",
    "Logging": "logging",
    "Textgen": "text_generation",
    "Other": "other",
}
# NeoX's default is what `git describe` says at import; ours is found when loading.
FOUND_WHEN_LOADING = {"git_hash"}


def choices(annotation):
    """The values a key may have, if they are listed."""
    members = typing.get_args(annotation) or (annotation,)
    return [
        choice
        for member in members
        if typing.get_origin(member) is typing.Literal
        for choice in typing.get_args(member)
    ]


def test_the_keys_are_neox_s_318_and_no_other_but_ours_and_v1_0_s():
    declared = {name for name, entry in keys().items() if not entry.is_ours | entry.is_legacy}
    assert declared == {entry["name"] for entry in NEOX_KEYS}
    assert len(declared) == 318


@pytest.mark.parametrize("neox", NEOX_KEYS, ids=lambda entry: entry["name"])
def test_a_key_has_neox_s_group_default_and_choices(neox):
    ours = keys()[neox["name"]]
    assert ours.group == GROUPS[neox["group"]]
    assert ours.declaration.tier == neox["tier"]
    if neox["name"] not in FOUND_WHEN_LOADING:
        assert ours.default == neox["default"]
        assert type(ours.default) is type(neox["default"])
    # zero_stage may also be "all", for DeepSpeed's autotuner
    expected = ["all"] if neox["name"] == "zero_stage" else neox["allowed"] or []
    # DeepSpeed's launcher knows two that NeoX has forgotten
    more = {"mpich", "impi"} if neox["name"] == "launcher" else set()
    assert [choice for choice in choices(ours.annotation) if choice not in more] == expected


def test_no_key_is_without_an_outcome():
    for name, entry in keys().items():
        outcome = entry.declaration.outcome
        assert isinstance(outcome, Outcome) or callable(outcome), name
        if isinstance(outcome, Outcome) and outcome is not WORKS:
            assert outcome.text, f"{name} must say why, or what to do"


def test_gas_is_another_name_of_gradient_accumulation_steps():
    assert resolve_alias("gas") == "gradient_accumulation_steps"
    assert resolve_alias("num_layers") == "num_layers"


def test_two_groups_cannot_declare_one_key():
    @dataclasses.dataclass(frozen=True)
    class First:
        width: int = key(1, outcome=WORKS)

    @dataclasses.dataclass(frozen=True)
    class Second:
        width: int = key(2, outcome=WORKS)

    with pytest.raises(ValueError, match="width is declared in first and second"):
        build_table({"first": First, "second": Second})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"aliases": ("depth",)}, "alias depth of width is taken"),
        ({"mirrors": ("breadth",)}, "breadth, a mirror of width, is not a key"),
    ],
)
def test_a_second_name_must_be_free_and_a_mirror_a_key(options, complaint):
    @dataclasses.dataclass(frozen=True)
    class Shape:
        width: int = key(1, outcome=WORKS, **options)
        depth: int = key(1, outcome=WORKS)

    with pytest.raises(ValueError, match=complaint):
        build_table({"shape": Shape})


def test_mirrors_are_worked_out_by_loading():
    table = keys()
    mirrors = [name for entry in table.values() for name in entry.declaration.mirrors]
    assert sorted(mirrors) == ["batch_size", "clip_grad"]
    assert all(table[name].declaration.is_derived for name in mirrors)


def test_the_generated_documentation_is_current():
    command = [sys.executable, str(ROOT / "tools" / "dev" / "gen_config_docs.py"), "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_generated_documentation_has_every_key():
    text = (ROOT / "configs" / "neox_arguments.md").read_text()
    missing = [name for name in keys() if f"- **{name}** (" not in text]
    assert missing == []


def test_reading_a_configuration_loads_neither_torch_nor_numpy():
    code = (
        "import sys; import megatron.config.load, megatron.config.outcomes, "
        "megatron.config.transport, megatron.config.command_line, megatron.neox_arguments; "
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
