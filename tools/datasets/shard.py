"""Cut a dataset into shards, join shards, or check files against a list of SHA-256 sums.

Training, all tools and neox-ledger read shards in place; nobody has to join them first.

Examples:
    python tools/datasets/shard.py cut data/pile_text_document parts/pile --bytes 5000000000
    python tools/datasets/shard.py join parts/pile data/whole
    python tools/datasets/shard.py verify shard_hashes.txt --folder pythia_deduped_pile_idxmaps
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import MegatronError
from megatron.cli.ledger.progress import progress
from megatron.data.shard_files import check_files, cut_dataset, join_dataset, read_checksums

PYTHIA_SHARD_BYTES = 5_000_000_000


def main(input_args: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status: 1 if `verify` found a difference.

    Raises:
        DatasetError: a dataset or list cannot be used; nothing is written.
    """
    options = _parser().parse_args(input_args)
    if options.command == "verify":
        return _verify(options.list, options.folder or options.list.parent)
    with progress(options.command) as on_progress:
        if options.command == "cut":
            written = cut_dataset(options.source, options.target, options.bytes, on_progress)
        else:
            written = join_dataset(options.source, options.target, on_progress)
    sums = options.target.with_name(f"{options.target.name}.sha256")
    write_atomically(sums, "".join(f"{digest}  {name}\n" for name, digest in written.items()))
    print(f"{options.target}: {len(written) - 1} token file(s) and the index; sums in {sums}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("cut", "into shards"), ("join", "into one file")):
        command = commands.add_parser(name, help=what)
        command.add_argument("source", type=Path, help="dataset, without .bin and .idx")
        command.add_argument("target", type=Path, help="new dataset, without .bin and .idx")
        if name == "cut":
            command.add_argument(
                "--bytes", type=int, default=PYTHIA_SHARD_BYTES, help="of a shard (%(default)s)"
            )
    verify = commands.add_parser("verify", help="files against their SHA-256")
    verify.add_argument("list", type=Path, help="lines of `hash  name` or `name hash`")
    verify.add_argument("--folder", type=Path, help="where the files are; default: the list's")
    return parser


def _verify(sums: Path, folder: Path) -> int:
    checksums = read_checksums(sums)
    with progress("verify") as on_progress:
        missing, different = check_files(folder, checksums, on_progress)
    for name in missing:
        print(f"missing    {folder / name}")
    for name in different:
        print(f"different  {folder / name}: its SHA-256 isn't {checksums[name]}")
    same = len(checksums) - len(missing) - len(different)
    print(f"{same} of {len(checksums)} files are as listed in {sums}")
    return 1 if missing or different else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MegatronError, OSError) as error:
        sys.exit(f"error: {error}")
