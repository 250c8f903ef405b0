"""Documents of text files, in a fixed order: .jsonl and .txt, plain or compressed, and folders.

A line of a .jsonl file is an object (its text under a key) or a string; lists of paragraphs are
joined by an empty line. Any other text file is one document, whole. Documents without text are
dropped, as NeoX's reader does.
"""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron.base.errors import DatasetError

__all__ = ["TEXT_SUFFIXES", "find_text_files", "iterate_documents"]

_LINE_SUFFIXES = (".jsonl", ".json")
_WHOLE_SUFFIXES = (".txt",)
_COMPRESSIONS = ("", ".gz", ".zst")
TEXT_SUFFIXES: tuple[str, ...] = (
    *(kind + packed for kind in (*_LINE_SUFFIXES, *_WHOLE_SUFFIXES) for packed in _COMPRESSIONS),
    ".zip",
)

_PARAGRAPH_JOINER = "\n\n"


def find_text_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files ``paths`` name; a folder stands for the text files in it, sorted by name.

    Raises:
        DatasetError: a path does not exist, or a folder holds no text file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.iterdir() if file.is_file() and _is_text_name(file.name)
            )
            if not inside:
                raise DatasetError(
                    f"no text file in the folder {path}; looked for *{', *'.join(TEXT_SUFFIXES)}"
                )
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise DatasetError(f"input file {path} does not exist (looked in {Path.cwd()})")
    return files


def iterate_documents(
    files: Sequence[Path], keys: Sequence[str] = ("text",)
) -> Iterator[tuple[str, ...]]:
    """Yield one document at a time: its text under each of ``keys``.

    Documents whose texts are all empty are dropped. A file without keys (.txt, a .jsonl line that
    is a bare string) gives the same text for each of ``keys``.

    Raises:
        DatasetError: a line is not JSON or lacks a key; a file is damaged or not UTF-8.
    """
    for file in files:
        try:
            for document in _documents_of(file, keys):
                if any(document):
                    yield document
        except (EOFError, OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
            raise DatasetError(f"{file}: cannot be read as text: {error}") from error


def _is_text_name(name: str) -> bool:
    return name.lower().endswith(TEXT_SUFFIXES)


def _documents_of(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    if file.suffix.lower() == ".zip":
        yield from _documents_of_archive(file, keys)
        return
    with _open_decompressed(file) as raw:
        yield from _documents_of_stream(raw, file.name, str(file), keys)


def _documents_of_archive(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    with zipfile.ZipFile(file) as archive:
        for member in sorted(name for name in archive.namelist() if not name.endswith("/")):
            with archive.open(member) as raw:
                yield from _documents_of_stream(raw, member, f"{file}:{member}", keys)


def _documents_of_stream(
    raw: IO[bytes], name: str, where: str, keys: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    lowered = name.lower()
    for packed in _COMPRESSIONS[1:]:
        lowered = lowered.removesuffix(packed)
    # newline="\n" keeps "\r\n" inside whole-file documents as it is.
    with io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as text:
        if not lowered.endswith(_LINE_SUFFIXES):
            yield (text.read(),) * len(keys)
            return
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield _texts_of_line(line, f"{where}:{number}", keys)


def _texts_of_line(line: str, where: str, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not a line of JSON: {error}") from error
    if isinstance(value, str):
        texts = (value,) * len(keys)
    elif isinstance(value, dict):
        texts = tuple(_text_under(key, value, where) for key in keys)
    else:
        raise DatasetError(f"{where}: expected an object or a string, got a {type(value).__name__}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise DatasetError(f"{where}: not valid Unicode text: {error}") from error
    return texts


def _text_under(key: str, value: dict[str, Any], where: str) -> str:
    if key not in value:
        raise DatasetError(f"{where}: the object has no key {key!r}; it has {sorted(value)}")
    text = value[key]
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = _PARAGRAPH_JOINER.join(text)
    if not isinstance(text, str):
        raise DatasetError(
            f"{where}: {key!r} must be a string or a list of strings, got {type(text).__name__}"
        )
    return text


@contextmanager
def _open_decompressed(file: Path) -> Iterator[IO[bytes]]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        with gzip.open(file) as raw:
            yield raw
    elif suffix == ".zst":
        with file.open("rb") as compressed, io.BufferedReader(_ZstdFrames(compressed)) as raw:
            yield raw
    else:
        with file.open("rb") as raw:
            yield raw


class _ZstdFrames(io.RawIOBase):
    """Decompressed bytes of a .zst file; a truncated one is an error, not a shorter text.

    (zstandard's own stream reader takes the end of a cut-off file for the end of the data.)
    """

    def __init__(self, compressed: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DatasetError(
                "reading .zst files needs the package zstandard: `pip install zstandard`"
            ) from error
        self._damaged = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._compressed = compressed
        self._ready = memoryview(b"")
        self._frame_is_open = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data or self._compressed.read(1 << 16)
            if not chunk:
                if self._frame_is_open:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()  # files joined by `cat` have several frames
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._damaged as error:
                raise OSError(f"damaged zstd data: {error}") from error
            self._frame_is_open = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
