"""``tools/ckpts/inspect_checkpoints.py PATH``: what a checkpoint, or one of its files, holds."""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.base.torch_metadata import StoredArray, StoredObject, StoredTensor
from megatron.checkpoint.mapped_tensors import BF16, MappedFile
from megatron.checkpoint.structure import Structure, examine
from megatron.cli.checkpoints.found import find_checkpoints
from megatron.cli.checkpoints.tool import run_tool
from megatron.cli.ledger.options import add_json_option
from megatron.cli.ledger.output import counted, note, number, print_json, print_table, say
from megatron.ledger.manifest import read_manifest
from megatron.ledger.run_directory import read_latest

__all__ = ["main"]

_SHOWN_VALUES = 6  # of a tensor
_SHOWN_TEXT = 100

_EPILOG = """Nothing in a file is run, and no GPU, torch or DeepSpeed is needed. Tensors are not
read, except those that --attributes names.

exit status: 0; with --compare or --diff 1 if something differs; 2 if something cannot be read

examples:
  inspect_checkpoints.py runs/pythia                        the newest checkpoint
  inspect_checkpoints.py runs/pythia/global_step1000 --layers
  inspect_checkpoints.py runs/pythia/global_step1000/mp_rank_00_model_states.pt
  inspect_checkpoints.py global_step1000 --attributes lr_scheduler args/hidden_size
  inspect_checkpoints.py global_step1000,global_step2000 --diff"""


def main(argv: Sequence[str] | None = None) -> int:
    """Describe what ``argv`` (None: the process's own) names and return the exit status."""
    options = _parser().parse_args(argv)
    return run_tool("inspect_checkpoints", lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    paths = [Path(part) for part in options.path.split(",")]
    if options.compare or options.diff:
        return _compare(paths, options)
    if len(paths) > 1:
        raise CheckpointError("two paths are for --compare or --diff")
    [path] = paths
    if path.is_dir():
        path = _newest(path)
        if not options.attributes:
            return _describe(path, options)
    attributes = dict(_attributes(path, options.attributes))
    if options.json:
        print_json({"attributes": attributes})
    else:
        say(*(f"{name}: {value}" for name, value in attributes.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoints.py",
        description="Show what a checkpoint, or one of its files, holds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        metavar="PATH[,PATH]",
        help="a global_stepN, a save directory (its newest checkpoint), or a file; two to compare",
    )
    parser.add_argument("--layers", action="store_true", help="list every layer's tensors")
    parser.add_argument(
        "--attributes",
        nargs="+",
        default=[],
        metavar="KEY/KEY",
        help="show only what these keys lead to, with a tensor's first values",
    )
    parser.add_argument("-c", "--compare", action="store_true", help="show two side by side")
    parser.add_argument("-d", "--diff", action="store_true", help="show only where two differ")
    add_json_option(parser)
    return parser


def _newest(path: Path) -> Path:
    found = find_checkpoints(path)
    if found.checkpoints == [path]:
        return path
    try:
        step = read_latest(path)
    except CheckpointError as error:
        note(f"inspect_checkpoints: {error}; looking at the highest step")
        step = None
    return found.checkpoints[-1] if step is None else path / f"global_step{step}"


def _describe(checkpoint: Path, options: argparse.Namespace) -> int:
    structure = examine(checkpoint, needs_optimizer=True)
    facts = dict(_facts(structure))
    if options.json:
        print_json({**facts, "layers": _layers_as_json(structure), "notes": structure.notes})
        return 0
    width = max(map(len, facts)) + 2
    say(*(f"{name:{width}}{_shown(value)}" for name, value in facts.items()))
    if options.layers:
        say("")
        print_table(
            ("layer", "tensor", "type", "shape of a part", "parts>"), _layer_rows(structure)
        )
    for problem in structure.problems:
        note(f"PROBLEM  {printable(problem)}")
    return 0


def _facts(structure: Structure) -> Iterator[tuple[str, Any]]:
    first, files = structure.first, structure.files
    yield "checkpoint", str(structure.checkpoint)
    yield "step", structure.step
    if first is not None:
        yield "written by", first.writer
    yield (
        "topology",
        f"pipeline stages {structure.model_ranks // structure.tensor_parallel_size}, "
        f"data-parallel ranks {structure.data_parallel_size}, "
        f"tensor-parallel size {structure.tensor_parallel_size}",
    )
    kinds = {
        "layer": len(files.layers),
        "model-states": len(files.model_states) + len(files.scattered),
        "optimizer": len(files.optimizer),
    }
    yield "files", ", ".join(f"{number(count)} {kind}" for kind, count in kinds.items())
    yield "size", f"{number(sum(structure.sizes.values()))} bytes"
    yield "layers", _ranges(structure.layers)
    yield "parameters", f"{number(_parameters(structure))} as stored, replicated ones once"
    yield "weights", ", ".join(sorted({tensor.dtype for tensor in _weights(structure)}))
    optimizers = {part.kind for part in structure.optimizer.values()}
    optimizers |= {one.optimizer.kind for one in structure.metadata.values() if one.optimizer}
    steps = {part.step for part in structure.optimizer.values()}
    told = [f", step {step}" for step in steps if step is not None]
    yield "optimizer", (", ".join(sorted(optimizers)) or "none") + "".join(told)
    if first is not None:
        yield "arguments", dict(first.arguments)
        yield "counters", {key: value for key, value in first.counters.items() if value is not None}
    yield from _records(structure)


def _records(structure: Structure) -> Iterator[tuple[str, Any]]:
    try:
        manifest = read_manifest(structure.checkpoint)
    except CheckpointError as error:
        yield "manifest", f"damaged: {error}"
    else:
        if manifest is not None:
            parent = f", after commit {manifest.parent}" if manifest.parent is not None else ""
            yield "manifest", f"commit {manifest.sequence} of its save{parent}"
    ledger = structure.ledger
    if ledger is not None:
        yield "run", f"{ledger.run_id}, {counted(len(ledger.spans), 'attempt')} on its lineage"
        positions = {name: state.next_position for name, state in ledger.streams.items()}
        yield "next positions", positions
        yield "exactness", ledger.exactness


def _weights(structure: Structure) -> Iterator[Any]:
    for tensors in structure.tensors.values():
        yield from tensors.values()


def _parameters(structure: Structure) -> int:
    """Count every tensor of all ranks; equal shapes along a row can't tell which are divided."""
    total = 0
    for layer in structure.layers:
        parts = [held for (one, _), held in sorted(structure.tensors.items()) if one == layer]
        for name, tensor in parts[0].items():
            module = name.split(".")[-2] if "." in name else ""
            is_replicated = (
                "norm" in module
                or module == "position_embeddings"
                or (name.endswith(".bias") and module in ("dense", "linear2", "dense_4h_to_h"))
                or not name.endswith((".weight", ".bias"))
            )
            total += tensor.numel * (1 if is_replicated else len(parts))
    return total


def _layer_rows(structure: Structure) -> Iterator[tuple[Any, ...]]:
    for layer in structure.layers:
        parts = [held for (one, _), held in sorted(structure.tensors.items()) if one == layer]
        for name, tensor in parts[0].items():
            yield layer, printable(name), tensor.dtype, list(tensor.shape), len(parts)


def _layers_as_json(structure: Structure) -> list[dict[str, Any]]:
    names = ("layer", "tensor", "dtype", "shape", "parts")
    return [dict(zip(names, row, strict=True)) for row in _layer_rows(structure)]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for one in numbers:
        if runs and runs[-1][-1] == one - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _compare(paths: Sequence[Path], options: argparse.Namespace) -> int:
    if len(paths) != 2:
        raise CheckpointError("--compare and --diff need two paths, joined by a comma")
    sides = [
        dict(_attributes(_newest(path) if path.is_dir() else path, options.attributes))
        for path in paths
    ]
    names = list({**sides[0], **sides[1]})
    rows = [(name, sides[0].get(name), sides[1].get(name)) for name in names]
    different = [row for row in rows if row[1] != row[2]]
    shown = different if options.diff else rows
    if options.json:
        keys = ("attribute", "first", "second")
        print_json({"attributes": [dict(zip(keys, row, strict=True)) for row in shown]})
    elif shown:
        print_table(("attribute", str(paths[0]), str(paths[1])), shown)
    return int(bool(different))


def _attributes(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield attribute and value of a file, or of every file of a checkpoint."""
    for name in sorted(examine(path).sizes) if path.is_dir() else [path.name]:
        file = MappedFile(path / name if path.is_dir() else path)
        prefix = f"{name}:" if path.is_dir() else ""
        for key in wanted or ("",):
            found = _at(file.content, key)
            for attribute, value in _leaves(found, key):
                yield printable(prefix + attribute), _value(value, file if wanted else None)


def _at(content: Any, key: str) -> Any:
    """Return what the keys lead to; an empty dictionary if there is nothing."""
    for part in filter(None, key.split("/")):
        if isinstance(content, Mapping):
            keys = {str(one): one for one in content}
            content = content[keys[part]] if part in keys else {}
        elif isinstance(content, list | tuple) and part.isdecimal() and int(part) < len(content):
            content = content[int(part)]
        else:
            return {}
    return content


def _leaves(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, StoredObject) and content.attributes:
        content = content.attributes
    if isinstance(content, Mapping):
        items: Any = content.items()
    elif isinstance(content, list | tuple) and any(_is_nested(one) for one in content):
        items = enumerate(content)
    else:
        yield path, content
        return
    for key, value in items:
        yield from _leaves(value, f"{path}/{key}" if path else str(key))


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple | StoredTensor | StoredArray | StoredObject)


def _value(value: Any, file: MappedFile | None) -> str:
    if isinstance(value, StoredTensor):
        shape = f"{value.dtype} {list(value.shape)}"
        return shape if file is None else f"{shape} {_first_values(file, value)}"
    if isinstance(value, StoredArray):
        return f"NumPy {value.dtype} {list(value.shape)}"
    return _shown(value)


def _first_values(file: MappedFile, tensor: StoredTensor) -> str:
    flat = file.array(tensor).reshape(-1)[:_SHOWN_VALUES]
    if tensor.dtype == BF16:
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    more = ", ..." if math.prod(tensor.shape) > len(flat) else ""
    return "(" + ", ".join(f"{one:.6g}" for one in flat.tolist()) + more + ")"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return printable(", ".join(f"{key} {one}" for key, one in value.items()))
    text = printable(str(value))
    return text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 3] + "..."


if __name__ == "__main__":
    sys.exit(main())
