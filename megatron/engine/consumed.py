"""What this rank has read, step by step, until rank 0 collects it."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from megatron.config.batch_geometry import BatchGeometry
from megatron.engine.agreement import raise_together, report_of
from megatron.engine.distributed import ProcessGroups
from megatron.ledger.digests import MODULUS, agreed_digests, batch_digest

__all__ = ["ConsumedDigests", "collect_digests"]

_KEPT_BYTES = 1 << 20  # of samples that wait


class ConsumedDigests:
    """Sums the digests of the samples this rank hands to the model, by step.

    Samples are kept and digested many at a time: between two micro steps the model has driven
    everything out of the processor's caches, and one micro batch costs twenty times as much as in
    a row of them (benchmarks/ledger_overhead.py).

    Args:
        geometry: how a step's samples are divided.
        data_parallel_rank: whose samples these are.
        first_step: number of the step that begins at ``first_position``.
        first_position: stream position of that step's first sample, over all ranks.
    """

    def __init__(
        self,
        geometry: BatchGeometry,
        data_parallel_rank: int,
        *,
        first_step: int,
        first_position: int,
    ) -> None:
        self._geometry = geometry
        self._data_parallel_rank = data_parallel_rank
        self._first_step = first_step
        self._first_position = first_position
        self._micro_steps = 0
        self._kept: list[tuple[int, int, NDArray[Any], Sequence[NDArray[Any]]]] = []
        self._kept_bytes = 0
        self._sums: dict[int, int] = {}

    def add(self, tokens: NDArray[Any], companions: Sequence[NDArray[Any]] = ()) -> None:
        """Count the next micro batch, as it came from the loader; nobody may write into it."""
        offset = self._geometry.first_position(self._micro_steps, self._data_parallel_rank)
        step = self._first_step + self._micro_steps // self._geometry.gradient_accumulation_steps
        self._micro_steps += 1
        self._kept.append((step, self._first_position + offset, tokens, companions))
        self._kept_bytes += tokens.nbytes + sum(array.nbytes for array in companions)
        if self._kept_bytes > _KEPT_BYTES:
            self._digest_kept()

    def take(self) -> dict[int, int]:
        """Return the sums since the last call, by step."""
        self._digest_kept()
        sums, self._sums = self._sums, {}
        return sums

    def _digest_kept(self) -> None:
        for step, first_position, tokens, companions in self._kept:
            positions = range(first_position, first_position + len(tokens))
            digest = batch_digest(tokens, positions, companions)
            self._sums[step] = (self._sums.get(step, 0) + digest) % MODULUS
        self._kept.clear()
        self._kept_bytes = 0


def collect_digests(
    groups: ProcessGroups, consumed: ConsumedDigests | None, error: Exception | None = None
) -> dict[int, int]:
    """Return the digests of the steps done since the last call, on every rank. Collective.

    Args:
        groups: of this rank.
        consumed: what it read; None: it doesn't read.
        error: what went wrong here since the last call; the same gather tells the others of it.

    Raises:
        Exception, PeerFailedError: on every rank, if one had an ``error``; see
            :func:`megatron.engine.agreement.together`.
        RunDirectoryError: first and last pipeline stage read different samples.
    """
    mine = consumed.take() if consumed is not None else {}
    gathered = groups.gather((mine, report_of(error)))
    raise_together(error, [report for _, report in gathered])
    last_stage = groups.topology.pipeline_parallel_size - 1
    sums: dict[int, dict[int, int]] = {0: {}, last_stage: {}}
    for rank, (of_rank, _) in enumerate(gathered):
        stage = groups.topology.coordinates(rank).pipeline_stage
        for step, digest in of_rank.items():
            totals = sums[stage]
            totals[step] = (totals.get(step, 0) + digest) % MODULUS
    return agreed_digests(sums[0], sums[last_stage])
