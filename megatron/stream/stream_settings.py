"""What the configuration says about data, by NeoX's names, and which files it names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from megatron.base.errors import ConfigError, DatasetError
from megatron.stream.identity import DatasetIdentity, Record, identify

__all__ = ["DatasetFiles", "Split", "StreamSettings", "dataset_files", "identify_datasets"]

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class DatasetFiles:
    """Where a dataset lies, with what its samples are read from too."""

    prefix: str  # path without .bin and .idx
    label: str | None = None  # prefix of a parallel dataset of labels

    @property
    def companions(self) -> tuple[tuple[str, str], ...]:
        """(role, prefix) of all but the dataset itself."""
        return () if self.label is None else (("label", self.label),)


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The data keys of the configuration, by NeoX's names."""

    seq_length: int  # tokens a sample consumes
    seed: int
    data_path: str | None = None  # one dataset, divided by ``split``; or else the paths below
    split: str = "969, 30, 1"
    train_data_paths: tuple[str, ...] = ()
    valid_data_paths: tuple[str, ...] = ()
    test_data_paths: tuple[str, ...] = ()
    train_label_data_paths: tuple[str, ...] = ()  # one per dataset, or none
    valid_label_data_paths: tuple[str, ...] = ()
    test_label_data_paths: tuple[str, ...] = ()
    train_data_weights: tuple[float, ...] | None = None  # None: equal
    valid_data_weights: tuple[float, ...] | None = None
    test_data_weights: tuple[float, ...] | None = None
    weight_by_num_documents: bool = False
    weighted_sampler_alpha: float = 1.0
    pack_impl: str = "packed"
    allow_chopped: bool = True  # for packed data only a part of cache file names
    data_order: str = "shuffled"
    data_impl: str = "infer"
    mmap_warmup: bool = False
    train_epochs: int | None = None

    @property
    def packing(self) -> str:
        """How documents become samples: NeoX's pack_impl, or ``sequential``."""
        return "sequential" if self.data_order == "sequential" else self.pack_impl

    def require_consistent(self) -> None:
        """Check the keys against each other.

        Raises:
            ConfigError: they contradict each other, or ask for what cannot be read.
        """
        problems = [*self._path_problems(), *self._packing_problems()]
        if self.data_impl not in ("infer", "mmap"):
            problems.append(
                f"data_impl={self.data_impl}: the legacy format cannot be read; use mmap or infer"
            )
        if self.train_epochs is not None:
            problems += self._epoch_problems()
        if problems:
            raise ConfigError(*problems)

    def _path_problems(self) -> list[str]:
        problems = []
        by_paths = (self.train_data_paths, self.valid_data_paths, self.test_data_paths)
        if (self.data_path is None) == (not any(by_paths)):
            problems.append(
                "give either data_path or train_data_paths (with valid and test), not both"
            )
        for split in SPLITS:
            paths, labels = _paths(self, split), _label_paths(self, split)
            if labels and self.data_path is not None:
                problems.append(f"{split}_label_data_paths needs {split}_data_paths, not data_path")
            elif labels and len(labels) != len(paths):
                problems.append(
                    f"{split}_label_data_paths has {len(labels)} paths for {len(paths)} datasets"
                )
        return problems

    def _packing_problems(self) -> list[str]:
        problems = []
        if self.pack_impl not in ("packed", "unpacked", "pack_until_overflow"):
            problems.append(
                f"pack_impl={self.pack_impl} is not known; it is packed, unpacked or "
                "pack_until_overflow"
            )
        if self.data_order not in ("shuffled", "sequential"):
            problems.append(
                f"data_order={self.data_order} is not known; it is shuffled or sequential"
            )
        elif self.data_order == "sequential" and self.pack_impl != "packed":
            problems.append(
                f"data_order: sequential reads rows as they are; leave out pack_impl="
                f"{self.pack_impl}"
            )
        return problems

    def _epoch_problems(self) -> list[str]:
        problems = []
        if self.weight_by_num_documents:
            problems.append("train_epochs does not go together with weight_by_num_documents")
        if self.pack_impl != "packed":
            problems.append(
                f"train_epochs needs packed samples, got pack_impl={self.pack_impl}; say in "
                "train_iters how many steps to take"
            )
        if any(weight != 1.0 for weight in self.train_data_weights or ()):
            problems.append(
                f"train_epochs needs equal weights, got train_data_weights="
                f"{list(self.train_data_weights or ())}; leave them out"
            )
        return problems


def dataset_files(settings: StreamSettings) -> dict[Split, tuple[DatasetFiles, ...]]:
    """Return the datasets of each split; with ``data_path`` the same one for all."""
    if settings.data_path is not None:
        single = (DatasetFiles(settings.data_path),)
        return dict.fromkeys(SPLITS, single)
    return {
        split: tuple(
            DatasetFiles(path, label)
            for path, label in zip(
                _paths(settings, split),
                _label_paths(settings, split) or (None,) * len(_paths(settings, split)),
                strict=True,
            )
        )
        for split in SPLITS
    }


def identify_datasets(
    settings: StreamSettings,
    *,
    records: Mapping[str, Record] = MappingProxyType({}),
    full: bool = False,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> dict[DatasetFiles, DatasetIdentity]:
    """Return the identity of every dataset that the configuration names.

    Args:
        settings: data keys.
        records: what the run that is continued has read, by name; a dataset keeps that name.
        full: look at every byte, however large a dataset.
        on_bytes: told how many bytes were hashed.

    Raises:
        ConfigError: keys that contradict each other.
        DatasetError: a dataset cannot be read, or not told from another one.
    """
    settings.require_consistent()
    wanted = {files for group in dataset_files(settings).values() for files in group}
    identities = {
        files: identify(files.prefix, files.companions, full=full, on_bytes=on_bytes).named_by(
            records
        )
        for files in sorted(wanted, key=lambda files: (files.prefix, files.label or ""))
    }
    _require_distinct(identities)
    return identities


def _require_distinct(identities: Mapping[DatasetFiles, DatasetIdentity]) -> None:
    """Check that no two datasets have one name only because shards of them are missing."""
    named: dict[str, DatasetFiles] = {}
    for files, identity in identities.items():
        other = named.setdefault(identity.digest, files)
        if "index" not in (identity.level, identities[other].level):
            continue
        if Path(other.prefix).resolve() != Path(files.prefix).resolve():
            raise DatasetError(
                f"{other.prefix} and {files.prefix} have equal document sizes, and with shards "
                "missing they can't be told apart. Get all shards of one of them, or name one "
                "dataset by one path"
            )


def _paths(settings: StreamSettings, split: Split) -> tuple[str, ...]:
    paths: tuple[str, ...] = getattr(settings, f"{split}_data_paths")
    return paths


def _label_paths(settings: StreamSettings, split: Split) -> tuple[str, ...]:
    paths: tuple[str, ...] = getattr(settings, f"{split}_label_data_paths")
    return paths
