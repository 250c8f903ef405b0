"""Conversions stream: they need far less memory than the weights have bytes."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron.checkpoint.hugging_face.architecture import hub_config, read_architecture
from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.checkpoint.hugging_face.names import hub_names, whole_shapes
from megatron.checkpoint.hugging_face.safetensors_file import write_safetensors
from megatron.checkpoint.hugging_face.to_neox import ImportSettings, import_model
from megatron.checkpoint.reshape.streamed_file import StreamedTensor

CONFIG = {
    "model_type": "gpt_neox",
    "vocab_size": 301_000,  # three ranks don't share it evenly
    "hidden_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 384,
}


def make_model(directory: Path) -> int:
    settings = read_architecture(CONFIG, source="test").settings
    names = hub_names(settings)
    keys = {"vocab_size": settings.padded_vocab_size, "dtype": "float16", "init_std": 0.02}
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps(hub_config(settings, end_of_document=0, **keys))
    )
    tensors = {
        names[key]: StreamedTensor.of(
            shape, torch.float16, lambda shape=shape: torch.ones(shape, dtype=torch.float16)
        )
        for key, shape in whole_shapes(settings).items()
    }
    return write_safetensors(directory / "model.safetensors", tensors)


def peak_of(action: Callable[[], object]) -> int:
    """Return how far the memory of a forked process grows beyond what it had before."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory("VmRSS")
        action()
        writer.send(memory("VmHWM") - before)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    writer.close()
    peak = reader.recv()  # EOFError: the child failed
    process.join()
    return peak


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def test_peaks(tmp_path):
    size = make_model(tmp_path / "hub")
    assert size > 110_000_000
    settings = ImportSettings(tensor_parallel_size=3)
    there = peak_of(lambda: import_model(tmp_path / "hub", tmp_path / "save", settings))
    back = peak_of(
        lambda: export_model(
            tmp_path / "save" / "global_step0", tmp_path / "again", ExportSettings()
        )
    )
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "hub" / "model.safetensors").read_bytes()
    assert there < 0.7 * size
    assert back < 0.7 * size
