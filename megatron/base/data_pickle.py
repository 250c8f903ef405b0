"""Pickles as data: executed by a machine that can build values, and nothing else.

``pickletools`` reads the instructions; this machine knows the few that ``torch.save`` writes. A
class is only a name here. The names in the table below stand for what NeoX, DeepSpeed, NumPy and
torch put into checkpoints; each has a constructor of ours, which checks what it is given and makes
a plain value or an inert stand-in. Any other name ends the reading, and so the error can say it.

torch's own restricted reader calls the real classes with whatever the file says. A file that
passed here gives it nothing but arguments of the kinds that were checked.
"""

import collections
import math
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

__all__ = [
    "ForbiddenNameError",
    "Storage",
    "StoredArray",
    "StoredObject",
    "StoredTensor",
    "read_data_pickle",
]

LIMIT_BYTES = 16 << 20  # of a pickle without its tensors; NeoX's have 1 to 100 kB
_LIMIT_INSTRUCTIONS = 1_000_000
_LIMIT_DIMENSIONS = 64
_LIMIT_INTEGER_BYTES = 32
_SHOWN = 120  # characters of a name in a message


class ForbiddenNameError(ValueError):
    """A file names something that checkpoints don't need, and that may run code."""


@dataclass(frozen=True)
class Storage:
    """Bytes of one or more tensors, which stand elsewhere in the file."""

    key: str
    dtype: str
    numel: int

    @property
    def size_bytes(self) -> int:
        """Bytes it must have."""
        return self.numel * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor without its values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Such as ``float32``."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass
class StoredArray:
    """A NumPy array without its values."""

    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(eq=False)
class StoredObject:
    """What stands for an object of one of DeepSpeed's classes: its plain attributes."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _NumpyType:
    code: str


def read_data_pickle(stream: BytesIO, storages: dict[str, Storage]) -> Any:
    """Return the value of the pickle at the stream's place, and leave the stream behind it.

    Args:
        stream: bytes that are in memory; what a pickle claims beyond them is not made room for.
        storages: gets those that the pickle's tensors use.

    Raises:
        ForbiddenNameError: it names a class or function that is not in the table.
        ValueError: it is truncated, damaged, or uses what ``torch.save`` doesn't write.
    """
    machine = _Machine(storages, allowance=stream.getbuffer().nbytes)
    count = 0
    try:
        for instruction, argument, _ in pickletools.genops(stream):
            count += 1
            if count > _LIMIT_INSTRUCTIONS:
                raise ValueError("it has more instructions than any checkpoint")
            if instruction.name == "STOP":
                return machine.result()
            machine.execute(instruction.name, argument)
    except (IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its instructions make no sense ({type(error).__name__})") from error
    raise ValueError("it has no end")


class _Machine:
    """The stack, the memo, and one method per group of instructions."""

    def __init__(self, storages: dict[str, Storage], *, allowance: int) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages
        # Of items handed to constructors, which copy them: each stands in the pickle once.
        self._allowance = allowance

    def result(self) -> Any:
        value = self._stack.pop()
        if self._stack or self._marked:
            raise ValueError("it ends in the middle of a value")
        return value

    def execute(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(_checked_literal(argument))
        elif name in _MEMOIZED:
            self._memo[argument] = stack[-1]
        elif name in _REMEMBERED:
            stack.append(self._memo[argument])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in _TUPLE_SIZES:
            size = _TUPLE_SIZES[name]
            stack[len(stack) - size :] = [tuple(self._last(size))]
        elif name == "TUPLE":
            items = self._since_mark()
            self._stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            _require(type(self._stack[-1]) is list, "it appends to what is no list")
            self._stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(name)
        elif name == "GLOBAL":
            stack.append(_known_name(argument))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(self._construct(stack.pop(), arguments, is_new=name == "NEWOBJ"))
        elif name == "BUILD":
            _set_state(stack[-2], stack.pop())
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "PROTO":
            _require(argument == 2, f"it has protocol {argument}; torch writes 2")
        else:
            raise ValueError(f"it uses the instruction {name}, which torch does not write")

    def _last(self, size: int) -> list[Any]:
        if len(self._stack) < size:
            raise IndexError
        return self._stack[len(self._stack) - size :]

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _set_items(self, name: str) -> None:
        if name == "SETITEM":
            items = self._last(2)
            del self._stack[-2:]
        else:
            items = self._since_mark()
        target = self._stack[-1]
        _require(isinstance(target, dict), "it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _construct(self, name: Any, arguments: Any, *, is_new: bool) -> Any:
        _require(isinstance(name, _Name), "it calls what is no class")
        _require(isinstance(arguments, tuple), "it calls with what are no arguments")
        self._allowance -= sum(
            len(one) for one in arguments if isinstance(one, list | tuple | dict | str)
        )
        _require(self._allowance >= 0, "it copies more than it holds")
        constructors = _CLASSES if is_new else _FUNCTIONS
        constructor = constructors.get(name)
        if constructor is None:
            raise ForbiddenNameError(f"it makes a call of {name}")
        return constructor(*arguments)

    def _storage(self, identifier: Any) -> Storage:
        _require(
            isinstance(identifier, tuple)
            and len(identifier) in (5, 6)
            and identifier[0] == "storage"
            and isinstance(identifier[1], _Name)  # before it is hashed: it may be endlessly deep
            and identifier[1] in _STORAGE_TYPES
            and isinstance(identifier[2], str)
            and isinstance(identifier[3], str)
            and _is_size(identifier[4])
            and (len(identifier) == 5 or identifier[5] is None),
            "it refers to something outside that is no tensor's storage",
        )
        _, kind, key, _, numel = identifier[:5]
        storage = Storage(key, _STORAGE_TYPES[kind], numel)
        known = self._storages.setdefault(key, storage)
        _require(known == storage, f"it describes storage {key[:_SHOWN]!r} in two ways")
        return known


def _known_name(argument: str) -> _Name:
    module, _, name = argument.partition(" ")
    # Protocol 2 has Python 2's names.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    found = _Name(module, name)
    if found not in _NAMES:
        raise ForbiddenNameError(f"it names {str(found)[:_SHOWN]}")
    return found


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= _LIMIT_DIMENSIONS
        and all(map(_is_size, values))
    )


def _checked_literal(value: Any) -> Any:
    if type(value) is int:
        _require(value.bit_length() <= 8 * _LIMIT_INTEGER_BYTES, "it holds an endless number")
    return value


def _checked_key(key: Any) -> Any:
    # Hashing a deeply nested tuple would end the process.
    parts = key if isinstance(key, tuple) else (key,)
    _require(
        all(isinstance(one, str | int | float | None | StoredObject) for one in parts),
        f"it has a key that is a {type(key).__name__}",
    )
    return key


def _set_state(target: Any, state: Any) -> None:
    """Do what BUILD does, for what checkpoints build."""
    if isinstance(target, StoredObject):
        _require(isinstance(state, dict), f"the state of its {target.name} is no dictionary")
        known = _ATTRIBUTES[target.name]
        for name, value in state.items():
            if name not in known:
                raise ForbiddenNameError(f"it sets {str(name)[:_SHOWN]!r} of {target.name}")
            _require(
                isinstance(value, int | float | None)
                or (isinstance(value, _Name) and value in _DTYPES),
                f"{name} of its {target.name} is a {type(value).__name__}",
            )
            target.attributes[name] = value
    elif isinstance(target, StoredArray):
        _set_array(target, state)
    elif isinstance(target, _NumpyType):
        byte_order = state[1] if isinstance(state, tuple) and len(state) == 8 else None
        _require(
            byte_order in ("<", ">", "|", "=")
            and state == (3, byte_order, None, None, None, -1, -1, 0),
            "it describes a NumPy type that is no number",
        )
    elif isinstance(target, collections.OrderedDict):
        # A module's state_dict says which version wrote each part.
        _require(isinstance(state, dict) and set(state) <= {"_metadata"}, "it alters a dictionary")
    else:
        raise ValueError(f"it sets the state of a {type(target).__name__}")


def _set_array(array: StoredArray, state: Any) -> None:
    _require(isinstance(state, tuple) and len(state) == 5, "it holds a damaged NumPy array")
    version, shape, kind, is_fortran, data = state
    _require(
        version == 1
        and _are_sizes(shape)
        and isinstance(kind, _NumpyType)
        and isinstance(is_fortran, bool)
        and isinstance(data, bytes)
        and len(data) == math.prod(shape) * int(kind.code[1:]),
        "it holds a damaged NumPy array",
    )
    array.dtype, array.shape = kind.code, shape


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, *rest: Any
) -> StoredTensor:
    _require(
        isinstance(storage, Storage)
        and _is_size(offset)
        and _are_sizes(shape)
        and _are_sizes(strides)
        and len(shape) == len(strides)
        and isinstance(requires_grad, bool)
        and isinstance(hooks, dict)
        and not hooks
        and not rest,
        "it holds a damaged tensor",
    )
    numel = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    _require(
        numel == 0 or (last < storage.numel and numel <= storage.numel),
        f"a tensor of shape {shape} lies outside of its storage of {storage.numel} elements",
    )
    return StoredTensor(storage, offset, shape, strides)


def _tensor_with_id(function: Any, kind: Any, arguments: Any, state: Any) -> StoredTensor:
    # ZeRO 3 numbers its tensors.
    _require(
        function == _Name("torch._utils", "_rebuild_tensor_v2")
        and kind == _Name("torch", "Tensor")
        and isinstance(arguments, tuple)
        and isinstance(state, dict)
        and set(state) <= {"ds_id"}
        and all(isinstance(value, str | int) for value in state.values()),
        "it holds a damaged tensor",
    )
    return _tensor(*arguments)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    _require(
        isinstance(tensor, StoredTensor)
        and isinstance(requires_grad, bool)
        and isinstance(hooks, dict)
        and not hooks,
        "it holds a damaged parameter",
    )
    return tensor  # type: ignore[no-any-return] # checked above


def _size(*values: Any) -> tuple[int, ...]:
    _require(len(values) == 1 and _are_sizes(values[0]), "it holds a damaged shape")
    return tuple(values[0])


def _set(*items: Any) -> set[Any]:
    _require(len(items) <= 1 and isinstance((*items, [])[0], list), "it holds a damaged set")
    return {_checked_key(one) for one in (items[0] if items else [])}


def _ordered_dict(*items: Any) -> dict[Any, Any]:
    _require(not items, "it holds a damaged dictionary")
    return collections.OrderedDict()


def _encoded(text: Any = None, encoding: Any = None, *rest: Any) -> bytes:
    _require(
        isinstance(text, str) and encoding in ("latin1", "latin-1") and not rest,
        "it holds damaged bytes",
    )
    return text.encode("latin1")  # type: ignore[no-any-return] # checked above


def _array(*values: Any) -> StoredArray:
    _require(
        values in ((_NDARRAY, (0,), b"b"), (_NDARRAY, (0,), "b")), "it holds a damaged NumPy array"
    )
    return StoredArray()


def _numpy_type(code: Any = None, *options: Any) -> _NumpyType:
    _require(
        isinstance(code, str)
        and re.fullmatch(r"[iuf][1248]", code) is not None
        and all(option in (0, 1) for option in options)
        and len(options) <= 2,
        "it holds a NumPy type that is no number",
    )
    return _NumpyType(str(code))


def _device(kind: Any = None, *index: Any) -> str:
    _require(
        isinstance(kind, str) and len(index) <= 1 and all(map(_is_size, index)),
        "it holds a damaged device",
    )
    return ":".join(map(str, (kind, *index)))


def _stage(*values: Any) -> StoredObject:
    _require(
        len(values) == 1 and type(values[0]) is int and 0 <= values[0] <= 3,
        "it holds an unknown ZeRO stage",
    )
    return StoredObject("ZeroStageEnum", {"value": values[0]})


def _blank(name: str) -> Callable[..., StoredObject]:
    def create(*arguments: Any) -> StoredObject:
        _require(not arguments, f"it makes a {name} of arguments")
        return StoredObject(name)

    return create


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_MEMOIZED = {"BINPUT", "LONG_BINPUT"}
_REMEMBERED = {"BINGET", "LONG_BINGET"}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_SCALER = {
    "cur_scale",
    "cur_iter",
    "dynamic",
    "dtype",
    "last_overflow_iter",
    "scale_factor",
    "scale_window",
    "min_scale",
    "delayed_shift",
    "cur_hysteresis",
    "consecutive_hysteresis",
    "raise_error_at_min_scale",
}
_ATTRIBUTES: Mapping[str, set[str]] = {
    "LossScaler": _SCALER,
    "DynamicLossScaler": _SCALER,
    "fragment_address": {"numel", "start"},
    "ZeroStageEnum": set(),
}

_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_STORAGE_TYPES = {
    _Name("torch", f"{kind}Storage"): dtype
    for kind, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
    }.items()
}
_DTYPES = {_Name("torch", dtype): dtype for dtype in _ITEM_BYTES}
_NDARRAY = _Name("numpy", "ndarray")

_FUNCTIONS: dict[_Name, Callable[..., Any]] = {
    _Name("collections", "OrderedDict"): _ordered_dict,
    _Name("builtins", "set"): _set,
    _Name("_codecs", "encode"): _encoded,
    _Name("torch", "Size"): _size,
    _Name("torch", "device"): _device,
    _Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Name("torch._utils", "_rebuild_parameter"): _parameter,
    _Name("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_id,
    _Name("numpy.core.multiarray", "_reconstruct"): _array,
    _Name("numpy._core.multiarray", "_reconstruct"): _array,
    _Name("numpy", "dtype"): _numpy_type,
    _Name("deepspeed.runtime.zero.config", "ZeroStageEnum"): _stage,
}
_CLASSES: dict[_Name, Callable[..., Any]] = {
    _Name("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): _blank("LossScaler"),
    _Name("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): _blank("DynamicLossScaler"),
    _Name("deepspeed.utils.tensor_fragment", "fragment_address"): _blank("fragment_address"),
}
_NAMES = {*_FUNCTIONS, *_CLASSES, *_STORAGE_TYPES, *_DTYPES, _NDARRAY, _Name("torch", "Tensor")}
