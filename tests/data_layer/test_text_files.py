"""Reading documents: formats, compressions, order, and damaged files."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.data.text_files import find_text_files, iterate_documents

LINES = '{"text": "one"}\n\n"two"\n{"text": ["a", "b"], "more": 1}\n{"text": ""}\n{"text": "é"}'
DOCUMENTS = ["one", "two", "a\n\nb", "é"]


def read(*files, keys=("text",)):
    return list(iterate_documents(files, keys))


def compress(name, data):
    if name.endswith(".gz"):
        return gzip.compress(data)
    if name.endswith(".zst"):
        return zstandard.ZstdCompressor().compress(data)
    return data


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.json", "X.JSONL"])
def test_lines_are_documents_and_empty_ones_are_dropped(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(compress(name, LINES.encode()))
    assert read(file) == [(text,) for text in DOCUMENTS]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst", "README"])
def test_any_other_file_is_one_document_kept_as_it_is(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(compress(name, b"first\r\n\r\nsecond\n"))
    assert read(file) == [("first\r\n\r\nsecond\n",)]


def test_an_archive_gives_its_members_by_name(tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("b.txt", "whole\nfile")
        archive.writestr("a/", "")
        archive.writestr("a/lines.jsonl", LINES)
    assert read(file) == [*((text,) for text in DOCUMENTS), ("whole\nfile",)]


def test_a_folder_stands_for_its_text_files_sorted(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.txt.gz", "notes.md", "d.bin"):
        (tmp_path / name).touch()
    (tmp_path / "sub.txt").mkdir()
    alone = tmp_path / "d.bin"
    found = find_text_files([alone, tmp_path])
    assert [file.name for file in found] == ["d.bin", "a.jsonl", "b.txt", "c.txt.gz"]


def test_each_key_has_its_own_text(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"q": "why", "a": "so"}\n{"q": "", "a": "yes"}\n{"q": "", "a": ""}\n')
    assert read(file, keys=("a", "q")) == [("so", "why"), ("yes", "")]


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_joined_zstd_frames_are_read_to_the_end(tmp_path_factory, frames):
    file = tmp_path_factory.mktemp("zst") / "x.jsonl.zst"
    lines = [json.dumps(frame.hex()).encode() + b"\n" for frame in frames]
    file.write_bytes(b"".join(compress("x.zst", line) for line in lines))
    assert read(file) == [(frame.hex(),) for frame in frames if frame]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_cut_off_file_is_an_error_not_a_shorter_text(tmp_path, name, kept):
    whole = compress(name, b"".join(b'"%d"\n' % (n * 2654435761) for n in range(60_000)))
    file = tmp_path / name
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DatasetError, match=rf"{name}: cannot be read as text"):
        read(file)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl.gz", "x.jsonl.zst", "x.zip"])
def test_bytes_that_are_no_text_name_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01garbage" * 5)
    with pytest.raises(DatasetError, match=rf"{name}: cannot be read as text"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"x.jsonl:2: not a line of JSON"),
        ("[1]", r"x.jsonl:2: expected an object or a string, got a list"),
        ('{"body": "a", "id": 1}', r"x.jsonl:2: the object has no key 'text'; it has .*body.*id"),
        ('{"text": 5}', r"x.jsonl:2: 'text' must be a string or a list of strings, got int"),
        ('{"text": ["a", 1]}', r"x.jsonl:2: 'text' must be a string or a list"),
        ('{"text": "\\ud800"}', r"x.jsonl:2: not valid Unicode text"),
    ],
)
def test_a_line_that_gives_no_text_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DatasetError, match=message):
        read(tmp_path / "x.jsonl")


def test_missing_and_empty_inputs_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"input file .*absent.jsonl does not exist"):
        find_text_files([tmp_path / "absent.jsonl"])
    with pytest.raises(DatasetError, match=r"no text file in the folder .*; looked for \*.jsonl"):
        find_text_files([Path(tmp_path)])
