"""What a run tells its user: NeoX's console lines, a progress bar, TensorBoard and W&B.

One rank reports. NeoX's line formats and metric names are kept (spec/training.md §6 and §7), so
that scripts which parse logs go on working.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from megatron.engine.throughput import format_flops
from megatron.ledger.attempts import StepRecord

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["MetricWriter", "Reporter", "TensorBoardWriter", "WandbWriter"]


class MetricWriter(Protocol):
    """Where metrics go, by name and step."""

    def write(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Metrics as TensorBoard scalars; the configuration as text."""

    def __init__(self, directory: str, configuration: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional: only if a folder is named

        self._writer = SummaryWriter(log_dir=directory)
        for key, value in configuration.items():
            self._writer.add_text(key, str(value))

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Metrics in a Weights & Biases run."""

    def __init__(self, configuration: Mapping[str, Any], **identity: Any) -> None:
        import wandb  # costs a second: only if it is used

        self._run = wandb.init(config=dict(configuration), save_code=False, **identity)

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


@dataclass
class _Interval:
    """Sums since the last console line."""

    started: float
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    nans: int = 0
    steps: int = 0


class Reporter:
    """Turns step records into lines and metrics. Silent on every rank but the reporting one."""

    def __init__(
        self,
        *,
        train_iters: int,
        log_interval: int | None,
        flops_per_step: float,
        flops_per_step_without_recompute: float,
        world_size: int,
        tokens_per_sample: int,
        peak_tflops: float | None = None,
        writers: Sequence[MetricWriter] = (),
        is_silent: bool = False,
    ) -> None:
        self._train_iters = train_iters
        self._log_interval = log_interval
        self._flops = flops_per_step
        self._model_flops = flops_per_step_without_recompute
        self._world_size = world_size
        self._tokens_per_sample = tokens_per_sample
        self._peak_tflops = peak_tflops
        self._writers = writers
        self._is_silent = is_silent
        self._interval = _Interval(started=time.perf_counter())
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, step: int) -> None:
        """Begin reporting; ``step`` is the last one already done."""
        self._interval = _Interval(started=time.perf_counter())
        if self._is_silent or not sys.stdout.isatty():
            return
        self._progress = _progress_bar()
        self._task = self._progress.add_task(
            "train", total=self._train_iters, completed=step, loss="-"
        )
        self._progress.start()

    def step(self, record: StepRecord, *, loss_scale: float | None) -> None:
        """Report one finished step."""
        if self._is_silent:
            return
        interval = self._interval
        interval.steps += 1
        interval.skipped += record.skipped
        is_nan = not math.isfinite(record.loss)
        interval.nans += is_nan
        if not record.skipped:
            interval.losses.append(record.loss)
        metrics = {"train/learning_rate": record.lr, "train/lm_loss": record.loss}
        if loss_scale is not None:
            metrics["train/loss_scale"] = loss_scale
        self._write(metrics, record.step)
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, loss=f"{record.loss:.4f}")
        if self._log_interval and record.step % self._log_interval == 0:
            self._console_line(record, loss_scale)
            self._interval = _Interval(started=time.perf_counter())

    def evaluation(self, name: str, loss: float, *, step: int, when: str) -> None:
        """Report an evaluation's mean loss. ``name`` is ``validation`` or ``test``."""
        if self._is_silent:
            return
        perplexity = math.exp(min(loss, 700.0))  # exp(710) leaves float64
        self._write({f"{name}/lm_loss": loss, f"{name}/lm_loss_ppl": perplexity}, step)
        line = (
            f" {name} results at {when} | lm_loss value: {loss:.6E} "
            f"| lm_loss_ppl value: {perplexity:.6E} | "
        )
        dashes = "-" * len(line)
        self.line(f"{dashes}\n{line}\n{dashes}")

    def line(self, text: str) -> None:
        """Print ``text`` without tearing the progress bar."""
        if self._is_silent:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)  # noqa: T201 - the log

    def close(self) -> None:
        """Stop the progress bar and close every writer."""
        if self._progress is not None:
            self._progress.stop()
        for writer in self._writers:
            writer.close()

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        for writer in self._writers:
            writer.write(metrics, step)

    def _console_line(self, record: StepRecord, loss_scale: float | None) -> None:
        interval = self._interval
        seconds = (time.perf_counter() - interval.started) / interval.steps
        samples_per_s = record.samples / seconds
        flops_per_gpu = self._flops / (seconds * self._world_size)
        mean_loss = sum(interval.losses) / max(1, len(interval.losses))
        parts = [
            f" samples/sec: {samples_per_s:.3f}",
            f"iteration {record.step:8d}/{self._train_iters:8d}",
            f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
            f"learning rate: {record.lr:.3E}",
            f"approx flops per GPU: {format_flops(flops_per_gpu)}",
        ]
        runtime = {
            "runtime/samples_per_sec": samples_per_s,
            "runtime/iteration_time": seconds,
            "runtime/steps_per_sec": 1.0 / seconds,
            "runtime/tokens_per_sec": samples_per_s * self._tokens_per_sample,
            "runtime/flops_per_sec_per_gpu": flops_per_gpu,
        }
        if self._peak_tflops:
            hardware = flops_per_gpu / (self._peak_tflops * 1e12)
            model = hardware * self._model_flops / self._flops
            parts += [f"MFU: {model:.2%}", f"HFU: {hardware:.2%}"]
            runtime["runtime/model_flops_utilization"] = model
            runtime["runtime/hardware_flops_utilization"] = hardware
        parts.append(f"lm_loss: {mean_loss:.6E}")
        if loss_scale is not None:
            parts.append(f"loss scale: {loss_scale:.1f}")
        parts += [
            f"number of skipped iterations: {interval.skipped:3d}",
            f"number of nan iterations: {interval.nans:3d} |",
        ]
        self._write(runtime, record.step)
        self.line(" | ".join(parts))


def _progress_bar() -> "Progress":
    # Imported only if there is a terminal: 0.1 s of the start of every rank.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(),  # stdout: deepy.py gives rank 0 the terminal's
    )
