"""Is a tokenised data set the released one? Its ``.idx`` tells: the sizes of all documents."""

from collections.abc import Iterator
from pathlib import Path

from megatron.base.errors import DatasetError
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.models import ReleasedModel
from megatron.cli.pythia.sha256 import sha256_of
from megatron.stream.index_file import read_index

__all__ = ["RELEASED_INDEXES", "check_index"]

RELEASED_INDEXES = {
    "pile_0.87_deduped_text_document": (
        "a659c5a57fa772fb6d3582c6e0b3a55c0c43b16ee8ea72ac6a70cebcdd35d669",
        "the repository's utils/shard_hashes.txt",
    ),
    "pile_20B_tokenizer_text_document": ("d0119215", "a third party; only the digest's begin"),
}
"""Prefix's last part -> beginning of the SHA-256 of its ``.idx``, and who says so (pythia.md §1.1).
"""

_PRESHUFFLED_ROWS = 146_432_000  # 143,000 steps of 1,024
_ROW = 2049


def check_index(prefix: str, model: ReleasedModel) -> Iterator[Finding]:
    """Compare ``prefix``.idx with the released one of the model's data set.

    Args:
        prefix: of the data set, wherever it lies and whatever it is called now.
        model: its configuration names the set.
    """
    path = Path(f"{prefix}.idx")
    names = model.config.training.train_data_paths or [model.config.training.data_path or ""]
    try:
        index = read_index(path)
    except (DatasetError, OSError) as error:
        yield Finding("unknown", f"{path} cannot be read: {error}")
        return
    if len(index.sizes) == _PRESHUFFLED_ROWS and bool((index.sizes == _ROW).all()):
        yield Finding(
            "note",
            f"{path} is a preshuffled set's, one sample a row: whether of the standard or the "
            "deduplicated Pile its sizes can't tell. Use data_order: sequential",
        )
        return
    known = RELEASED_INDEXES.get(Path(names[0]).name)
    if known is None:
        yield Finding("note", f"no digest of {names[0]}.idx was published to compare {path} with")
        return
    found = sha256_of(path)
    digest, source = known
    if found.startswith(digest):
        yield Finding("note", f"{path} is the released one: SHA-256 {found[:16]}…", source)
        return
    other = next(
        (name for name, (begin, _) in RELEASED_INDEXES.items() if found.startswith(begin)), None
    )
    yield Finding(
        "wrong",
        f"{path} has SHA-256 {found[:16]}…, the released {Path(names[0]).name}.idx {digest[:16]}…"
        + (f": it is {other}'s" if other else ": it is another data set's")
        + f"; {len(index.sizes):,} documents, {int(index.sizes.sum(dtype='int64')):,} tokens",
        source,
    )
