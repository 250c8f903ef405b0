"""The attention type of every layer."""

from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.draft import Draft, reads

__all__ = ["ATTENTION_TYPES", "derive_attention"]

ATTENTION_TYPES = (
    "global",
    "local",
    "sparse_fixed",
    "sparse_variable",
    "bigbird",
    "bslongformer",
    "gmlp",
    "amlp",
    "flash",
    "rwkv",
    "mamba",
)


@reads("attention_config", "num_layers", "sparsity_config")
def derive_attention(draft: Draft) -> dict[str, Any]:
    """Spell ``attention_config`` out to one type per layer.

    Raises:
        ConfigError: it isn't in NeoX's form, names an unknown type, or gives another number of
            layers than ``num_layers``.
    """
    changes = {"sparsity_config": draft["sparsity_config"] or {}}
    config, num_layers = draft["attention_config"], draft["num_layers"]
    if num_layers is None:
        return changes  # reported as missing
    if config is None:
        return {**changes, "attention_config": ["global"] * num_layers}
    where = f"{draft.origin('attention_config')}: attention_config"
    layers = _spell_out(config, num_layers, where)
    if len(layers) != num_layers:
        raise ConfigError(f"{where} gives {len(layers)} layers, but {draft.say('num_layers')}")
    unknown = [name for name in dict.fromkeys(layers) if name not in ATTENTION_TYPES]
    if unknown:
        raise ConfigError(
            f"{where}: unknown type {', '.join(map(repr, unknown))}; "
            f"there are {', '.join(ATTENTION_TYPES)}"
        )
    return {**changes, "attention_config": layers}


def _spell_out(config: list[Any], num_layers: int, where: str) -> list[Any]:
    layers: list[Any] = []
    if all(isinstance(item, str) for item in config):
        return config
    for item in config:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list)):
            raise ConfigError(f'{where}: {item!r} should be [[type, ...], count or "all"]')
        types, count = item
        if count == "all":
            # whatever stood before is dropped, as in NeoX
            if not types or num_layers % len(types):
                raise ConfigError(
                    f"{where}: {len(types)} types can't repeat over num_layers={num_layers}"
                )
            return list(types) * (num_layers // len(types))
        if type(count) is not int:
            raise ConfigError(f'{where}: {count!r} should be a number of layers or "all"')
        layers += types * count
    return layers
