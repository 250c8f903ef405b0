"""``neox-ledger export A..B``: what steps read, as files."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron.base.errors import ConfigError, RunDirectoryError
from megatron.cli.ledger.options import (
    add_data_option,
    add_json_option,
    add_run_option,
    add_stream_option,
    opened_run,
    step_range,
)
from megatron.cli.ledger.output import counted, note, print_json, say
from megatron.cli.ledger.progress import progress
from megatron.ledger.queries.export import NpyWriter, ParquetWriter, Writer, batches, export
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView

EPILOG = """An output that ends in .parquet becomes one file with a row per sample; any other a
folder:
  tokens.npy     (samples, seq_length + 1), in the dataset's storage type
  positions.npy  (samples,), positions of the stream
  steps.npy      (samples,)
  documents.npy  (parts, 4): sample, document, first token, token after the last
  samples.jsonl  one object per sample: rank, micro step, row, dataset, and its text

examples:
  neox-ledger export 990..1000 --run runs/pythia --output steps
  neox-ledger export 1000 --run runs/pythia --output step.parquet --tokenizer 20B_tokenizer.json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("steps", type=step_range, metavar="A..B", help="steps, both included")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="see below")
    add_run_option(parser)
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
    view = opened_run(options)
    data = RunData(view.ledger.datasets, options.data)
    detokenize = _detokenizer(view, options)
    if options.stream == "train" and options.steps.stop - 1 > view.ledger.step:
        note(f"steps after {view.ledger.step} are not done yet; what they would read is exported")
    partial = output.with_name(f".{output.name}.partial")
    _remove(partial)
    try:
        writer: Writer
        writer = ParquetWriter(partial) if output.suffix == ".parquet" else NpyWriter(partial)
        found = batches(view, data, options.steps, stream=options.stream, detokenize=detokenize)
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _detokenizer(view: RunView, options: argparse.Namespace) -> Callable[[list[int]], str] | None:
    if options.tokenizer is None:
        return None
    from megatron.data.tokenizers import build_tokenizer

    known = view.ledger.tokenizer
    kind = options.tokenizer_type or (None if known is None else known.type)
    if kind is None:
        raise ConfigError("the ledger does not say which tokenizer it was; give --tokenizer-type")
    tokenizer = build_tokenizer(kind, vocab_file=options.tokenizer, merge_file=options.merge_file)
    return lambda ids: str(tokenizer.detokenize(ids))
