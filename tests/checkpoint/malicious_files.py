"""Files that try to run code, to fill the memory, or to be read in two ways.

Every writer gets the path to write to and the path of a canary: a file that exists only if
something of the attack ran. Each comes with the message both readers must refuse it with.
"""

import builtins
import io
import operator
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler


class Reduce:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class State:
    """Pickled as a call, followed by a state."""

    def __init__(self, function: Callable[..., Any], arguments: Any, state: Any) -> None:
        self.call = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


@dataclass(frozen=True)
class Attack:
    write: Callable[[Path, Path], None]
    message: str  # a pattern


REFUSED = r"is refused: it names {}, which no checkpoint needs"
DAMAGED = r"\(\d+ bytes\) cannot be read; it is truncated, damaged, .*: {}"


def saved(content: Callable[[Path], Any], **options: Any) -> Callable[[Path, Path], None]:
    return lambda path, canary: torch.save(content(canary), path, **options)


def archive(
    pickled: Callable[[Path], bytes],
    *more: tuple[str, bytes],
    compression: int = zipfile.ZIP_STORED,
) -> Callable[[Path, Path], None]:
    def write(path: Path, canary: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("archive/data.pkl", pickled(canary))
            file.writestr("archive/version", "3\n")
            for name, data in more:
                file.writestr(name, data)

    return write


def evil_pickle(canary: Path) -> bytes:
    return pickle.dumps({"w": Reduce(os.system, f"touch {canary}")}, protocol=2)


def assembled(*pieces: Any) -> Callable[[Path], bytes]:
    """Put a pickle together by hand; texts become its strings."""

    def pickled(canary: Path) -> bytes:
        result = b"\x80\x02"
        for piece in pieces:
            if isinstance(piece, str):
                data = piece.format(canary=canary).encode()
                piece = b"X" + struct.pack("<I", len(data)) + data
            result += piece
        return result + b"."

    return pickled


def tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = evil_pickle(canary)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def two_pickles(path: Path, canary: Path) -> None:
    """The first is harmless: readers disagree about which one counts."""
    harmless = pickle.dumps({"w": 1}, protocol=2)
    archive(lambda _: harmless, ("archive/data.pkl", evil_pickle(canary)))(path, canary)


def second_archive_behind(path: Path, canary: Path) -> None:
    archive(evil_pickle)(path, canary)
    torch.save({"w": 1}, path.with_name("harmless"))
    path.write_bytes(path.read_bytes() + path.with_name("harmless").read_bytes())
    path.with_name("harmless").unlink()


def script(path: Path, canary: Path) -> None:
    class Adds(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.script(Adds()).save(str(path))


def storage_of(numel: int, *, is_stored: bool) -> Callable[[Path, Path], None]:
    pickled = assembled(
        b"}", "w", b"ctorch._utils\n_rebuild_tensor_v2\n((", "storage", b"ctorch\nFloatStorage\n",
        "0", "cpu", b"\x8a\x06" + numel.to_bytes(6, "little"), b"tQK\x00K\x04\x85K\x01\x85\x89",
        b"ccollections\nOrderedDict\n)Rt", b"Rs",
    )  # fmt: skip
    parts = [("archive/data/0", b"\0" * 16)] if is_stored else []
    return archive(pickled, *parts)


def huge_claim(path: Path, canary: Path) -> None:
    """A part that says it has an exabyte."""
    torch.save({"w": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = b"\xf0\xff\xff\xff\xf0\xff\xff\xff"
    path.write_bytes(bytes(data))


def array_of(code: str, shape: tuple[int, ...], data: bytes) -> Any:
    reconstruct = np.ndarray(0).__reduce__()[0]
    return State(
        reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(code), False, data)
    )  # fmt: skip


def scaler_with(**attributes: Any) -> LossScaler:
    scaler = LossScaler(1.0)
    vars(scaler).update(attributes)
    return scaler


def zero_file(canary: Path) -> Any:
    return {
        "optimizer_state_dict": {
            "loss_scaler": scaler_with(cur_scale=Reduce(os.system, f"touch {canary}")),
            "single_partition_of_fp32_groups": [torch.zeros(4)],
        },
        "ds_version": "0.16.5",
    }


class HasHooks(torch.Tensor):
    def __reduce_ex__(self, protocol: int) -> Any:
        hooks = OrderedDict(a=1)
        return torch._utils._rebuild_tensor_v2, (
            torch.zeros(4)._typed_storage(), 0, (4,), (1,), False, hooks,
        )  # fmt: skip


ATTACKS = {
    "os.system": Attack(
        saved(lambda canary: {"w": Reduce(os.system, f"touch {canary}")}),
        REFUSED.format(r"posix\.system"),
    ),
    "os.system in an old file": Attack(
        saved(
            lambda canary: {"w": Reduce(os.system, f"touch {canary}")},
            _use_new_zipfile_serialization=False,
        ),
        REFUSED.format(r"posix\.system"),
    ),
    "a bare pickle": Attack(
        lambda path, canary: path.write_bytes(evil_pickle(canary)),
        DAMAGED.format("it begins like none of torch's"),
    ),
    "subprocess": Attack(
        saved(lambda canary: {"w": Reduce(subprocess.Popen, ["touch", str(canary)])}),
        REFUSED.format(r"subprocess\.Popen"),
    ),
    "builtins.eval": Attack(
        saved(lambda canary: {"w": Reduce(builtins.eval, f"open({str(canary)!r}, 'w')")}),
        REFUSED.format(r"builtins\.eval"),
    ),
    "builtins.exec": Attack(
        saved(lambda canary: {"w": Reduce(builtins.exec, f"open({str(canary)!r}, 'w')")}),
        REFUSED.format(r"builtins\.exec"),
    ),
    "builtins.getattr": Attack(
        saved(
            lambda canary: (
                {"w": Reduce(getattr, os, "system")} if False else {"w": Reduce(getattr, 1, "real")}
            )
        ),
        REFUSED.format(r"builtins\.getattr"),
    ),
    "open": Attack(
        saved(lambda canary: {"w": Reduce(open, str(canary), "w")}),
        REFUSED.format(r"io\.open"),
    ),
    "operator.methodcaller": Attack(
        saved(lambda canary: {"w": Reduce(operator.methodcaller, "touch")}),
        REFUSED.format(r"operator\.methodcaller"),
    ),
    "deep inside of lists and dictionaries": Attack(
        saved(lambda canary: {"a": [{"b": ({"c": [Reduce(os.system, f"touch {canary}")]},)}]}),
        REFUSED.format(r"posix\.system"),
    ),
    "as a key": Attack(
        saved(lambda canary: {"a": {Reduce(os.system, f"touch {canary}"): 1}}),
        REFUSED.format(r"posix\.system"),
    ),
    "torch's own pickle inside of a pickle": Attack(
        saved(lambda canary: {"w": Reduce(torch.storage._load_from_bytes, evil_pickle(canary))}),
        REFUSED.format(r"torch\.storage\._load_from_bytes"),
    ),
    "pickle.loads": Attack(
        saved(lambda canary: {"w": Reduce(pickle.loads, evil_pickle(canary))}),
        REFUSED.format(r"pickle\.loads"),
    ),
    "a class of ours": Attack(
        saved(lambda canary: {"w": Path(canary)}),
        REFUSED.format(r"pathlib\.PosixPath"),
    ),
    "a module": Attack(
        saved(lambda canary: torch.nn.Linear(2, 2)),
        REFUSED.format(r"torch\.nn\.modules\.linear\.Linear"),
    ),
    "INST": Attack(
        archive(assembled(b"(", "touch {canary}", b"ios\nsystem\n")),
        DAMAGED.format("it uses the instruction INST, which torch does not write"),
    ),
    "OBJ": Attack(
        archive(assembled(b"(cos\nsystem\n", "touch {canary}", b"o")),
        REFUSED.format(r"os\.system"),
    ),
    "STACK_GLOBAL": Attack(
        archive(assembled("os", "system", b"\x93", "touch {canary}", b"\x85R")),
        DAMAGED.format("it uses the instruction STACK_GLOBAL"),
    ),
    "a later protocol": Attack(
        archive(lambda canary: pickle.dumps({"w": Reduce(os.system, f"touch {canary}")}, 4)),
        DAMAGED.format("it has protocol 4; torch writes 2"),
    ),
    "EXT": Attack(
        archive(assembled(b"\x82\x01")),
        DAMAGED.format("it uses the instruction EXT1"),
    ),
    "a persistent identity that is text": Attack(
        archive(assembled(b"Pos.system\n")),
        DAMAGED.format("it uses the instruction PERSID"),
    ),
    "a persistent identity that is no storage": Attack(
        archive(assembled(b"(", "module", b"ccollections\nOrderedDict\n", "a", "b", b"K\x01tQ")),
        DAMAGED.format("it refers to something outside that is no tensor's storage"),
    ),
    "a persistent identity that is a call": Attack(
        archive(assembled(b"cos\nsystem\n", "touch {canary}", b"\x85RQ")),
        REFUSED.format(r"os\.system"),
    ),
    "a storage type that is a class": Attack(
        archive(assembled(b"(", "storage", b"ccollections\nOrderedDict\n", "0", "cpu", b"K\x04tQ")),
        DAMAGED.format("it refers to something outside that is no tensor's storage"),
    ),
    "a state for a class": Attack(
        archive(
            assembled(b"ccollections\nOrderedDict\n}", "items", b"ccollections\nOrderedDict\nsb")
        ),
        DAMAGED.format("it sets the state of a _Name"),
    ),
    "a state for a dictionary": Attack(
        archive(
            assembled(b"ccollections\nOrderedDict\n)R}", "items", b"ccollections\nOrderedDict\nsb")
        ),
        DAMAGED.format("it alters a dictionary"),
    ),
    "a method replaced in an allowed class": Attack(
        saved(lambda canary: {"w": scaler_with(update_scale=OrderedDict)}),
        r"is refused: it sets 'update_scale' of LossScaler, which no checkpoint needs",
    ),
    "a function as an allowed attribute": Attack(
        saved(lambda canary: {"w": scaler_with(cur_scale=OrderedDict)}),
        DAMAGED.format("cur_scale of its LossScaler is a _Name"),
    ),
    "code in a state of an allowed class": Attack(
        saved(zero_file),
        REFUSED.format(r"posix\.system"),
    ),
    "an allowed class called with arguments": Attack(
        saved(lambda canary: {"w": Reduce(LossScaler, str(canary))}),
        r"is refused: it makes a call of deepspeed\.runtime\.fp16\.loss_scaler\.LossScaler, which",
    ),
    "a tensor with hooks": Attack(
        saved(lambda canary: {"w": HasHooks()}),
        DAMAGED.format("it holds a damaged tensor"),
    ),
    "a tensor outside of its storage": Attack(
        storage_of(2, is_stored=True),
        DAMAGED.format(r"a tensor of shape \(4,\) lies outside of its storage of 2 elements"),
    ),
    "a storage that claims a terabyte": Attack(
        storage_of(1 << 38, is_stored=True),
        DAMAGED.format("part archive/data/0 has 16 bytes where 274877906944 of float32 need"),
    ),
    "a storage that isn't there": Attack(
        storage_of(4, is_stored=False),
        DAMAGED.format("the bytes of its storage '0' are missing"),
    ),
    "a tensor that claims more than it has": Attack(
        saved(lambda canary: {"w": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        DAMAGED.format(r"a tensor of shape \(1048576, 1048576\) lies outside"),
    ),
    "an array of objects": Attack(
        saved(lambda canary: {"w": np.array([Reduce(os.system, f"touch {canary}")], dtype=object)}),
        DAMAGED.format("it holds a NumPy type that is no number"),
    ),
    "an array that is longer than its bytes": Attack(
        saved(lambda canary: {"w": array_of("u4", (1 << 40,), b"1234")}),
        DAMAGED.format("it holds a damaged NumPy array"),
    ),
    "an array of records": Attack(
        saved(lambda canary: {"w": np.zeros(2, dtype=[("a", "u4"), ("b", "u8")])}),
        DAMAGED.format("it holds a NumPy type that is no number"),
    ),
    "a name that is ten megabytes long": Attack(
        archive(assembled(b"c" + b"a" * 10_000_000 + b"\nsystem\n")),
        r"is refused: it names a{120}, which no checkpoint needs",
    ),
    "a string that claims four gigabytes": Attack(
        archive(assembled(b"X\xff\xff\xff\xff")),
        DAMAGED.format("expected 4294967295 bytes in a unicodestring4, but only 1 remain"),
    ),
    "a memo that claims four billion places": Attack(
        archive(assembled(b"}r\xff\xff\xff\xffh\x01")),
        DAMAGED.format(r"its instructions make no sense \(KeyError\)"),
    ),
    "a number without end": Attack(
        archive(assembled(b"\x8b" + struct.pack("<i", 100_000) + b"\x01" * 100_000)),
        DAMAGED.format("it uses the instruction LONG4"),
    ),
    "a key that is too deep to hash": Attack(
        archive(assembled(b"})" + b"\x85" * 200_000 + b"K\x01s")),
        DAMAGED.format("it has a key that is a tuple"),
    ),
    "a set that is copied again and again": Attack(
        archive(
            assembled(
                b"c__builtin__\nset\nq\x00]q\x01(" + b"K\x01" * 100_000 + b"e",
                b"h\x00h\x01\x85R" * 2_000,
            )
        ),
        DAMAGED.format("it copies more than it holds"),
    ),
    "a pickle of more than 16 MB": Attack(
        archive(lambda canary: b"\x80\x02" + b"]" * (17 << 20) + b"."),
        DAMAGED.format("part 'archive/data.pkl' has 17825795 bytes, more than 16777216"),
    ),
    "millions of instructions": Attack(
        archive(lambda canary: b"\x80\x02" + b"]0" * 1_500_000 + b"N."),
        DAMAGED.format("it uses the instruction POP"),
    ),
    "millions of empty lists": Attack(
        archive(lambda canary: b"\x80\x02" + b"]" * 1_100_000 + b"N."),
        DAMAGED.format("it has more instructions than any checkpoint"),
    ),
    "no end": Attack(
        archive(lambda canary: b"\x80\x02}"),
        DAMAGED.format("pickle exhausted before seeing STOP"),
    ),
    "something behind the end": Attack(
        archive(lambda canary: pickle.dumps({"w": 1}, 2) + evil_pickle(canary)),
        DAMAGED.format("something follows its pickle"),
    ),
    "a tar archive": Attack(tar, DAMAGED.format("it begins like none of torch's")),
    "a TorchScript program": Attack(
        script, r"part '.*/code/__torch__/.*\.py' is compressed or encrypted; torch does neither"
    ),
    "a TorchScript program, not compressed": Attack(
        archive(lambda canary: pickle.dumps({"w": 1}, 2), ("archive/constants.pkl", b"N.")),
        r"is refused: it is a TorchScript program, which no checkpoint needs",
    ),
    "two pickles of one name": Attack(
        two_pickles, DAMAGED.format("the archive holds two parts called 'archive/data.pkl'")
    ),
    "two archives in one file": Attack(
        second_archive_behind, DAMAGED.format("the archive's two ends contradict each other")
    ),
    "two pickles in two folders": Attack(
        archive(lambda canary: pickle.dumps({"w": 1}, 2), ("other/data.pkl", b"N.")),
        DAMAGED.format(r"it is no archive of torch's: it does not hold one data\.pkl"),
    ),
    "a path that leads out": Attack(
        lambda path, canary: [
            zipfile.ZipFile(path, "w").writestr("../../data.pkl", evil_pickle(canary))
        ],
        DAMAGED.format(r"it is no archive of torch's: it does not hold one data\.pkl"),
    ),
    "a zip without a pickle": Attack(
        lambda path, canary: zipfile.ZipFile(path, "w").close(),
        DAMAGED.format("it begins like none of torch's"),
    ),
    "a compressed bomb": Attack(
        archive(
            lambda canary: b"\x80\x02" + b"]" * (64 << 20) + b".", compression=zipfile.ZIP_DEFLATED
        ),
        DAMAGED.format(r"part 'archive/data\.pkl' is compressed or encrypted; torch does neither"),
    ),
    "a part that claims gigabytes": Attack(
        huge_claim, DAMAGED.format("a part is longer than the archive")
    ),
}
