"""``tools/pythia.py check``: is what was downloaded the step it should be?"""

import argparse
from pathlib import Path

from megatron.base.errors import ConfigError
from megatron.checkpoint.hugging_face.download import local_directory
from megatron.cli.ledger.options import add_json_option
from megatron.cli.ledger.output import note, print_json, print_table, say
from megatron.cli.ledger.progress import progress
from megatron.cli.pythia.checks import check_release, known_findings
from megatron.cli.pythia.findings import GOOD, Finding, exit_status
from megatron.cli.pythia.idx_files import check_index
from megatron.cli.pythia.known_releases import KNOWN_RELEASES
from megatron.cli.pythia.models import (
    ReleasedModel,
    find_model,
    model_of_files,
    model_of_name_and_files,
)

__all__ = ["add_check", "add_model_options", "chosen_model", "downloaded_directory"]

_EPILOG = """What is checked: sizes and vocabulary against the model's configuration, every value,
the first values at steps 0 and 1 against their formulas, the step that NeoX's files say, weights
against the optimizer's fp32 masters, digests against those published of wrong files and those the
hub gave, with --against whether tensors are another step's, and with --data the loss. What was
reported of the step is told too: a report or a loss alone is a warning, never proof.

exit status:
  0  nothing is wrong (reports may still have been told)
  1  something is proven wrong from its content
  2  something could not be checked: files are missing or damaged

examples:
  tools/pythia.py check pythia-70m-deduped/step3000 --model pythia-70m-deduped --step 3000
  tools/pythia.py check step58000 --model pythia-12b --step 58000 --against step143000
  tools/pythia.py check step3000 --model pythia-70m --step 3000 --against step2000 step4000 \\
      --data pile-standard-pythia-preshuffled/document
  tools/pythia.py check --known --model pythia-2.8b              what was reported, as a table"""


def add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="is a download the step it should be?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory",
        nargs="?",
        metavar="DIR",
        help="what to check; or a name on the hub, whose branch stepN is then downloaded",
    )
    add_model_options(parser)
    parser.add_argument("--step", type=int, help="the branch: 3000 for step3000")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="other steps of the same run; their paths end in stepN, or are NeoX's",
    )
    parser.add_argument(
        "--other-run",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="steps of runs with another seed: nothing of theirs may be in it",
    )
    parser.add_argument(
        "--data",
        metavar="PREFIX",
        help="also: is this the data set that was released? by the SHA-256 of PREFIX.idx; and the "
        "loss on the batch after the step, beside that of the steps --against, if its tokens are "
        "there (index maps are built beside them if they aren't)",
    )
    parser.add_argument(
        "--loss-samples",
        type=_count,
        default=4,
        metavar="N",
        help="of that batch the loss is computed on; 0: no loss (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="that computes it (default: %(default)s)")
    parser.add_argument("--known", action="store_true", help="print what was reported, and end")
    add_json_option(parser)
    parser.set_defaults(run=_check)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add which model is meant."""
    parser.add_argument("--model", help="its name on the hub, such as pythia-160m-deduped")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="its configuration files, instead of those in configs/pythia: your own copy, or those "
        "of a model of your own (without --model)",
    )


def chosen_model(options: argparse.Namespace) -> ReleasedModel:
    """Return the model that ``--model`` and ``--config`` mean.

    Raises:
        ConfigError: neither is given, or they contradict each other.
    """
    if options.model is not None and options.config is not None:
        return model_of_name_and_files(options.model, options.config)
    if options.model is not None:
        return find_model(options.model)
    if options.config is None:
        raise ConfigError("which model? give --model, such as pythia-160m-deduped, or --config")
    return model_of_files(options.config)


def downloaded_directory(source: str, step: int) -> Path:
    """Return ``source`` if it is a directory, else the branch of the hub's model of that name.

    Raises:
        MegatronError: it is neither, or the hub doesn't give it.
    """
    return local_directory(source, None if Path(source).exists() else f"step{step}")


def _check(options: argparse.Namespace) -> int:
    model = chosen_model(options)
    if options.known:
        _print_known(model)
        return GOOD
    if options.directory is None or options.step is None:
        raise ConfigError("DIR and --step are needed, or --known")
    directory = downloaded_directory(options.directory, options.step)
    with progress("tensors") as on_tensor:
        findings = check_release(
            directory,
            model,
            options.step,
            against=options.against,
            other_runs=options.other_run,
            on_tensor=on_tensor,
        )
    if options.data is not None:
        findings += check_index(options.data, model)
        if options.loss_samples and exit_status(findings) == GOOD:
            findings += _loss_findings(options, directory, model)
    status = exit_status(findings)
    if options.json:
        print_json(
            {
                "exit_status": status,
                "model": model.name,
                "step": options.step,
                "findings": [vars(finding) for finding in findings],
            }
        )
        return status
    for finding in findings:
        say(str(finding))
    say(_result(directory, model, options.step, findings))
    return status


def _loss_findings(
    options: argparse.Namespace, directory: Path, model: ReleasedModel
) -> list[Finding]:
    from megatron.cli.pythia.loss_check import LossCheck, loss_findings  # megatron-core takes long

    how = LossCheck(prefix=options.data, num_samples=options.loss_samples, device=options.device)
    return list(
        loss_findings(
            directory,
            model,
            options.step,
            options.against,
            how,
            on_note=lambda text: note(f"note: {text}"),
        )
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples")
    return int(text)


def _result(directory: Path, model: ReleasedModel, step: int, findings: list[Finding]) -> str:
    what = f"{directory} as {model.name} step {step}"
    return {
        0: f"{what}: nothing wrong was found",
        1: f"{what}: WRONG",
        2: f"{what}: could not be checked",
    }[exit_status(findings)]


def _print_known(model: ReleasedModel) -> None:
    rows = []
    for entry in KNOWN_RELEASES:
        if any(known_findings(model.name, None, [entry])):
            rows.append((_steps(entry.steps), entry.text, entry.source))
    print_table(("steps", "what was reported", "source"), rows)


def _steps(steps: object) -> str:
    listed = sorted(steps) if isinstance(steps, set | range) else []
    if len(listed) > 1000:
        return "all" if listed[0] == 0 else f"{listed[0]} and later"
    more = len(listed) - 6
    shown = ", ".join(map(str, listed[:6]))
    return shown + (f" and {more} more" if more > 0 else "")
