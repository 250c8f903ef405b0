"""Index maps: time and peak memory against NumPy's shuffles with megatron-core's walk.

    python benchmarks/index_maps.py                       # 20 M documents x 2 epochs
    python benchmarks/index_maps.py --documents 1000000   # smaller
    python benchmarks/index_maps.py --documents 134318121 --mean-tokens 1541 --runs 1
                                                          # Pythia's deduplicated set; 13 GB of disk

Every measurement is a fresh process; ours and theirs take turns. Both are measured twice: arrays
in memory, and as a launch needs them, in files. Memory is the largest resident size beyond that
before the work, the mapped document sizes included.
"""

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron.stream.index_file import read_index, write_index
from megatron.stream.index_map_files import MapRequest, build_map_files
from megatron.stream.index_maps import IndexMaps, PackedShape, count_tokens
from megatron.stream.map_recipes import PackedRecipe

SEED = 1234
SEQ_LENGTH = 2048
MEAN_TOKENS = 775  # per document; Pythia's deduplicated set has 1,541 (207e9 / 134,318,121)


def main() -> None:
    options = _parse_options()
    if options.measure is not None:
        print(json.dumps(_measure(options.measure, Path(options.folder), options.epochs)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _write_sizes(Path(folder), options.documents, options.mean_tokens)
        results = _take_turns(Path(folder), options.epochs, options.runs)
    print(
        f"{options.documents:,} documents x {options.epochs} epochs, "
        f"{results['ours'][0]['samples']:,} samples of {SEQ_LENGTH}, {options.runs} runs each"
    )
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        peak = max(run["peak_bytes"] for run in runs)
        print(
            f"{name:24} {statistics.median(seconds):8.2f} s  ({min(seconds):.2f} to "
            f"{max(seconds):.2f})  peak {peak / 2**20:8.0f} MiB = "
            f"{peak / runs[0]['output_bytes']:.2f} x outputs"
        )
    for ours, theirs in (("ours", "numpy+mcore"), ("ours, files", "numpy+mcore, files")):
        ratios = [
            a["seconds"] / b["seconds"] for a, b in zip(results[ours], results[theirs], strict=True)
        ]
        print(
            f"time {ours} / {theirs}: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), limit 0.25"
        )
    peak = max(run["peak_bytes"] / run["output_bytes"] for run in results["ours, files"])
    print(f"memory ours, files / outputs: {peak:.3f}, limit 1.2")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--mean-tokens", type=int, default=MEAN_TOKENS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", help="where files are written (default: the temporary folder)")
    parser.add_argument("--measure", choices=sorted(_WORK), help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_sizes(folder: Path, num_documents: int, mean_tokens: int) -> None:
    sizes = np.random.default_rng(0).exponential(mean_tokens, num_documents)
    write_index(folder / "corpus.idx", np.dtype(np.uint16), sizes.astype(np.int32), [0])


def _take_turns(folder: Path, epochs: int, runs: int) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in _WORK}
    for _ in range(runs):
        for name in _WORK:
            command = [sys.executable, __file__, "--measure", name, "--epochs", str(epochs)]
            output = subprocess.run(
                [*command, "--folder", str(folder)], check=True, capture_output=True, text=True
            )
            results[name].append(json.loads(output.stdout))
            for path in folder.glob("maps*"):
                path.unlink()
    return results


def _measure(name: str, folder: Path, epochs: int) -> dict[str, Any]:
    index = read_index(folder / "corpus.idx")
    documents = range(len(index.sizes))
    shape = PackedShape(documents, count_tokens(index.sizes, documents), epochs, SEQ_LENGTH)
    recipe = PackedRecipe(index.sizes, shape, SEED)
    request = MapRequest((index.path,), recipe, str(folder / "maps"))
    helper = _megatron_core_helpers()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident_bytes("VmRSS")
    start = time.perf_counter()
    _WORK[name](request, helper)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_bytes": _resident_bytes("VmHWM") - before,
        "output_bytes": shape.size_bytes,
        "samples": shape.num_samples,
    }


def _ours(request: MapRequest[Any], _: Any) -> IndexMaps:
    return request.recipe.build()


def _ours_in_files(request: MapRequest[Any], _: Any) -> None:
    build_map_files(request)


def _theirs(request: MapRequest[Any], helper: Any) -> IndexMaps:
    shape, random = request.recipe.shape, np.random.RandomState(SEED)
    doc_idx = np.mgrid[0 : shape.num_epochs, 0 : len(shape.documents)][1]
    doc_idx = doc_idx.reshape(-1).astype(np.int32)
    random.shuffle(doc_idx)
    build = getattr(helper, f"build_sample_idx_{shape.sample_idx_dtype}")
    sizes = np.require(request.recipe.sizes, requirements="A")
    sample_idx = build(
        sizes, doc_idx, SEQ_LENGTH, shape.num_epochs, shape.tokens_per_epoch, True, 1
    )
    shuffle_idx = np.arange(shape.num_samples, dtype=shape.shuffle_idx_dtype)
    random.shuffle(shuffle_idx)
    return IndexMaps(doc_idx, sample_idx, shuffle_idx)


def _theirs_in_files(request: MapRequest[Any], helper: Any) -> None:
    for name, array in vars(_theirs(request, helper)).items():
        np.save(request.paths(request.stem)[name], array)


_WORK = {
    "ours": _ours,
    "numpy+mcore": _theirs,
    "ours, files": _ours_in_files,
    "numpy+mcore, files": _theirs_in_files,
}


def _megatron_core_helpers() -> Any:
    # By path: importing megatron.core takes seconds.
    files = importlib.metadata.distribution("megatron-core").files or []
    path = next(file.locate() for file in files if file.match("helpers_cpp*.so"))
    loader = importlib.machinery.ExtensionFileLoader("helpers_cpp", str(path))
    spec = importlib.util.spec_from_file_location("helpers_cpp", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
