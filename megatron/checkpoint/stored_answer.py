"""What a model answered to a few tokens, as its checkpoint keeps it (``engine.forward_check``).

The last stage's ``mp_rank_XX_model_states.pt`` hold two entries:

forward_check                    ours: tokens, where they stand in the training stream, and the
                                 logits at some token positions for the whole vocabulary
checkpoint_validation_logits     NeoX's: all logits of a sample of tokens 0, 1, 2, ..., of this
                                 tensor rank's part of the vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint, model_states_file

__all__ = ["StoredAnswer", "answer_places", "answer_state", "neox_tokens", "read_answer"]

_OURS = "forward_check"
_NEOX = "checkpoint_validation_logits"
_MOST_PLACES = 16


@dataclass(frozen=True)
class StoredAnswer:
    """A model's answer to the first of some samples."""

    tokens: NDArray[np.int64]  # (samples, seq_length + 1), what the model was given
    places: Sequence[int]  # token positions in the first sample
    logits: torch.Tensor  # float32, (places, pinned vocabulary)
    position: int | None = None  # in the training stream, of the first sample; None: NeoX's tokens
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Under which a model answers bitwise the same; empty if nobody noted them."""


def neox_tokens(seq_length: int, num_samples: int) -> NDArray[np.int64]:
    """Return the samples of NeoX's check."""
    return np.tile(np.arange(seq_length + 1, dtype=np.int64), (num_samples, 1))


def answer_places(seq_length: int) -> list[int]:
    """Return the token positions whose logits are kept: evenly spread, the first and the last in.

    A late position's logits depend on all tokens before it.
    """
    number = min(_MOST_PLACES, seq_length)
    return sorted({int(place) for place in np.linspace(0, seq_length - 1, number).round()})


def answer_state(answer: StoredAnswer, neox_logits: torch.Tensor | None) -> dict[str, Any]:
    """Return an answer as entries of a model-states file.

    Args:
        answer: ours.
        neox_logits: (seq_length, this tensor rank's part of the vocabulary), if NeoX's check can
            be run on this model.
    """
    state: dict[str, Any] = {
        _OURS: {
            "tokens": torch.from_numpy(answer.tokens),
            "places": list(answer.places),
            "logits": answer.logits,
            "position": answer.position,
            "conditions": dict(answer.conditions),
        }
    }
    return state if neox_logits is None else state | {_NEOX: neox_logits}


def read_answer(
    stored: StoredCheckpoint, *, seq_length: int, vocabulary_size: int
) -> StoredAnswer | None:
    """Return what a checkpoint says its model answered, NeoX's if it has none of ours.

    Args:
        stored: the checkpoint.
        seq_length: of the samples in NeoX's check.
        vocabulary_size: entries of the pinned vocabulary.

    Returns:
        None if it was saved without an answer, or with one to another length of samples.

    Raises:
        CheckpointError: an answer is there, but not what this code writes.
    """
    if not stored.model_ranks:
        return None
    # The highest number is the last stage's last tensor rank.
    content = stored.model_states(stored.model_ranks[-1])
    if _OURS in content:
        return _ours(content[_OURS], stored, vocabulary_size)
    return _neox(stored, seq_length, vocabulary_size) if _NEOX in content else None


def _ours(entry: Any, stored: StoredCheckpoint, vocabulary_size: int) -> StoredAnswer:
    where = f"{stored.directory / model_states_file(stored.model_ranks[-1])}: {_OURS}"
    try:
        answer = StoredAnswer(
            tokens=entry["tokens"].numpy(),
            places=list(entry["places"]),
            logits=entry["logits"],
            position=entry["position"],
            conditions=entry["conditions"],
        )
        expected = (len(answer.places), vocabulary_size)
        if tuple(answer.logits.shape) != expected or answer.tokens.ndim != 2:
            raise ValueError(f"logits of shape {tuple(answer.logits.shape)}, not {expected}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{where} is not an answer of a model ({type(error).__name__}: {error}); to load it "
            "unchecked set checkpoint_validation_with_forward_pass: false"
        ) from error
    return answer


def _neox(stored: StoredCheckpoint, seq_length: int, vocabulary_size: int) -> StoredAnswer | None:
    places = answer_places(seq_length)
    parts = []
    for rank in stored.model_ranks[-stored.tensor_parallel_size :]:
        logits = stored.model_states(rank).get(_NEOX)
        if not torch.is_tensor(logits) or logits.numel() != seq_length * logits.shape[-1]:
            return None
        parts.append(logits.reshape(seq_length, -1)[places].float())
    rows = torch.cat(parts, dim=-1)[:, :vocabulary_size]
    if rows.shape[1] != vocabulary_size:
        return None
    return StoredAnswer(tokens=neox_tokens(seq_length, 1), places=places, logits=rows)
