"""Keys and values of the tokens so far, so that generating one more needs only that one."""

from typing import Any

import torch

__all__ = ["KeyValueCache", "use_cache"]


class KeyValueCache:
    """What every block of a pipeline stage keeps of one text, and how many tokens that is.

    All layers of a stage share one cache: while a pass is under way ``past`` doesn't move, and
    :meth:`advance` is called after it.
    """

    def __init__(self) -> None:
        self.past = 0  # tokens whose keys and values are kept
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(
        self, block: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new tokens' part of a block and return that of all tokens.

        Args:
            block: number of the block.
            key: of the new tokens, (batch, heads, sequence, head size).
            value: likewise.
        """
        if block in self._kept:
            kept_key, kept_value = self._kept[block]
            key = torch.cat([kept_key, key], dim=-2)
            value = torch.cat([kept_value, value], dim=-2)
        self._kept[block] = key, value
        return key, value

    def advance(self, tokens: int) -> None:
        """Note that a pass over so many new tokens is over."""
        self.past += tokens


def use_cache(module: torch.nn.Module, cache: KeyValueCache | None) -> None:
    """Let every layer of ``module`` that looks back do so through ``cache``; None: through none."""
    for layer in module.modules():
        if hasattr(layer, "cache"):
            _set(layer, cache)


def _set(layer: Any, cache: KeyValueCache | None) -> None:
    layer.cache = cache
