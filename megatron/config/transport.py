"""Carrying a configuration from the launcher to every rank, in NeoX's form.

The user script gets ``--deepspeed_config B64 --megatron_config B64``: URL-safe base64 of JSON with
the keys that differ from their defaults. A rank works everything else out again. Linux takes at
most 128 KiB per argument; beyond that the argument is ``@FILE``, a file only the user may read.
"""

import argparse
import base64
import binascii
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.load import override, resolve
from megatron.config.registry import keys, resolve_alias
from megatron.config.run_config import RunConfig
from megatron.config.yaml_files import Written, normalise

__all__ = [
    "decode_payloads",
    "deepspeed_settings",
    "encode_config",
    "encode_payloads",
    "load_transported",
    "spilled_files",
]

# MAX_ARG_STRLEN, less room for what a remote shell adds to a command that is one argument
_ARGUMENT_LIMIT_BYTES = 128 * 1024 - 8 * 1024
_FILE_MARK = "@"
# which keys the user wrote, so that a rank knows it too
_WRITTEN_KEYS = "written_keys"
# a rank finds its own
_OF_ONE_RANK = ("rank", "local_rank", "world_size", "comet_experiment")
# DeepSpeed's own program may have changed these on the way
_FROM_DEEPSPEED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization",
    "autotuning",
)


def encode_config(config: RunConfig, *, spill_directory: str | Path | None = None) -> list[str]:
    """Return the arguments that carry ``config`` to the user script.

    Args:
        config: what to carry.
        spill_directory: where a configuration too long for an argument is written; every host
            must see it. None is the system's temporary folder, for runs on this machine. The
            caller deletes the files (:func:`spilled_files`) when the run is over.
    """
    return encode_payloads(config.flat(), written=config.written, spill_directory=spill_directory)


def encode_payloads(
    flat: Mapping[str, Any],
    *,
    written: frozenset[str] | None = None,
    spill_directory: str | Path | None = None,
) -> list[str]:
    """As :func:`encode_config`, from every key's value."""
    changed = {
        name: flat[name]
        for name, entry in keys().items()
        if name not in _OF_ONE_RANK and flat[name] != entry.default
    }
    if written is not None:
        changed[_WRITTEN_KEYS] = sorted(written)
    texts = [_encode(deepspeed_settings(flat)), _encode(changed)]
    if sum(map(len, texts)) > _ARGUMENT_LIMIT_BYTES:
        texts = [_FILE_MARK + _spill(text, spill_directory) for text in texts]
    return ["--deepspeed_config", texts[0], "--megatron_config", texts[1]]


def deepspeed_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what NeoX hands to DeepSpeed: its keys that differ from their defaults.

    ``gradient_clipping`` is always among them, which NeoX forgets at its default.
    """
    settings = {
        name: flat[name]
        for name, entry in keys().items()
        if entry.group == "deepspeed" and flat[name] != entry.default
    }
    extra = settings.pop("deepspeed_extra_args", None) or {}
    return {**settings, "gradient_clipping": flat["gradient_clipping"], **extra}


def load_transported(
    argv: Sequence[str] | None = None, overwrite_values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Rebuild the configuration on a rank.

    Args:
        argv: arguments of the user script, without its name; None is ``sys.argv[1:]``. Unknown
            arguments, such as the launcher's ``--local_rank``, are left alone.
        overwrite_values: keys that win over what was carried.

    Raises:
        ConfigError: an argument is missing or damaged, or a value is no good.
    """
    payload = decode_payloads(sys.argv[1:] if argv is None else argv)
    written_keys = payload.pop(_WRITTEN_KEYS, None)
    written = {
        normalise(name): Written(value, "launch arguments", name) for name, value in payload.items()
    }
    written = override(written, overwrite_values or {}, origin="override")
    config = resolve(
        written,
        config_files=payload.get("config_files") or {},
        local_slots=_count_nothing,
    )
    if written_keys is None:
        return config
    overwritten = {resolve_alias(normalise(name)) for name in overwrite_values or {}}
    return dataclasses.replace(config, written=frozenset(written_keys) | overwritten)


def decode_payloads(argv: Sequence[str]) -> dict[str, Any]:
    """Return the carried keys, with those that DeepSpeed's programs may have changed.

    Raises:
        ConfigError: ``--megatron_config`` is missing, or an argument can't be decoded.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--megatron_config")
    parser.add_argument("--deepspeed_config")
    found = vars(parser.parse_known_args(list(argv))[0])
    if found["megatron_config"] is None:
        raise ConfigError(
            "no --megatron_config among the arguments; start this script through deepy.py: "
            "python deepy.py train.py config.yml"
        )
    payload = _decode(found["megatron_config"], "--megatron_config")
    if found["deepspeed_config"] is not None:
        settings = _decode(found["deepspeed_config"], "--deepspeed_config")
        payload.update({name: settings[name] for name in _FROM_DEEPSPEED if name in settings})
    return payload


def spilled_files(argv: Sequence[str]) -> list[Path]:
    """Return the files among the arguments of :func:`encode_config`; delete them after the run."""
    return [
        Path(value[1:])
        for option, value in itertools.pairwise(argv)
        if option in ("--deepspeed_config", "--megatron_config") and value.startswith(_FILE_MARK)
    ]


def _encode(values: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode()


def _decode(text: str, option: str) -> dict[str, Any]:
    try:
        if text.startswith(_FILE_MARK):
            text = Path(text[1:]).read_text(encoding="ascii")
        elif os.path.isfile(text):
            text = Path(text).read_text(encoding="utf-8")  # the autotuner's ds_config.json
        # v1.0 passes the JSON itself
        raw = text if text.lstrip().startswith("{") else base64.urlsafe_b64decode(text)
        values = json.loads(raw)
    except (OSError, binascii.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{option} can't be decoded: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{option} holds {type(values).__name__}, not a mapping of keys")
    return values


def _spill(text: str, directory: str | Path | None) -> str:
    # mkstemp makes the file readable by the user alone
    handle, path = tempfile.mkstemp(prefix="megatron-config-", suffix=".b64", dir=directory)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text)
    return os.path.abspath(path)


def _count_nothing() -> int:
    raise ConfigError(
        "the launch arguments don't say global_num_gpus; start this script through deepy.py"
    )
