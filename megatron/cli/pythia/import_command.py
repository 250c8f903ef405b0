"""``tools/pythia.py import``: a checkpoint to go on from, made of a download."""

import argparse
import re
from pathlib import Path

from megatron.base.errors import ConfigError
from megatron.cli.ledger.output import number, say
from megatron.cli.pythia.check import add_model_options, chosen_model, downloaded_directory
from megatron.cli.pythia.findings import GOOD
from megatron.cli.pythia.importing import (
    Imported,
    import_step,
    import_with_moments_of,
    require_no_moments,
)
from megatron.cli.pythia.models import ReleasedModel
from megatron.cli.pythia.warm_up import import_warm

__all__ = ["add_import"]

_EPILOG = """The download is checked first, and refused if its content proves it wrong. What is
written is like a run's save: launch with `load: SAVE` and a `save` of your own, at any topology.
The launch adopts it: it works out from the configuration kept in SAVE what the steps so far
consumed, prints that, and goes on behind it.

moments of Adam (--moments):
  cold          zeros; all that Hugging Face's files allow. The first updates are too large
  warm:K        those of the K batches before the step at the step's weights, gathered in K steps of
                an ordinary launch at learning rate 0; --launch names this machine's keys
  from NEOX     those of the step's NeoX checkpoint, with its masters and loss scale, exact. Its
                weights must be those of --from
A NeoX directory with optimizer state under --from is taken with its moments, exact.

examples:
  tools/pythia.py import --model pythia-160m-deduped --step 3000 \\
      --from downloads/step3000 --to runs/start && \\
  python deepy.py train.py configs/pythia/160M-deduped.yml my-machine.yml"""


def add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "import",
        help="make a checkpoint to go on from",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--step", type=int, required=True, help="the branch: 3000 for step3000")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="what was downloaded; or a name on the hub, whose branch stepN is then downloaded",
    )
    parser.add_argument(
        "--to", dest="save", type=Path, required=True, metavar="SAVE", help="a new directory"
    )
    parser.add_argument(
        "--moments",
        nargs="+",
        metavar="HOW",
        help="see below; default: those of --from if it has some, else cold",
    )
    parser.add_argument(
        "--launch",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="for warm:K: the configuration files you launch with beside the model's",
    )
    parser.add_argument(
        "--skipped-steps",
        type=int,
        default=0,
        metavar="N",
        help="fp16 steps that overflowed so far, if you know: each left the learning rate behind",
    )
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    model = chosen_model(options)
    imported = _imported(options, model)
    for finding in imported.findings:
        say(str(finding))
    for notice in imported.notices:
        say(f"note: {notice}")
    adam = "the checkpoint's" if imported.adam_step is None else number(imported.adam_step)
    say(
        f"{imported.checkpoint}: {model.name} after step {number(imported.step)}, "
        f"{number(imported.num_bytes)} bytes",
        f"  next sample    position {number(imported.position)}",
        f"  learning rate  {imported.learning_rate:.6e} (step {number(imported.learning_rate_step)}"
        " of the schedule)",
        f"  Adam's step    {adam}",
        "go on with, in a file of yours beside the configuration:",
        f"  load: {options.save}",
        "  save: (another directory)",
    )
    return GOOD


def _imported(options: argparse.Namespace, model: ReleasedModel) -> Imported:
    source = downloaded_directory(options.source, options.step)
    match options.moments:
        case None | ["cold"]:
            if options.moments is not None:
                require_no_moments(source, model, options.step)
            return import_step(
                source,
                options.save,
                model,
                options.step,
                skipped_steps=options.skipped_steps,
            )
        case ["from", neox]:
            if options.skipped_steps:
                raise ConfigError(f"--skipped-steps: {neox} says itself how many there were")
            return import_with_moments_of(Path(neox), source, options.save, model, options.step)
        case [how] if match := re.fullmatch(r"warm:(\d+)", how):
            return import_warm(
                source,
                options.save,
                model,
                options.step,
                int(match[1]),
                launch_files=options.launch,
                skipped_steps=options.skipped_steps,
            )
    raise ConfigError(
        f"--moments {' '.join(options.moments)}: it is `cold`, `warm:K` or `from NEOX_DIR`"
    )
