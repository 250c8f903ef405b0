"""Is a step's loss on the batch after it where its neighbours' losses say it should be?

Loss falls with training, so that on any batch an earlier step has the higher loss and a later one
the lower. It is no proof: of two steps near each other in time either may be the better on a few
samples.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron.base.errors import CheckpointError, DatasetError
from megatron.cli.data_of_steps import data_of_config
from megatron.cli.pythia.downloaded import open_downloaded, step_named
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.losses import sample_losses
from megatron.cli.pythia.models import ReleasedModel
from megatron.cli.pythia_data import config_with_data

__all__ = ["LossCheck", "loss_findings"]

_ALLOWED_NATS = 0.05
_STANDARD_ERRORS = 4  # of the mean difference, sample by sample
_HAS_LEARNT = 512  # steps after which a model knows more than how many tokens there are


@dataclass(frozen=True, kw_only=True)
class LossCheck:
    """On what the loss is computed."""

    prefix: str  # data set, tokenised or preshuffled
    num_samples: int  # the first of the batch
    device: str = "cpu"


def loss_findings(
    directory: Path,
    model: ReleasedModel,
    step: int,
    against: Sequence[Path],
    how: LossCheck,
    *,
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[Finding]:
    """Compare the loss on the batch after a step with that of other steps.

    Args:
        directory: the step, which was found to be the model's.
        model: what it is of.
        step: as branches count.
        against: other steps of the run; their paths say which.
        how: on what.
        on_note: told what had to be assumed.
    """
    iteration = model.iteration(step)
    if iteration == model.config.training.train_iters:
        yield Finding("note", f"no loss was computed: step {step} is the last, no batch follows it")
        return
    try:
        samples = _samples_after(iteration, model, how, on_note)
    except DatasetError as error:
        yield Finding("note", f"no loss was computed: {error}")
        return

    def losses(path: Path, at: int | None) -> list[float]:
        opened = open_downloaded(path, model.settings, iteration=at)
        return sample_losses(opened, model.settings, samples, device=how.device).tolist()

    try:
        here = losses(directory, iteration)
        others = {}
        for path in against:
            other = step_named(path)
            if other is not None and other != step:
                others[other] = losses(path, model.iteration(other))
    except CheckpointError as error:
        yield Finding("unknown", str(error))
        return
    mean = statistics.mean(here)
    beside = "".join(
        f", at step {other} {statistics.mean(found):.4f}" for other, found in sorted(others.items())
    )
    yield Finding(
        "note",
        f"loss on the first {len(here)} samples of step {iteration + 1}'s batch: {mean:.4f}"
        f"{beside}",
    )
    guessing = math.log(model.num_tokens or model.settings.padded_vocab_size)
    if iteration >= _HAS_LEARNT and mean > guessing - 1:
        yield Finding(
            "warning",
            f"a loss of {mean:.4f} is hardly better than guessing, {guessing:.4f}, after {step} "
            "steps: are weights and tokenizer of one model?",
        )
    for other, found in sorted(others.items()):
        yield from _compared(step, here, other, found)


def _compared(
    step: int, here: Sequence[float], other: int, there: Sequence[float]
) -> Iterator[Finding]:
    sign = 1 if other < step else -1
    excess = [sign * (mine - theirs) for mine, theirs in zip(here, there, strict=True)]
    mean = statistics.mean(excess)
    error = statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    if mean > max(_ALLOWED_NATS, _STANDARD_ERRORS * error):
        when, word = ("earlier", "higher") if other < step else ("later", "lower")
        yield Finding(
            "warning",
            f"the loss is {mean:.4f} nats {word} than that of the {when} step {other} (standard "
            f"error {error:.4f}): one of the two may be another step",
        )


def _samples_after(
    iteration: int, model: ReleasedModel, how: LossCheck, on_note: Callable[[str], None]
) -> torch.Tensor:
    """Return the first samples that step ``iteration + 1`` reads.

    Raises:
        DatasetError: they aren't there.
    """
    config = config_with_data(model.files, how.prefix)
    source = data_of_config(config, on_note=on_note)
    (piece,) = source.steps("train").pieces(range(iteration + 1, iteration + 2))
    positions = np.array(piece.positions[: how.num_samples], dtype=np.int64)
    return torch.from_numpy(source.opened("train")(piece.order).read(positions).astype(np.int64))
