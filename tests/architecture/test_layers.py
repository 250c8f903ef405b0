"""Imports point down only: base <- config <- stream <- ledger <- data <- … <- cli."""

import sys

import pytest

from tests.architecture.source_tree import PACKAGE, Import, imports

LAYERS = (
    "base",
    "config",
    "stream",
    "ledger",
    "data",
    "optim",
    "model",
    "checkpoint",
    "engine",
    "cli",
)
# Modules that NeoX's users import, without logic of their own: the highest layer each may reach.
# Only cli and other faces import them.
FACES = {
    "neox_arguments": "config",
    "tokenizer": "data",
    "checkpointing": "engine",
    "training": "cli",
}
# Third-party packages with the layers (and faces) that may import them, anywhere in their code.
CONFINED = {
    "torch": {"data", "optim", "model", "checkpoint", "engine", "cli", "checkpointing", "training"},
    "deepspeed": {"checkpoint", "engine"},
    "megatron.core": {"model"},
    "numpy": {"stream", "ledger", "data", "model", "checkpoint", "engine", "cli"},
}
# Absent from a CPU machine, or optional: only inside of the function that needs them.
NEVER_AT_MODULE_LEVEL = {
    "apex",
    "bitsandbytes",
    "boto3",
    "comet_ml",
    "flash_attn",
    "hf_transfer",
    "mup",
    "pynvml",
    "tensorboard",
    "transformer_engine",
    "triton",
    "wandb",
}


@pytest.fixture(scope="module")
def all_imports():
    return list(imports())


def room(module):
    """The first name below megatron: a layer or a face; the root package is ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_within(name, package):
    return name == package or name.startswith(package + ".")


def layer_violations(found: list[Import]) -> list[str]:
    problems = []
    for entry in found:
        importer, target = room(entry.importer), room(entry.name)
        if not is_within(entry.name, "megatron") or is_within(entry.name, "megatron.core"):
            continue
        if importer in ("", target):
            continue
        if target in FACES:
            if importer != "cli" and importer not in FACES:
                problems.append(f"{entry}, a face for NeoX's users")
        elif target in LAYERS:
            reach = LAYERS.index(FACES.get(importer, importer))
            if LAYERS.index(target) > reach or (target == importer):
                problems.append(f"{entry}, which is above it")
    return problems


def confinement_violations(found: list[Import]) -> list[str]:
    return [
        f"{entry}, allowed in {', '.join(sorted(rooms))} only"
        for entry in found
        for package, rooms in CONFINED.items()
        if is_within(entry.name, package) and room(entry.importer) not in rooms
    ]


def test_every_room_of_the_package_is_a_layer_or_a_face():
    rooms = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith((".", "__"))}
    assert rooms - set(LAYERS) - set(FACES) == set()


def test_no_room_has_a_name_that_megatron_core_owns():
    taken = {"core", "rl", "inference", "post_training", "elastification", "legacy", "plugins"}
    assert {path.stem for path in PACKAGE.iterdir()} & taken == set()


def test_imports_point_down(all_imports):
    assert layer_violations(all_imports) == []


def test_torch_deepspeed_and_megatron_core_stay_where_they_belong(all_imports):
    assert confinement_violations(all_imports) == []


def test_base_needs_the_standard_library_and_xxhash_only(all_imports):
    strangers = [
        str(entry)
        for entry in all_imports
        if room(entry.importer) == "base"
        and entry.name.split(".")[0] not in sys.stdlib_module_names | {"megatron", "xxhash"}
    ]
    assert strangers == []


def test_optional_packages_are_imported_where_they_are_used(all_imports):
    early = [
        str(entry)
        for entry in all_imports
        if entry.is_at_module_level and entry.name.split(".")[0] in NEVER_AT_MODULE_LEVEL
    ]
    assert early == []


@pytest.mark.parametrize(
    ("importer", "name", "complaint"),
    [
        ("megatron.stream.streams", "megatron.data.loader", "which is above it"),
        ("megatron.config.load", "megatron.neox_arguments", "a face for NeoX's users"),
        ("megatron.neox_arguments", "megatron.stream.streams", "which is above it"),
    ],
)
def test_a_planted_import_upwards_is_found(importer, name, complaint):
    (problem,) = layer_violations([Import(importer, name, 1, True)])
    assert problem == f"{importer}:1 imports {name}, {complaint}"


@pytest.mark.parametrize(
    ("importer", "name"),
    [
        ("megatron.ledger.records", "torch.distributed"),
        ("megatron.model.layers", "deepspeed.pipe"),
        ("megatron.engine.groups", "megatron.core.parallel_state"),
    ],
)
def test_a_planted_confined_import_is_found(importer, name):
    (problem,) = confinement_violations([Import(importer, name, 1, False)])
    assert problem.startswith(f"{importer}:1 imports {name}, allowed in ")
