"""Our reader and writer of safetensors against the library's."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import CheckpointError
from megatron.checkpoint.hugging_face.safetensors_file import (
    DTYPE_NAMES,
    SafetensorsFile,
    write_safetensors,
)
from megatron.checkpoint.reshape.streamed_file import StreamedTensor

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text('abc.019é"\\', min_size=1, max_size=8)


def tensor_of(dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, shape, generator=generator)
    return (values.abs() if dtype == torch.uint8 else values).to(dtype)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from([*DTYPE_NAMES]), SHAPES), max_size=6))
def test_files_are_the_library_s(tmp_path_factory, described):
    folder = tmp_path_factory.mktemp("files")
    tensors = {
        name: tensor_of(dtype, shape, seed)
        for seed, (name, (dtype, shape)) in enumerate(described.items())
    }
    safetensors.torch.save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    found = SafetensorsFile(folder / "theirs")
    assert sorted(found.names) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found.tensor(name).dtype == tensor.dtype
        assert torch.equal(found.tensor(name), tensor)
    size = write_safetensors(
        folder / "ours",
        {
            name: StreamedTensor.of(tensor.shape, tensor.dtype, lambda tensor=tensor: tensor)
            for name, tensor in tensors.items()
        },
    )
    read = safetensors.torch.load_file(folder / "ours")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert size == (folder / "ours").stat().st_size
    if len({dtype.itemsize for dtype, _ in described.values()}) == len(
        {dtype for dtype, _ in described.values()}
    ):  # the library has an order of its own among types of one size
        assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, stop, dtype="F16", shape=None):
    shape = [(stop - start) // 2] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BAD = {
    "too short": (b"\x01\x00", "too short to have a header"),
    "cut in the header": (file_of({"a": entry(0, 4)}, b"", length=1 << 20), "header would have"),
    "a header without end": (file_of(b"{}", length=1 << 60), "its header would have 11529"),
    "cut": (file_of({"a": entry(0, 4)}, b"12"), "describes .* bytes: it is cut"),
    "longer": (file_of({"a": entry(0, 4)}, b"123456"), "describes .* bytes: it is cut"),
    "overlap": (
        file_of({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
        "b begins at byte 2 of the data, not at 4",
    ),
    "gap": (
        file_of({"a": entry(0, 4), "b": entry(6, 8)}, b"12345678"),
        "b begins at byte 6 of the data, not at 4",
    ),
    "another size": (file_of({"a": entry(0, 4, shape=[3])}, b"1234"), r"a, F16 \[3\], has 4 bytes"),
    "a negative shape": (file_of({"a": entry(0, 4, shape=[-1, -2])}, b"1234"), "has the shape"),
    "a type": (file_of({"a": entry(0, 4, "F7")}, b"1234"), "a is of the unknown type F7"),
    "a name twice": (file_of(b'{"a": {}, "a": {}}'), "names a tensor twice"),
    "no object": (file_of([1, 2]), "no whole safetensors file"),
    "no JSON": (file_of(b"{"), "no whole safetensors file"),
    "deep": (file_of(b"[" * 100_000), "no whole safetensors file"),
    "no entry": (file_of({"a": 3}), "no whole safetensors file"),
    "bytes": (file_of(b"\xff\xfe"), "no whole safetensors file"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused(name, tmp_path):
    data, message = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path} .*{message}"):
        SafetensorsFile(path)


def test_unaligned_tensors_are_read(tmp_path):
    header = {"a": entry(0, 1, "U8", [1]), "b": entry(1, 9, "F32", [2])}
    path = tmp_path / "odd"
    path.write_bytes(file_of(header, b"\x07" + struct.pack("<2f", 1.5, -2)))
    assert SafetensorsFile(path).tensor("b").tolist() == [1.5, -2]


def test_what_was_let_go_is_read_again(tmp_path):
    safetensors.torch.save_file({"a": torch.arange(5000)}, tmp_path / "file")
    file = SafetensorsFile(tmp_path / "file")
    tensor = file.tensor("a")
    assert int(tensor.sum()) == 12497500
    file.release()
    assert int(tensor.sum()) == 12497500


def test_tensors_of_another_size_than_announced_are_not_written(tmp_path):
    tensor = StreamedTensor((4,), torch.float32, lambda: [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"a, of shape \(4,\), was given 3 elements"):
        write_safetensors(tmp_path / "file", {"a": tensor})
    with pytest.raises(CheckpointError, match="could not be written"):
        write_safetensors(tmp_path / "none" / "file", {"a": tensor})
