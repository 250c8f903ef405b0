"""Does the loaded model compute what the saved one did
(``checkpoint_validation_with_forward_pass``)?

Digests say that the files are those that were written. This says that the model built from them
answers like the one that was saved: another rotary base, a layer read into the wrong place, a
kernel gone wrong show here, and nowhere else before the loss does.

The tokens are those of the micro batch that training would read next. They are read by position,
beside the loader, and the model runs in evaluation mode, which draws no random numbers: training
goes on as without the check. All data-parallel ranks run the same micro batch. Of the answer to its
first sample some rows of logits are kept, over the whole vocabulary, so that a model at any other
topology can be compared.
"""

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored_answer import (
    StoredAnswer,
    answer_places,
    answer_state,
    neox_tokens,
)
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups

__all__ = ["ForwardCheck"]

# Largest difference, as a share of the largest logit, that another order of summation makes.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class ForwardCheck:
    """Runs a micro batch through an engine's model. Both methods are collective."""

    groups: ProcessGroups
    engine: Any  # DeepSpeed's
    micro_batch_size: int  # samples the engine takes at a time
    seq_length: int  # tokens the model sees
    vocabulary_size: int  # entries of the pinned vocabulary

    @property
    def precision(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.engine.module.parameters()).dtype

    def state(self, position: int, tokens: NDArray[np.integer[Any]] | None) -> dict[str, Any]:
        """Return what this rank's model-states file keeps: nothing before the last stage.

        Args:
            position: of the first sample in the training stream, on rank 0.
            tokens: a micro batch, (micro_batch_size, seq_length + 1), on rank 0.
        """
        sent = None if tokens is None else (position, np.asarray(tokens, dtype=np.int64))
        position, batch = self.groups.from_rank_0(sent)
        logits = self._logits(batch)
        has_neox_tokens = self.seq_length < self.vocabulary_size
        neox = (
            self._logits(neox_tokens(self.seq_length, self.micro_batch_size))
            if has_neox_tokens
            else None
        )
        if logits is None:
            return {}
        places = answer_places(self.seq_length)
        answer = StoredAnswer(
            batch, places, self._whole_rows(logits[0, places]), position, self._conditions()
        )
        return answer_state(answer, None if neox is None else neox[0].detach().cpu().clone())

    def compare(self, stored: StoredAnswer, *, source: str) -> str:
        """Compare the model's answer with the stored one, which every rank has.

        Args:
            stored: the answer.
            source: the checkpoint it is from, for messages.

        Returns:
            A line for the user.

        Raises:
            CheckpointError: on every rank: the model answers otherwise.
        """
        logits = self._logits(_fitted(stored.tokens, self.micro_batch_size, self.seq_length))
        kept = [n for n, place in enumerate(stored.places) if place < self.seq_length]
        rows = (
            None
            if logits is None
            else self._whole_rows(logits[0, [stored.places[n] for n in kept]])
        )
        allowed = self._allowed(stored)

        def judge() -> float:
            if rows is None:
                return 0.0
            difference = _largest_difference(rows, stored.logits[kept])
            if not difference.share <= allowed:  # NaN is not
                raise CheckpointError(self._complaint(difference, stored, allowed, source))
            return difference.share

        largest = max(self.groups.gather(together(self.groups, judge)))
        how = "bit for bit" if largest == 0 else f"up to {largest:.1e} of the largest logit"
        return f"forward-pass check: the model answers as it did when {source} was saved, {how}"

    def _logits(self, tokens: NDArray[np.int64]) -> torch.Tensor | None:
        """Return this rank's columns of the logits on the last stage, None elsewhere."""
        engine = self.engine
        batch = torch.from_numpy(tokens).to(self.groups.device)
        inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        if self.groups.topology.uses_pipeline_engine:
            mask = torch.ones(labels.shape, device=labels.device)
            _, logits = engine.eval_batch(
                iter([(inputs, (labels, mask))]), return_logits=True, num_micro_batches=1
            )
        else:
            engine.eval()
            with torch.no_grad():
                logits = engine(inputs)
        engine.train()
        return logits

    def _whole_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of logits with the columns of all tensor ranks, in float32 on the CPU."""
        rows = rows.detach().float().contiguous()
        size = self.groups.topology.tensor_parallel_size
        if size > 1:
            parts = [torch.empty_like(rows) for _ in range(size)]
            torch.distributed.all_gather(parts, rows, group=self.groups.tensor)
            rows = torch.cat(parts, dim=-1)
        return rows[:, : self.vocabulary_size].cpu().clone()

    def _conditions(self) -> dict[str, Any]:
        """Return all that decides in which order numbers are summed, as plain values."""
        topology = self.groups.topology
        return {
            "model_parallel_size": topology.tensor_parallel_size,
            "pipe_parallel_size": (
                topology.pipeline_parallel_size if topology.uses_pipeline_engine else 0
            ),
            "micro_batch_size": self.micro_batch_size,
            "seq_length": self.seq_length,
            "precision": str(self.precision),
            "device": self.groups.device.type,
            "machine": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def _allowed(self, stored: StoredAnswer) -> float:
        # A GPU's kernels may be chosen anew by every process.
        if self.groups.device.type == "cpu" and stored.conditions == self._conditions():
            return 0.0
        then = stored.conditions.get("precision", str(torch.float16))  # NeoX doesn't say
        known = [_TOLERANCE[one] for one in _TOLERANCE if str(one) == then]
        return max(_TOLERANCE[self.precision], *known)

    def _complaint(
        self, difference: "_Difference", stored: StoredAnswer, allowed: float, source: str
    ) -> str:
        if stored.position is None:
            sample = "NeoX's tokens 0, 1, 2, ..."
        else:
            sample = f"the sample at position {stored.position}"
        now = self._conditions()
        changed = [
            f"{name} was {value}, is {now.get(name)}"
            for name, value in stored.conditions.items()
            if now.get(name) != value
        ]
        return (
            f"the model does not answer as it did when {source} was saved: the largest difference "
            f"of two logits is {difference.largest:.3g} (the largest logit: {difference.scale:.3g})"
            f", after token {stored.places[difference.row]} of {sample}, where entry "
            f"{difference.column} of the vocabulary gets {difference.found:.6g} instead of "
            f"{difference.expected:.6g}. "
            + (
                f"Rounding alone makes less than {allowed:g} of the largest logit"
                if allowed
                else ""
            )
            + ("" if allowed else "Under the same conditions nothing may differ")
            + (f" ({'; '.join(changed)})" if changed else "")
            + ". A key that acts on the model's numbers was changed, or the software computes "
            "otherwise; to go on all the same set checkpoint_validation_with_forward_pass: false"
        )


@dataclass(frozen=True)
class _Difference:
    """Where two tables of logits differ most."""

    largest: float
    scale: float  # largest absolute expected value
    row: int
    column: int
    found: float
    expected: float

    @property
    def share(self) -> float:
        return self.largest / self.scale if self.scale else self.largest


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> _Difference:
    apart = torch.where(found == expected, 0.0, (found - expected).abs())
    apart = apart.nan_to_num(nan=float("inf"))
    row, column = divmod(int(apart.argmax()), apart.shape[1])
    return _Difference(
        largest=float(apart[row, column]),
        scale=float(expected.abs().nan_to_num(nan=0.0, posinf=0.0).max()),
        row=row,
        column=column,
        found=float(found[row, column]),
        expected=float(expected[row, column]),
    )


def _fitted(tokens: NDArray[np.int64], num_samples: int, seq_length: int) -> NDArray[np.int64]:
    """Return as many samples of the length the engine takes, the first one the same.

    Neither the other samples nor later tokens act on the logits after a token.
    """
    rows = np.resize(tokens, (num_samples, tokens.shape[1]))
    return np.pad(rows, ((0, 0), (0, max(0, seq_length + 1 - rows.shape[1]))))[:, : seq_length + 1]
