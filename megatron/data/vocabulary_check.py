"""Token ids that the model has no row for, found where they are read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.data.loader import SampleReader

__all__ = ["VocabularyCheck"]


class VocabularyCheck:
    """A stream whose every sample is checked against the vocabulary.

    An id beyond it would end in an index error at best; divided over tensor ranks, each takes it
    for another rank's and training goes on without a word. The check costs about a microsecond per
    micro batch.

    Args:
        stream: where samples are read.
        vocabulary_rows: ids must be below this (padded) number.
        source: names the data in the message.
    """

    def __init__(self, stream: SampleReader, vocabulary_rows: int, *, source: str) -> None:
        self._stream = stream
        self._rows = vocabulary_rows
        self._source = source

    def read(self, positions: NDArray[np.int64], /) -> NDArray[Any]:
        """Return the samples at ``positions``.

        Raises:
            DatasetError: a token id is negative, or it or a label is beyond the vocabulary.
        """
        samples = self._stream.read(positions)
        # Labels may be negative: those aren't learned.
        tokens = samples[:, 0] if samples.ndim == 3 else samples
        largest = int(samples.max(initial=0))
        smallest = int(tokens.min(initial=0)) if tokens.dtype.kind == "i" else 0
        if largest >= self._rows or smallest < 0:
            wrong = smallest if smallest < 0 else largest
            row = int(np.nonzero(samples == wrong)[0][0])
            raise DatasetError(
                f"{self._source} holds token id {wrong}, in the sample at position "
                f"{positions[row]} of its stream, but the vocabulary has "
                f"{self._rows} rows (padded); was it tokenized with another tokenizer?"
            )
        return samples
