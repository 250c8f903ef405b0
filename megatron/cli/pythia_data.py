"""What Pythia read, from its data set alone: the configuration of a released run. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.base.errors import ConfigError
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.sequential_order import has_rows_alone

__all__ = ["ONE_PROCESS", "PYTHIA_DATA", "config_of_pythia", "config_with_data"]

_CONFIGS = Path(__file__).parents[2] / "configs" / "pythia"
_RELEASED_SEED = 1234  # of the preshuffled sets
ONE_PROCESS: Mapping[str, object] = {
    "num_gpus": 1,
    "global_num_gpus": None,
    "hostfile": None,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": None,
    "load": None,
    "save": None,
}
"""How a run is divided acts on none of its samples."""

_PRESHUFFLED_TOKENS = (146_432_000 * 2049,) * 2
_TOKENS = {
    "standard": (332_115_325_534,) * 2,
    "deduped": (205_000_000_000, 207_500_000_000),  # between 82 and 83 shards of 5 GB
}
"""Of the released sets, least and most (pythia.md §1.1, 1.3)."""

PYTHIA_DATA = ("standard", "deduped", *(f"seed{number}" for number in range(1, 10)))
"""The orders Pythia's models were trained in; those of other seeds are of the standard set."""


def config_of_pythia(name: str, prefix: str | None) -> RunConfig:
    """Return the configuration of a model that read the data called ``name``.

    All sizes read the same; this is the smallest's.

    Args:
        name: one of PYTHIA_DATA.
        prefix: where the data set lies; None: where configs/pythia looks for it.

    Raises:
        ConfigError: what lies there is of another size.
        DatasetError: nothing lies there.
    """
    kind = "deduped" if name == "deduped" else "standard"
    files = [_CONFIGS / ("70M-deduped.yml" if kind == "deduped" else "70M.yml")]
    if name.startswith("seed"):
        files.append(_CONFIGS / f"{name}.yml")
    config = config_with_data(files, prefix)
    (where,) = config.training.train_data_paths or [""]
    dataset = IndexedDataset(where)
    tokens = dataset.index.size_bytes // dataset.dtype.itemsize
    is_rows = config.get("data_order") == "sequential"
    low, high = _PRESHUFFLED_TOKENS if is_rows else _TOKENS[kind]
    if not low <= tokens <= high:
        raise ConfigError(
            f"{where} holds {tokens:,} tokens in {len(dataset):,} documents; Pythia's {name} set "
            f"has {f'{low:,}' if low == high else f'{low:,} to {high:,}'}. For a data set of your "
            "own name the configuration that reads it"
        )
    return config


def config_with_data(files: Sequence[Path], prefix: str | None) -> RunConfig:
    """Load configuration files for what they read, from a data set that lies elsewhere.

    Args:
        files: of a run that reads one data set.
        prefix: of its tokenised or preshuffled form, whose rows are then read in order; None:
            where the files say.

    Raises:
        ConfigError: the files cannot be used.
        DatasetError: ``prefix`` is no data set.
    """
    changes: dict[str, object] = {**ONE_PROCESS}
    plain = load_config(files, changes, local_slots=lambda: 1, environ={})
    if prefix is None:
        return plain
    for split in ("train", "valid", "test"):
        changes[f"{split}_data_paths"] = [prefix]
        changes[f"{split}_data_weights"] = None
    changes["data_path"] = None
    if has_rows_alone(IndexedDataset(prefix), plain.model.seq_length or 0):
        if plain.other.seed != _RELEASED_SEED:
            raise ConfigError(
                f"{prefix} holds one sample a row, shuffled with seed {_RELEASED_SEED}; rows of "
                f"seed {plain.other.seed} were not released: name the tokenised set"
            )
        changes["data_order"] = "sequential"
    return load_config(files, changes, local_slots=lambda: 1, environ={})
