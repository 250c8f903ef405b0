"""``neox-ledger export A..B``: what steps read, as files."""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import ConfigError, RunDirectoryError
from megatron.cli.data_of_steps import data_of_config, read_config
from megatron.cli.ledger.options import (
    add_data_option,
    add_json_option,
    add_source_options,
    add_stream_option,
    step_range,
)
from megatron.cli.ledger.output import counted, note, print_json, say
from megatron.cli.ledger.progress import progress
from megatron.cli.pythia_data import PYTHIA_DATA, config_of_pythia
from megatron.config.run_config import RunConfig
from megatron.ledger.queries.export import NpyWriter, ParquetWriter, Writer, batches, export
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.samples import StepFrame, planned_frame, step_frame
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_stream import Stream

EPILOG = """An output that ends in .parquet becomes one file with a row per sample; any other a
folder:
  tokens.npy     (samples, seq_length + 1), in the dataset's storage type
  positions.npy  (samples,), positions of the stream
  steps.npy      (samples,)
  documents.npy  (parts, 4): sample, document, first token, token after the last
  samples.jsonl  one object per sample: rank, micro step, row, dataset, and its text

Steps are those of a run, of the launch that CONFIG describes, or of Pythia's models. For those the
data set alone is needed: tokenised (its index maps are used, or built beside it) or preshuffled.

examples:
  neox-ledger export 990..1000 --run runs/pythia --output steps
  neox-ledger export 1000 --run runs/pythia --output step.parquet --tokenizer 20B_tokenizer.json
  neox-ledger export 1..2 configs/pythia/160M.yml --world-size 32 --output steps
  neox-ledger export 3001 --pythia deduped --data pile-deduped-pythia-preshuffled/document \\
      --output step3001"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("steps", type=step_range, metavar="A..B", help="steps, both included")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="see below")
    add_source_options(parser)
    parser.add_argument(
        "--pythia",
        choices=PYTHIA_DATA,
        metavar="SET",
        help="Pythia's own steps: standard, deduped, or seed1 to seed9 of the PolyPythias; --data "
        "names the data set, else it is looked for where configs/pythia does",
    )
    add_stream_option(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="add text: the vocabulary file")
    parser.add_argument("--merge-file", metavar="FILE", help="BPE merges, if it has them apart")
    parser.add_argument(
        "--tokenizer-type",
        metavar="TYPE",
        help="NeoX's name; default: what the run was trained with",
    )
    add_data_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Write the files; they get their names when they are complete."""
    output: Path = options.output
    if output.exists():
        raise RunDirectoryError(f"{output} exists; name another output, or remove it")
    asked = _asked(options)
    detokenize = _detokenizer(asked, options)
    partial = output.with_name(f".{output.name}.partial")
    _remove(partial)
    try:
        writer: Writer
        writer = ParquetWriter(partial) if output.suffix == ".parquet" else NpyWriter(partial)
        found = batches(asked.frames, asked.open_order, detokenize=detokenize)
        with progress("steps") as on_step:
            samples = export(found, writer, num_steps=len(options.steps), on_step=on_step)
        partial.rename(output)
    except BaseException:
        _remove(partial)
        raise
    if options.json:
        print_json({"output": str(output), "steps": len(options.steps), "samples": samples})
    else:
        say(f"{output}: {counted(samples, 'sample')} of {counted(len(options.steps), 'step')}")
    return 0


@dataclass(frozen=True)
class _Asked:
    """The steps that are asked for."""

    frames: list[StepFrame]
    open_order: Callable[[OrderDescription], Stream]
    tokenizer_type: str | None


def _asked(options: argparse.Namespace) -> _Asked:
    named = [bool(options.configs), options.run is not None, options.pythia is not None]
    if sum(named) > 1:
        raise ConfigError("name configuration files, --run or --pythia, only one of them")
    if options.pythia is not None:
        if len(options.data) > 1:
            raise ConfigError(f"--pythia {options.pythia} reads one data set: give one --data")
        prefix = options.data[0] if options.data else None
        return _planned(config_of_pythia(options.pythia, prefix), (), options)
    if options.configs:
        config = read_config(options.configs, world_size=options.world_size)
        return _planned(config, options.data, options)
    view = open_run(options.run or Path())
    if options.stream == "train" and options.steps.stop - 1 > view.ledger.step:
        note(f"steps after {view.ledger.step} are not done yet; what they would read is exported")
    known = view.ledger.tokenizer
    return _Asked(
        [step_frame(view, step, options.stream) for step in options.steps],
        RunData(view.ledger.datasets, options.data).stream,
        None if known is None else known.type,
    )


def _planned(config: RunConfig, prefixes: Sequence[str], options: argparse.Namespace) -> _Asked:
    source = data_of_config(config, prefixes, on_note=lambda text: note(f"note: {text}"))
    steps = source.steps(options.stream)
    return _Asked(
        [planned_frame(steps, step, options.stream) for step in options.steps],
        source.opened(options.stream),
        config.tokenizer.tokenizer_type,
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _detokenizer(asked: _Asked, options: argparse.Namespace) -> Callable[[list[int]], str] | None:
    if options.tokenizer is None:
        return None
    from megatron.data.tokenizers import build_tokenizer

    kind = options.tokenizer_type or asked.tokenizer_type
    if kind is None:
        raise ConfigError("the ledger does not say which tokenizer it was; give --tokenizer-type")
    tokenizer = build_tokenizer(kind, vocab_file=options.tokenizer, merge_file=options.merge_file)
    return lambda ids: str(tokenizer.detokenize(ids))
