"""Write a checkpoint of ours or NeoX's as a Hugging Face GPTNeoXForCausalLM.

Example:
    python tools/ckpts/convert_neox_to_hf.py runs/pythia/global_step143000 hub/pythia
    python tools/ckpts/convert_neox_to_hf.py --input_dir runs/pythia/global_step143000 \
        --config_file merged.yml --output_dir hub/pythia        (as NeoX spells it)
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import MegatronError
from megatron.checkpoint.hugging_face.architecture import HIDDEN_ACTS
from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.checkpoint.hugging_face.values import DTYPES
from megatron.checkpoint.reshape.offline import find_checkpoint

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the tool with ``input_args``, or with the command line's.

    Raises:
        MegatronError: the checkpoint is damaged or can't be expressed; nothing is written.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a global_stepN, or a directory with `latest`"
    )
    parser.add_argument("output", type=Path, nargs="?", help="a new directory")
    parser.add_argument("--input_dir", type=Path, help="the checkpoint, as NeoX spells it")
    parser.add_argument("--output_dir", type=Path, help="the new directory, as NeoX spells it")
    parser.add_argument(
        "--config",
        "--config_file",
        type=Path,
        nargs="+",
        default=[],
        help="instead of the checkpoint's configs/",
    )
    parser.add_argument(
        "--precision", "--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as stored"
    )
    parser.add_argument(
        "--vocab-size",
        type=_rows,
        help="rows of the vocabulary; all that were trained if not given",
    )
    parser.add_argument(
        "--cut-padding", action="store_true", help="as many rows as the tokenizer has entries"
    )
    parser.add_argument(
        "--hidden-act", choices=[*HIDDEN_ACTS], help="what computes as the configuration does"
    )
    parser.add_argument("--pad-token-id", type=int)
    parser.add_argument("--max-shard-size", type=_bytes, default=_bytes("5GB"), help="5GB")
    parser.add_argument("--no_save_tokenizer", action="store_true")
    parser.add_argument("--architecture", choices=["neox"], default="neox")
    options = parser.parse_args(input_args)
    checkpoint = options.input_dir or options.checkpoint
    output = options.output_dir or options.output
    if checkpoint is None or output is None:
        parser.error("name a checkpoint and a new directory")
    if not any(checkpoint.glob("*model_states.pt")):
        checkpoint = find_checkpoint(checkpoint)
    settings = ExportSettings(
        dtype=DTYPES.get(options.precision),
        vocab_size=options.vocab_size,
        cuts_padding=options.cut_padding,
        hidden_act=options.hidden_act,
        pad_token_id=options.pad_token_id,
        copies_tokenizer=not options.no_save_tokenizer,
        max_shard_bytes=options.max_shard_size,
        config_files=options.config,
    )
    written = export_model(checkpoint, output, settings)
    print(f"{written.path}: {written.num_files} files, {written.num_bytes:,} bytes")
    for notice in written.notices:
        print(f"note: {notice}")


def _rows(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"is no number of rows: {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"is no size such as 5GB: {text!r}")
    return int(match[1]) * _UNITS[match[2]]


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
