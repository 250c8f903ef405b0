"""Tokenize text files into a `.bin`/`.idx` dataset for training.

Example:
    python tools/datasets/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \
        --tokenizer-type HFTokenizer --vocab-file 20B_tokenizer.json --append-eod --workers 8

Writes data/corpus_text_document.bin and .idx, one document per line, in the order of the input.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import MegatronError
from megatron.data.preprocess import Tokenizing, write_datasets
from megatron.data.text_files import find_text_files, iterate_documents
from megatron.data.tokenizers import TOKENIZER_TYPES

_SECONDS_BETWEEN_LINES = 10.0  # of progress, where the output is a file and not a terminal


def get_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of ``input_args``, or of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        required=True,
        help="files or folders, separated by commas: .jsonl or .txt, plain, .gz or .zst; or .zip",
    )
    source.add_argument(
        "--jsonl-keys",
        nargs="+",
        default=["text"],
        help="keys of the .jsonl objects; each gives a dataset of its own (default: text)",
    )
    source.add_argument(
        "--num-docs", type=int, help="documents in the input, if known, for the time left"
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type",
        type=_tokenizer_type,
        required=True,
        help=", ".join(TOKENIZER_TYPES) + "; in any case",
    )
    tokenizer.add_argument("--vocab-file", help="vocabulary; what it is depends on the type")
    tokenizer.add_argument("--merge-file", help="BPE merges, for GPT2BPETokenizer")
    tokenizer.add_argument(
        "--append-eod", action="store_true", help="end every document with <|endoftext|>"
    )
    tokenizer.add_argument("--ftfy", action="store_true", help="repair broken Unicode first")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix", required=True, help="datasets are named PREFIX_KEY_document"
    )
    output.add_argument(
        "--dataset-impl",
        choices=("lazy", "cached", "mmap"),
        default="mmap",
        help="only mmap; NeoX's older formats cannot be trained from",
    )
    output.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    output.add_argument(
        "--log-interval", type=int, default=100, help="documents between progress reports"
    )
    options = parser.parse_args(input_args)
    if options.dataset_impl != "mmap":
        parser.error(f"--dataset-impl {options.dataset_impl} is not supported; use mmap")
    if options.workers < 1 or options.log_interval < 1:
        parser.error("--workers and --log-interval must be at least 1")
    return options


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the tool with ``input_args``, or with the command line's.

    Raises:
        MegatronError: the input or the tokenizer cannot be used; nothing is written.
    """
    options = get_args(input_args)
    tokenizing = Tokenizing(
        options.tokenizer_type,
        options.vocab_file,
        options.merge_file,
        append_eod=options.append_eod,
        fix_text=options.ftfy,
    )
    files = find_text_files([Path(name) for name in options.input.split(",")])
    prefixes = [Path(f"{options.output_prefix}_{key}_document") for key in options.jsonl_keys]
    print(f"Vocab size: {tokenizing.build_tokenizer().vocab_size}")
    print(f"Output prefix: {options.output_prefix}", flush=True)
    progress = _Progress(options.log_interval, options.num_docs)
    counts = write_datasets(
        iterate_documents(files, options.jsonl_keys),
        prefixes,
        tokenizing,
        num_workers=options.workers,
        on_progress=progress.add,
    )
    progress.finish()
    for prefix, count in zip(prefixes, counts, strict=True):
        dropped = count.num_without_tokens
        note = f"; {dropped} documents gave no token and were left out" if dropped else ""
        print(f"{prefix}: {count.num_documents} documents, {count.num_tokens} tokens{note}")


def _tokenizer_type(name: str) -> str:
    known = {known.lower(): known for known in TOKENIZER_TYPES}
    if name.lower() not in known:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not known; choose one of {', '.join(TOKENIZER_TYPES)}"
        )
    return known[name.lower()]


class _Progress:
    """One line on a terminal, or a line now and then in a log file."""

    def __init__(self, interval: int, num_expected: int | None) -> None:
        self._interval = interval
        self._num_expected = num_expected
        self._started = self._last_line = time.monotonic()
        self._num_documents = 0
        self._num_bytes = 0
        self._num_reported = 0

    def add(self, num_documents: int, num_bytes: int) -> None:
        self._num_documents += num_documents
        self._num_bytes += num_bytes
        if self._num_documents - self._num_reported < self._interval:
            return
        now = time.monotonic()
        if sys.stderr.isatty():
            self._report(now, end="\r")
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._report(now, end="\n")

    def finish(self) -> None:
        self._report(time.monotonic(), end="\n")

    def _report(self, now: float, *, end: str) -> None:
        seconds = max(now - self._started, 1e-9)
        rate = self._num_documents / seconds
        line = f"{self._num_documents} documents, {rate:.0f} documents/s, "
        line += f"{self._num_bytes / seconds / 1e6:.2f} MB/s"
        if self._num_expected is not None and self._num_documents < self._num_expected and rate:
            line += f", {(self._num_expected - self._num_documents) / rate:.0f} s left"
        print(f"{line:<78}", end=end, file=sys.stderr, flush=True)
        self._last_line = now
        self._num_reported = self._num_documents


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
