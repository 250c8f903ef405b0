"""Which part of each tensor a tensor-parallel rank holds, and how the parts become whole again.

The whole tensor is the one NeoX has at tensor-parallel size 1. Along one dimension it consists of
consecutive blocks; every block is divided evenly, and a rank holds its piece of each:

    query_key_value, multi-head       [head 0: q k v][head 1: q k v] ...      one block
    query_key_value, grouped-query    [all q heads][all k heads][all v heads] three blocks
    linear1, gated                    [up][gate]                              two blocks

Only the vocabulary may not divide evenly: pieces are then rounded up and the last ones end in rows
of zeros, which no reader keeps. Sources: spec/model.md §2-4, design §5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.model.settings import ModelSettings

__all__ = [
    "TensorSplit",
    "full_shape",
    "local_heads",
    "local_vocabulary_rows",
    "merge",
    "split",
    "tensor_split",
]


@dataclass(frozen=True)
class TensorSplit:
    """How one tensor is divided over tensor ranks."""

    dim: int | None  # None: every rank holds the whole tensor
    blocks: tuple[int, ...] = ()  # lengths of the consecutive blocks of the whole tensor

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return self.dim is None


_REPLICATED = TensorSplit(None)
_REPLICATED_MODULES = ("input_layernorm", "post_attention_layernorm", "norm", "position_embeddings")


def tensor_split(name: str, settings: ModelSettings) -> TensorSplit:
    """Return how the tensor called ``name`` is divided.

    Args:
        name: a checkpoint tensor name, with or without a prefix such as ``2.`` or
            ``sequential.2.`` or ``tied_modules.embed.``.
        settings: the model it belongs to.

    Raises:
        ValueError: the model has no such tensor.
    """
    parts = name.split(".")
    kind = parts[-1]
    module = parts[-2] if len(parts) > 1 else ""
    if module in _REPLICATED_MODULES:
        return _REPLICATED
    if module in ("word_embeddings", "final_linear"):
        return TensorSplit(0, (settings.padded_vocab_size,))
    if module == "query_key_value":
        return TensorSplit(0, _query_key_value_blocks(settings))
    if module == "linear1":
        halves = 2 if settings.is_gated else 1
        return TensorSplit(0, (settings.mlp_up_size // halves,) * halves)
    if module == "rpe":
        return TensorSplit(1, (settings.num_attention_heads,))
    if module in ("alibi_embed", "qk_layernorm") and kind != "g":
        return TensorSplit(0, (settings.num_attention_heads,))
    if module in ("rotary_emb", "qk_layernorm"):
        return _REPLICATED
    if module in ("dense", "linear2"):
        if kind == "bias":
            return _REPLICATED
        is_attention = module == "dense"
        return TensorSplit(1, (settings.hidden_size if is_attention else settings.mlp_down_size,))
    raise ValueError(f"no tensor of this model is called {name!r}")


def full_shape(name: str, local_shape: Sequence[int], settings: ModelSettings) -> tuple[int, ...]:
    """Return the shape of the whole tensor, given that of any rank's part."""
    division = tensor_split(name, settings)
    shape = list(local_shape)
    if division.dim is not None:
        shape[division.dim] = sum(division.blocks)
    return tuple(shape)


def local_vocabulary_rows(settings: ModelSettings, size: int) -> int:
    """Return how many rows of the vocabulary each of ``size`` ranks holds, padding included."""
    return -(-settings.padded_vocab_size // size)


def local_heads(settings: ModelSettings, *, size: int, rank: int) -> range:
    """Return the numbers of the query heads that tensor rank ``rank`` of ``size`` holds."""
    heads = settings.num_attention_heads // size
    return range(rank * heads, (rank + 1) * heads)


def split(
    name: str, full: torch.Tensor, *, size: int, rank: int, settings: ModelSettings
) -> torch.Tensor:
    """Return tensor rank ``rank``'s part of ``full``: a view wherever that is possible.

    Raises:
        ValueError: ``full`` has another shape than the model's, or does not divide.
    """
    division = tensor_split(name, settings)
    if division.dim is None:
        return full
    length = full.shape[division.dim]
    if length != sum(division.blocks):
        raise ValueError(
            f"{name} must have {sum(division.blocks)} elements along dimension {division.dim}, "
            f"but its shape is {tuple(full.shape)}"
        )
    pieces = []
    start = 0
    for block in division.blocks:
        piece = _piece_length(name, block, size)
        begin, end = min(rank * piece, block), min((rank + 1) * piece, block)
        pieces.append(full.narrow(division.dim, start + begin, end - begin))
        if end - begin < piece:
            padding = list(full.shape)
            padding[division.dim] = piece - (end - begin)
            pieces.append(full.new_zeros(padding))
        start += block
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=division.dim)


def merge(name: str, parts: Sequence[torch.Tensor], settings: ModelSettings) -> torch.Tensor:
    """Return the whole tensor from all ranks' parts in rank order; the inverse of :func:`split`.

    Replicated tensors are taken from the first rank.

    Raises:
        ValueError: a part has another shape than ``split`` would give it.
    """
    division = tensor_split(name, settings)
    if division.dim is None:
        return parts[0]
    dim, size = division.dim, len(parts)
    lengths = [_piece_length(name, block, size) for block in division.blocks]
    for rank, part in enumerate(parts):
        if part.shape[dim] != sum(lengths):
            raise ValueError(
                f"{name}: tensor rank {rank} of {size} must hold {sum(lengths)} elements along "
                f"dimension {dim}, but the shape is {tuple(part.shape)}"
            )
    if size == 1:
        return parts[0]
    wholes = []
    start = 0
    for block, length in zip(division.blocks, lengths, strict=True):
        whole = torch.cat([part.narrow(dim, start, length) for part in parts], dim=dim)
        wholes.append(whole.narrow(dim, 0, block))
        start += length
    return wholes[0] if len(wholes) == 1 else torch.cat(wholes, dim=dim)


def _query_key_value_blocks(settings: ModelSettings) -> tuple[int, ...]:
    queries = settings.num_attention_heads * settings.head_size
    if not settings.is_grouped_query:
        return (3 * queries,)
    keys = settings.num_kv_heads * settings.head_size
    return (queries, keys, keys)


def _piece_length(name: str, block: int, size: int) -> int:
    is_vocabulary = "word_embeddings" in name or "final_linear" in name
    if block % size and not is_vocabulary:
        raise ValueError(f"{name}: {block} elements cannot be divided over {size} tensor ranks")
    return -(-block // size)
