"""``NeoXArgs``: every key as a flat attribute, for scripts and tests written for GPT-NeoX.

The values come from the same reading, derivation and checks as ``RunConfig``. Unlike it, this
object may be written to, which NeoX's users do; nothing of ours reads it afterwards.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.command_line import parse_command_line
from megatron.config.load import load_config, override, resolve
from megatron.config.registry import closest, keys, resolve_alias
from megatron.config.run_config import RunConfig
from megatron.config.transport import deepspeed_settings, encode_payloads, load_transported
from megatron.neox_arguments.environment import configure_ranks
from megatron.neox_arguments.launcher_options import launcher_options

__all__ = ["NeoXArgs"]


class _Behaviour:
    """What can be done with the attributes; the dataclass below has them."""

    # NeoX keeps these beside its keys, and they are no keys
    tensorboard_writer: Any = None
    adlr_autoresume_object: Any = None
    tokenizer: Any = None

    def __init__(self, **values: Any) -> None:
        unknown = [name for name in values if resolve_alias(name) not in keys()]
        if unknown:
            hints = [f"{name!r} (did you mean {closest(name)!r}?)" for name in unknown]
            raise TypeError(f"NeoXArgs got unexpected keys: {', '.join(hints)}")
        config = resolve(
            override({}, values, origin="NeoXArgs"),
            config_files=values.get("config_files") or {},
            local_slots=_count_devices,
        )
        self._take(config)

    @classmethod
    def from_dict(cls, args_dict: Mapping[str, Any]) -> "NeoXArgs":
        """Build from a flat dictionary of keys."""
        return cls(**args_dict)  # type: ignore[return-value]

    @classmethod
    def from_ymls(
        cls,
        paths_to_yml_files: Sequence[str | Path],
        overwrite_values: Mapping[str, Any] | None = None,
    ) -> "NeoXArgs":
        """Read and merge configuration files; ``overwrite_values`` win over them.

        Raises:
            ConfigError: with all problems found.
        """
        return cls._of(
            load_config(paths_to_yml_files, overwrite_values, local_slots=_count_devices)
        )

    @classmethod
    def consume_deepy_args(cls, input_args: Sequence[str] | None = None) -> "NeoXArgs":
        """Build from the command line of ``deepy.py``.

        Raises:
            ConfigError: a file or the user script is missing, or a value is no good.
        """
        command = parse_command_line(sys.argv[1:] if input_args is None else input_args)
        return cls.from_ymls(command.config_paths, command.overrides)

    @classmethod
    def consume_neox_args(
        cls,
        overwrite_values: Mapping[str, Any] | None = None,
        input_args: Sequence[str] | None = None,
    ) -> "NeoXArgs":
        """Build on a rank, from the arguments that ``deepy.py`` passed to the user script.

        Raises:
            ConfigError: they are missing or damaged, or a value is no good.
        """
        return cls._of(load_transported(input_args, overwrite_values))

    @classmethod
    def validate_keys(cls) -> bool:
        """Return whether every key has one declaration; a clash is an error when importing."""
        return set(keys()) == {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    def to_run_config(self) -> RunConfig:
        """Return the current values as our own frozen configuration, derived and checked again."""
        changed = {
            name: value for name, value in self._flat().items() if value != keys()[name].default
        }
        return resolve(
            override({}, changed, origin="NeoXArgs"),
            config_files=changed.get("config_files") or {},
            local_slots=_count_devices,
        )

    def get_deepspeed_main_args(self) -> list[str]:
        """Return what NeoX gives DeepSpeed's launcher: options, user script, configuration."""
        flat = self._flat()
        return [
            *launcher_options(self.deepspeed_runner, flat),
            str(flat["user_script"] or ""),
            *encode_payloads(flat),
        ]

    def configure_distributed_args(self) -> None:
        """Take rank, local rank and world size from the environment.

        Raises:
            ConfigError: under ``deepspeed_mpi``, or without SLURM's variables under
                ``deepspeed_slurm``.
        """
        self.update_values(
            configure_ranks(
                uses_slurm=bool(self.__dict__["deepspeed_slurm"]),
                uses_mpi=bool(self.__dict__["deepspeed_mpi"]),
            )
        )

    def defaults(self) -> Iterator[tuple[str, Any]]:
        """Yield every key with its default."""
        for name, entry in keys().items():
            yield name, entry.default

    def update_value(self, key: str, value: Any) -> None:
        """Set a key.

        Raises:
            ValueError: there is no such key.
        """
        if not hasattr(self, key):
            raise ValueError(f"NeoXArgs has no key {key!r}; did you mean {closest(key)!r}?")
        setattr(self, key, value)

    def update_values(self, values: Mapping[str, Any]) -> None:
        """Set several keys; see :meth:`update_value`."""
        for key, value in values.items():
            self.update_value(key, value)

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """What DeepSpeed is told: its keys that differ from their default, and the extra ones."""
        return deepspeed_settings(self._flat())

    @property
    def deepspeed_runner(self) -> dict[str, Any]:
        """The launcher's keys."""
        return self._groups(lambda group: group == "runner")

    @property
    def megatron_config(self) -> dict[str, Any]:
        """Every key that is neither DeepSpeed's nor the launcher's."""
        return self._groups(lambda group: group not in ("runner", "deepspeed", "legacy"))

    @property
    def all_config(self) -> dict[str, Any]:
        """Every key."""
        return self._groups(lambda group: group != "legacy")

    @property
    def params_dtype(self) -> Any:
        """The parameters' torch type."""
        torch = _load("torch")
        by_precision = {"fp16": torch.half, "bfloat16": torch.bfloat16}
        return by_precision.get(self.__dict__["precision"], torch.float)

    def build_tokenizer(self) -> None:
        """Set ``tokenizer`` and ``padded_vocab_size``."""
        self.tokenizer = _load("megatron.tokenizer").build_tokenizer(self)

    def initialize_tensorboard_writer(self) -> None:
        """Open TensorBoard on rank 0 if ``tensorboard_dir`` is set."""
        directory = self.__dict__["tensorboard_dir"]
        if directory and self.__dict__["rank"] in (0, None):
            tensorboard = _load("torch.utils.tensorboard")
            self.tensorboard_writer = tensorboard.SummaryWriter(log_dir=directory)

    def initialize_comet(self) -> None:
        """Do nothing, unless Comet is asked for.

        Raises:
            ConfigError: ``use_comet`` is true.
        """
        if self.__dict__["use_comet"]:
            raise ConfigError(
                "known to NeoX, not supported here yet: use_comet=True "
                "(use use_wandb or tensorboard_dir)"
            )

    def print(self) -> None:
        """Print every key on rank 0, those that differ from their default first."""
        if self.__dict__["rank"] not in (0, None):
            return
        table = keys()
        flat = self._flat()
        changed = [name for name in flat if flat[name] != table[name].default]
        unchanged = [name for name in flat if name not in set(changed)]
        for title, names in (("set or derived", changed), ("default", unchanged)):
            print(f"---- {title} ----")  # noqa: T201 - what the function is for
            for name in sorted(names):
                print(f"  {name:.<45} {flat[name]}")  # noqa: T201

    @classmethod
    def _of(cls, config: RunConfig) -> "NeoXArgs":
        instance = cls.__new__(cls)
        instance._take(config)
        return instance  # type: ignore[return-value]

    def _take(self, config: RunConfig) -> None:
        self.__dict__.update(config.flat())

    def _flat(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in keys()}

    def _groups(self, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
        return {
            name: self.__dict__[name] for name, entry in keys().items() if is_wanted(entry.group)
        }


def _alias(name: str) -> property:
    def read(self: Any) -> Any:
        return getattr(self, name)

    def write(self: Any, value: Any) -> None:
        setattr(self, name, value)

    return property(read, write, doc=f"Another name of ``{name}``.")


def _fields() -> list[tuple[str, Any, Any]]:
    return [
        (
            name,
            entry.annotation,
            dataclasses.field(default_factory=lambda default=entry.default: list(default))
            if isinstance(entry.default, list)
            else dataclasses.field(default=entry.default),
        )
        for name, entry in keys().items()
    ]


# One field per key, straight from the declarations.
NeoXArgs = dataclasses.make_dataclass(
    "NeoXArgs",
    _fields(),
    bases=(_Behaviour,),
    namespace={
        "__module__": __name__,
        "__doc__": "Every key of NeoX, v1.0 and ours as an attribute.",
        **{
            alias: _alias(name)
            for name, entry in keys().items()
            for alias in entry.declaration.aliases
        },
    },
    init=False,
)


def _load(module: str) -> Any:
    # By name and late: this face lies below data and must not import torch.
    return importlib.import_module(module)


def _count_devices() -> int:
    return _load("torch").cuda.device_count() or 1
