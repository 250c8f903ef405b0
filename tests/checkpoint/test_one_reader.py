"""Nothing but the restricted readers opens a pickle; DeepSpeed never does so by itself."""

import ast
import functools
import pickle

import deepspeed  # noqa: F401 - the parent of the forked ranks is warm
import pytest
import torch

from megatron.config.topology import Topology
from tests.architecture.source_tree import ROOT, imports_below
from tests.checkpoint.tiny_run import TinyRun, TinySettings
from tests.worlds import run_ranks

# Calls that can run code from a file, by the end of their dotted name.
DANGEROUS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pickle._Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "compile",
}
ALLOWED = {
    ("megatron/checkpoint/safe_torch.py", "torch.load"),
    # what ranks of one job tell each other
    ("megatron/engine/distributed.py", "pickle.loads"),
}
# Modules of DeepSpeed's that read files with its own torch.load.
READS_BY_ITSELF = (
    "deepspeed.checkpoint",
    "deepspeed.module_inject",
    "deepspeed.utils.zero_to_fp32",
    "deepspeed.runtime.state_dict_factory",
    "deepspeed.inference",
)
SOURCES = sorted([*(ROOT / "megatron").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


@functools.cache
def calls():
    return [
        (str(path.relative_to(ROOT)), ast.unparse(node.func), node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_nothing_that_could_run_a_files_code_is_called():
    found = {(file, name) for file, name, _ in calls() if name in DANGEROUS}
    assert found - ALLOWED == set()
    assert found == ALLOWED  # the test sees them


def test_torch_load_is_restricted_where_it_is_called():
    [call] = [call for _, name, call in calls() if name == "torch.load"]
    assert {one.arg: ast.unparse(one.value) for one in call.keywords}["weights_only"] == "True"


def test_numpy_never_unpickles():
    options = [
        (file, one.arg, ast.unparse(one.value))
        for file, name, call in calls()
        if name in ("np.load", "numpy.load")
        for one in call.keywords
    ]
    assert [one for one in options if one[1] == "allow_pickle" and one[2] != "False"] == []


def test_deepspeeds_loader_is_entered_at_one_place_with_our_reader():
    entries = [
        (file, name)
        for file, name, _ in calls()
        if name.endswith((".load_checkpoint", ".load_module_state_dict"))
    ]
    assert entries == [("megatron/checkpoint/load.py", "engine.load_checkpoint")]
    tree = ast.parse((ROOT / "megatron/checkpoint/load.py").read_text())
    [function] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "engine.load_checkpoint(" in ast.unparse(node)
    ]
    text = ast.unparse(function)
    assert "engine.load_universal_checkpoint()" in text  # refused: it reads by itself
    assert text.index("engine.checkpoint_engine = ") < text.index("engine.load_checkpoint(")


def test_modules_of_deepspeed_that_read_files_are_not_imported():
    found = [
        str(entry)
        for entry in imports_below("megatron", "tools")
        if entry.name.startswith(READS_BY_ITSELF)
    ]
    assert found == []


WORLDS = {
    "ZeRO 3": TinySettings(Topology(1, 2, 1, uses_pipeline_engine=False), zero_stage=3),
    "bf16 at stage 0": TinySettings(Topology(2, 1, 1), precision="bfloat16", zero_stage=0),
}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", WORLDS)
def test_a_resume_reads_every_file_through_the_restricted_reader(kind, tmp_path):
    settings = WORLDS[kind]

    def save(context):
        run = TinyRun(context, settings)
        run.train(1)
        run.save(tmp_path / "save")

    def load(context):
        run = TinyRun(context, settings)
        seen, original = [], torch.load

        def watched(*positional, **named):
            seen.append((str(positional[0]), named.get("weights_only")))
            return original(*positional, **named)

        def refused(*positional, **named):
            raise AssertionError("an unrestricted unpickler")

        torch.load, pickle.load = watched, refused
        run.load(tmp_path / "save" / "global_step1")
        return seen

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    run_ranks(save, 2, tmp_path / "first")
    reads = [read for seen in run_ranks(load, 2, tmp_path / "second") for read in seen]
    assert {restricted for _, restricted in reads} == {True}
    assert len(reads) >= 4
