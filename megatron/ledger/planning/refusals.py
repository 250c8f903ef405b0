"""Why a launch is refused, in words: what, the numbers, and the ways out."""

from collections.abc import Sequence

from megatron.ledger.planning.data_changes import Change
from megatron.ledger.planning.inputs import DATA_CHANGES, Found, Wanted
from megatron.ledger.planning.resume_plan import DataBreak

__all__ = ["data_problem", "misnamed_changes", "schedule_problem"]

_RETURN_TO = {
    "seed": "the old seed",
    "seq_length": "the old seq_length",
    "split": "the old split",
    "packing": "the old packing",
    "tokenizer": "the old tokenizer",
    "data": "the old content",
}


def misnamed_changes(wanted: Wanted) -> str | None:
    """Return what is wrong with the names in ``accept_data_change``, if anything is."""
    unknown = sorted(wanted.accept_data_change - set(DATA_CHANGES))
    if not unknown:
        return None
    return f"accept_data_change: [{', '.join(unknown)}] is not known; use {', '.join(DATA_CHANGES)}"


def data_problem(
    wanted: Wanted, found: Found, changes: Sequence[Change], data_break: DataBreak
) -> str | None:
    """Return why the change of data is refused; None if the configuration accepts it."""
    if data_break.is_accepted:
        return None
    lines = [
        f"{found.path} cannot go on exactly after step {found.step}:",
        *(f"    {change.name}: {change.detail}" for change in changes),
    ]
    comparison = data_break.comparison
    steps = f"steps {found.step + 1}..{data_break.horizon_step}"
    if comparison is None:
        lines.append(
            f"  how much {steps} would repeat or skip could not be counted: "
            f"{data_break.not_counted}"
        )
    else:
        lines += [
            f"  over {steps}, compared with the undisturbed order,",
            f"    repeated: {comparison.repeated}",
            f"    skipped:  {comparison.skipped}",
            f"    new:      {comparison.new}",
        ]
    if any(change.name != "tokenizer" for change in changes):
        lines.append(
            f"  the new order would be entered at its sample {data_break.enters_at:,}, after as "
            f"many tokens as were consumed (NeoX: {data_break.neox_enters_at:,}, step times "
            "train_batch_size)"
        )
    missing = [key for key in data_break.keys if key not in wanted.accept_data_change]
    named = sorted({*data_break.keys, *wanted.accept_data_change}, key=DATA_CHANGES.index)
    lines.append(
        f"  to continue exactly, return to {' and '.join(_RETURN_TO[key] for key in missing)}; to "
        f"go on all the same, on the record for ever: accept_data_change: [{', '.join(named)}]"
    )
    return "\n".join(lines)


def schedule_problem(wanted: Wanted, found: Found) -> str | None:
    """Return why NeoX's scheduler would refuse this resume; None if it wouldn't.

    The message shows both schedules at five steps, and the three ways out.
    """
    configured, recorded = wanted.learning_rates, found.learning_rates
    if (
        configured is None
        or recorded is None
        or wanted.schedule_choice != "refuse"
        or not wanted.restores_optimizer
    ):
        return None
    differences = [
        f"{key} {value} in the checkpoint, {configured.values.get(key)} configured"
        for key, value in recorded.values.items()
        if configured.values.get(key) != value
    ]
    if not differences:
        return None
    count = found.step if found.optimizer_steps is None else found.optimizer_steps
    ends = (recorded.values.get("end_iter"), configured.values.get("end_iter"), wanted.train_iters)
    last = max(count + 1, *(int(end) for end in ends if end is not None))
    rates = "\n".join(
        f"    step {found.step + 1 + later - count:>9,}: "
        f"{recorded.at(later):.6e} -> {configured.at(later):.6e}"
        for later in sorted({count + (last - count - 1) * quarter // 4 for quarter in range(5)})
    )
    return (
        f"the learning-rate schedule is not the checkpoint's: {'; '.join(differences)}\n"
        f"  learning rate, checkpoint's -> configured:\n{rates}\n"
        f"  ways out: lr_decay_iters: {recorded.values.get('end_iter')} with the checkpoint's "
        "other values keeps the schedule exactly; override_lr_scheduler: true goes on with the "
        "configured one from here; use_checkpoint_lr_scheduler: true goes on with the checkpoint's "
        "and stays at its last rate"
    )
