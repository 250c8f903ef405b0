"""Configurations that the tests of this folder start from."""

from pathlib import Path
from typing import Any

from megatron.config.load import RunConfig, load_config

DATA = Path(__file__).parents[1] / "data" / "config"

# the least NeoX accepts, but for the batch size and the number of ranks
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
}


def no_slots() -> int:
    """The machine must not be asked."""
    raise AssertionError("local_slots was asked")


def load(**keys: Any) -> RunConfig:
    """Load MODEL with ``keys`` on top, on 4 ranks with micro batch 1 unless they say otherwise."""
    values = {**MODEL, "global_num_gpus": 4, "train_micro_batch_size_per_gpu": 1, **keys}
    return load_config([], values, local_slots=no_slots, environ={})


def trainable(**keys: Any) -> dict[str, Any]:
    """Return ``keys`` with what training needs besides a model."""
    return {
        "pos_emb": "rotary",
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
        "train_iters": 10,
        "data_path": "data/text_document",
        **keys,
    }
