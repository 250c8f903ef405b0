"""Named corpora: download one and tokenize it. `prepare_data.py` is its command line.

Of NeoX's names only enwik8 works so far; for the others tokenize your own copy with
`tools/datasets/preprocess_data.py`.
"""

import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import ConfigError, DatasetError
from tools.datasets import preprocess_data

__all__ = ["CORPORA", "NAMES_WITHOUT_SOURCE", "Corpus", "download", "prepare_dataset"]


@dataclass(frozen=True)
class Corpus:
    """A corpus that can be fetched; its files go to ``<data_dir>/<name>/``."""

    name: str
    urls: tuple[str, ...]


CORPORA = {
    corpus.name: corpus for corpus in (Corpus("enwik8", ("http://mattmahoney.net/dc/enwik8.zip",)),)
}

NAMES_WITHOUT_SOURCE = (
    "enron",
    "pile_subset",
    "pile",
    "github",
    "arxiv",
    "europarl",
    "freelaw",
    "nih",
    "pubmed",
    "books1",
    "books3",
    "hackernews",
    "openwebtext2",
    "stackexchange",
    "ubuntu_irc",
    "youtube_subtitles",
    "c4",
    "c4_openwebtext",
)

_GPT2_TYPE = "GPT2BPETokenizer"
_GPT2_SOURCE = "https://s3.amazonaws.com/models.huggingface.co/bert"
_GPT2_VOCABULARY = "gpt2-vocab.json"
_GPT2_MERGES = "gpt2-merges.txt"


def prepare_dataset(
    dataset_name: str,
    tokenizer_type: str = _GPT2_TYPE,
    data_dir: str | os.PathLike[str] | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    force_redownload: bool = False,
    num_workers: int = 1,
) -> Path:
    """Download a corpus, unless its files are there, and tokenize it; return the dataset's prefix.

    Args:
        dataset_name: one of :data:`CORPORA`.
        data_dir: where everything goes; by default $DATA_DIR, else ./data.
        vocab_file: by default GPT-2's, downloaded too; other tokenizer types need their own.

    Raises:
        ConfigError: the name is unknown or has no source here; the tokenizer cannot be built.
        DatasetError: a download failed.
    """
    if dataset_name in NAMES_WITHOUT_SOURCE:
        raise ConfigError(
            f"the dataset {dataset_name} is known to NeoX, not supported here yet: download it "
            "yourself and run tools/datasets/preprocess_data.py"
        )
    if dataset_name not in CORPORA:
        raise ConfigError(
            f"unknown dataset {dataset_name!r}; choose one of {', '.join(sorted(CORPORA))}"
        )
    corpus = CORPORA[dataset_name]
    root = Path(data_dir or os.environ.get("DATA_DIR") or "data")
    folder = root / corpus.name
    files = [
        download(url, folder / url.rpartition("/")[2], force=force_redownload)
        for url in corpus.urls
    ]
    if tokenizer_type.lower() == _GPT2_TYPE.lower():
        vocab_file = vocab_file or str(_gpt2_file(root, _GPT2_VOCABULARY))
        merge_file = merge_file or str(_gpt2_file(root, _GPT2_MERGES))
    prefix = folder / corpus.name
    command = [
        "--input", ",".join(map(str, files)),
        "--output-prefix", str(prefix),
        "--tokenizer-type", tokenizer_type,
        "--append-eod",
        "--workers", str(num_workers),
    ]  # fmt: skip
    command += ["--vocab-file", vocab_file] if vocab_file else []
    command += ["--merge-file", merge_file] if merge_file else []
    preprocess_data.main(command)
    return Path(f"{prefix}_text_document")


def download(url: str, path: Path, *, force: bool = False) -> Path:
    """Fetch ``url`` to ``path``, whole or not at all; return ``path``.

    A file that is there already is kept unless ``force``.

    Raises:
        DatasetError: the download failed.
    """
    if path.exists() and not force:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url} to {path}", flush=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=60) as source:
            shutil.copyfileobj(source, file)
        os.replace(temporary, path)
    except (OSError, urllib.error.ContentTooShortError) as error:
        raise DatasetError(
            f"cannot download {url}: {error}. Put the file at {path} yourself and run again"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _gpt2_file(root: Path, name: str) -> Path:
    return download(f"{_GPT2_SOURCE}/{name}", root / name)
