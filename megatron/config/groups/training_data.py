"""Training keys: which data, and how samples are made of it."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import WORKS, key, only

__all__ = ["TrainingData"]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Datasets by prefix (``PREFIX.bin`` and ``PREFIX.idx``), their weights, and packing."""

    data_path: str | None = key(None, outcome=WORKS)
    """One dataset, cut into training, validation and test part by ``split``. Excludes the three
    lists of paths."""

    use_shared_fs: bool | None = key(True, tier=2, outcome=WORKS)
    """All hosts see the same files, so that one process writes the index maps for all. False: one
    process per host does."""

    train_data_paths: list[str] | None = key(None, outcome=WORKS)
    """Training datasets. The three lists are given together or not at all."""

    train_label_data_paths: list[str] | None = key(None, tier=2, outcome=WORKS)
    """Label datasets, one per training dataset: of the same sizes, each label where its token is;
    a negative one is not learned. Given for training, validation and test, or for none."""

    test_data_paths: list[str] | None = key(None, outcome=WORKS)
    """Test datasets."""

    test_label_data_paths: list[str] | None = key(None, tier=2, outcome=WORKS)
    """Label datasets, one per test dataset."""

    valid_data_paths: list[str] | None = key(None, outcome=WORKS)
    """Validation datasets."""

    valid_label_data_paths: list[str] | None = key(None, tier=2, outcome=WORKS)
    """Label datasets, one per validation dataset."""

    train_data_weights: list[float] | None = key(None, outcome=WORKS)
    """How often each training dataset is drawn from, relative to the others. Unset: equally."""

    valid_data_weights: list[float] | None = key(None, outcome=WORKS)
    """The same for validation."""

    test_data_weights: list[float] | None = key(None, outcome=WORKS)
    """The same for test."""

    weight_by_num_documents: bool | None = key(False, outcome=WORKS)
    """Work the weights out from the number of documents; written weights are then ignored."""

    weighted_sampler_alpha: float | None = key(1.0, minimum=0, outcome=WORKS)
    """With ``weight_by_num_documents``: weights are document shares to this power, so that 1 is
    proportional and 0 even."""

    data_impl: Literal["infer", "mmap", "cached"] | None = key(
        "infer", outcome=only("infer", "mmap", advice="use mmap, and make the files with it")
    )
    """Format of the datasets: memory-mapped, or looked up in the file's first bytes."""

    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] | None = key(
        "packed", tier=2, outcome=WORKS
    )
    """How documents become samples: ``packed`` cuts their concatenation into equal pieces,
    ``pack_until_overflow`` keeps documents whole and pads, ``unpacked`` gives each its own."""

    allow_chopped: bool | None = key(True, tier=2, outcome=WORKS)
    """When not packed, also use documents that don't fit into a sample. When packed it only names
    the index maps."""

    mmap_warmup: bool | None = key(False, tier=2, outcome=WORKS)
    """Read the files once before mapping them, so that they are in the page cache."""

    split: str | None = key("969, 30, 1", outcome=WORKS)
    """Shares of training, validation and test documents of ``data_path``."""

    vocab_file: str | None = key(None, outcome=WORKS)
    """The tokenizer's file, or tiktoken's name of an encoding."""

    merge_file: str | None = key(None, outcome=WORKS)
    """Merges of GPT-2's tokenizer."""

    num_workers: int | None = key(2, unit="threads", minimum=0, outcome=WORKS)
    """Threads that read ahead; 0 reads when a batch is asked for. The samples are the same."""
