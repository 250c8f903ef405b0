"""Converting Hugging Face models: speed against plain copying, and memory.

    python benchmarks/convert_hf.py [--layers 16] [--shard-mb 250] [--repeats 3]

A fp16 model of Pythia 1B's width is made in shards, as safetensors and as torch's .bin. Each of

    to NeoX        at tensor-parallel sizes 1 and 2, from either format
    to the hub     from the files at tensor-parallel size 2

alternates with a plain copy of the same source files, 4 MiB at a time, synced. Before each the
source is dropped from the page cache, so that it comes from the disk. Speed is the copy's time
divided by the conversion's: 0.5 is half of the disk's. Conversions also look for values that aren't
numbers, make the digests of the manifest and, from .bin and to the hub, check the source's first.
Peak memory is that of a forked process above what it had before.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

import torch

from benchmarks.reshape import in_a_process, shown
from megatron.checkpoint.hugging_face.architecture import hub_config, read_architecture
from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.checkpoint.hugging_face.names import hub_names, whole_shapes
from megatron.checkpoint.hugging_face.safetensors_file import SafetensorsFile, write_safetensors
from megatron.checkpoint.hugging_face.to_neox import ImportSettings, import_model
from megatron.checkpoint.reshape.streamed_file import StreamedTensor

WIDTH, HEADS, VOCABULARY = 2048, 8, 50304
PIECE = 1 << 22


def main() -> None:
    """Measure, and print a line for each conversion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-mb", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Make the sources, then take conversions and copies in turn."""
    hub = folder / "hub"
    make_model(hub, options.layers, options.shard_mb * 1_000_000)
    torch_hub = as_torch_files(hub, folder / "torch")
    two = ImportSettings(tensor_parallel_size=2)
    stored = import_model(hub, folder / "stored", two).path
    largest = max(path.stat().st_size for path in weights(hub))
    total = sum(path.stat().st_size for path in weights(hub))
    print(
        f"{total / 1e9:.2f} GB in {len(weights(hub))} shards of at most {largest / 1e6:.0f} MB, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    cases: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "to NeoX, TP 1, safetensors": (hub, lambda to: import_model(hub, to, settings(1))),
        "to NeoX, TP 2, safetensors": (hub, lambda to: import_model(hub, to, settings(2))),
        "to NeoX, TP 2, .bin": (torch_hub, lambda to: import_model(torch_hub, to, settings(2))),
        "to the hub, from TP 2": (stored, lambda to: export_model(stored, to, ExportSettings())),
    }
    for name, (source, convert) in cases.items():
        speeds, ratios, peaks = [], [], []
        for _ in range(options.repeats):
            copied, _ = timed(source, folder / "copy", lambda to, of=source: copy(weights(of), to))
            converted, peak = timed(source, folder / "new", convert)
            speeds.append(total / converted / 1e9)
            ratios.append(copied / converted)
            peaks.append(peak / largest)
        print(
            f"{name}: {shown(ratios)}x the speed of a copy, {shown(speeds)} GB/s, "
            f"peak memory {shown(peaks)}x the largest shard"
        )
    print(f"load average at the end {os.getloadavg()[0]:.1f}")


def settings(size: int) -> ImportSettings:
    """Return settings for a tensor-parallel size."""
    return ImportSettings(tensor_parallel_size=size)


def timed(source: Path, target: Path, action: Callable[[Path], object]) -> tuple[float, int]:
    """Return the seconds and the peak memory of ``action``, with ``source`` on disk only."""
    os.sync()
    for path in weights(source):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result = in_a_process(lambda: action(target))
    shutil.rmtree(target)
    return result


def weights(directory: Path) -> list[Path]:
    """Return the files with tensors."""
    return sorted(
        path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")
    )


def copy(files: Iterable[Path], target: Path) -> None:
    """Copy files as plainly as possible, and sync them."""
    target.mkdir()
    for path in files:
        with open(path, "rb") as source, open(target / path.name, "wb") as copied:
            while piece := source.read(PIECE):
                copied.write(piece)
            copied.flush()
            os.fsync(copied.fileno())
            os.posix_fadvise(copied.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_model(directory: Path, layers: int, limit: int) -> None:
    """Write a model of random numbers in shards."""
    described = {
        "model_type": "gpt_neox",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
    }
    model = read_architecture(described, source="the benchmark").settings
    config = hub_config(
        model, vocab_size=VOCABULARY, dtype="float16", init_std=0.02, end_of_document=0
    )
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    noise = (torch.randn(PIECE // 2) * 0.02).half()
    shards: list[dict[str, StreamedTensor]] = [{}]
    filled = 0
    for key, shape in whole_shapes(model).items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + size > limit:
            shards, filled = [*shards, {}], 0
        tensor = StreamedTensor(shape, torch.float16, lambda n=size // 2: repeated(noise, n))
        shards[-1][hub_names(model)[key]] = tensor
        filled += size
    index = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard)
        index |= dict.fromkeys(shard, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def as_torch_files(hub: Path, directory: Path) -> Path:
    """Write the same shards in torch's format."""
    directory.mkdir()
    shutil.copy(hub / "config.json", directory)
    index = {}
    for path in weights(hub):
        file = SafetensorsFile(path)
        name = f"pytorch_{path.stem}.bin"
        torch.save({tensor: file.tensor(tensor) + 0 for tensor in file.names}, directory / name)
        index |= dict.fromkeys(file.names, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def repeated(noise: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Yield ``count`` numbers."""
    for start in range(0, count, len(noise)):
        yield noise[: count - start]


if __name__ == "__main__":
    main()
