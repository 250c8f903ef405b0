"""Real text that every machine has: the Python standard library's sources and documents.

Example:
    python tools/datasets/stdlib_corpus.py --output data/stdlib.jsonl --max-bytes 3000000

One file is one document. The same Python and size give the same corpus, byte for byte.
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import DatasetError, MegatronError

_SUFFIXES = (".py", ".txt", ".rst")  # the licence and the help topics are among them
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})


def find_library_files(library: Path) -> list[Path]:
    """Return the text files of ``library``, mixed, in an order that only their names decide.

    Mixed so that the first few megabytes show all parts of it.
    """
    files = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        inside = Path(folder).relative_to(library)
        files += [inside / name for name in names if name.endswith(_SUFFIXES)]
    return sorted(files, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest())


def documents_within(library: Path, files: Sequence[Path], max_bytes: int) -> Iterator[str]:
    """Yield the texts of ``files`` that fit, in order, ``max_bytes`` of UTF-8 in all."""
    left = max_bytes
    for file in files:
        if (library / file).stat().st_size > left:
            continue
        content = (library / file).read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:  # a few old files are not UTF-8
            continue
        if text.strip():
            left -= len(content)
            yield text


def main(input_args: Sequence[str] | None = None) -> None:
    """Write the corpus as the command line says.

    Raises:
        DatasetError: this Python has no library sources.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--max-bytes", type=int, default=3_000_000, help="text at most (default: %(default)s)"
    )
    options = parser.parse_args(input_args)
    library = Path(sysconfig.get_path("stdlib"))
    documents = list(documents_within(library, find_library_files(library), options.max_bytes))
    if not documents:
        raise DatasetError(f"no text of at most {options.max_bytes} bytes found in {library}")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, "".join(lines))
    size_bytes = sum(len(text.encode()) for text in documents)
    print(f"{options.output}: {len(documents)} documents, {size_bytes} bytes of text")


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
