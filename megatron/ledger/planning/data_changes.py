"""What is different about the data now, and which of it has no exact continuation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron.ledger.ledger_file import DatasetNote, TokenizerIdentity
from megatron.ledger.planning.continuation import SAMPLE_KEYS, StreamPlan, same_samples
from megatron.ledger.planning.inputs import StreamName, Wanted
from megatron.ledger.planning.past import Past, StreamPast
from megatron.stream.order_description import ComponentDescription, OrderDescription

__all__ = ["Change", "component_name", "inexact_changes", "stream_changes"]

Effect = Literal["none", "new segment", "no exact continuation"]


@dataclass(frozen=True)
class Change:
    """One thing that isn't as it was when the checkpoint was written."""

    name: str  # a key of NeoX's or of accept_data_change, or what happened to a dataset
    stream: StreamName | None  # None: concerns the run as a whole
    detail: str  # "128 -> 256"
    effect: Effect

    def __str__(self) -> str:
        where = "" if self.stream in (None, "train") else f"{self.stream}: "
        return f"{where}{self.name} {self.detail}".rstrip()


def inexact_changes(past: Past, stream: StreamPast, wanted: Wanted) -> list[Change]:
    """Return the changes of the training data that need ``accept_data_change``."""
    now = wanted.orders["train"]
    if now is None:
        return []
    details = {**_settings(stream.order, now), **_contents(past, stream, now, wanted.datasets)}
    if past.tokenizer is not None and wanted.tokenizer not in (None, past.tokenizer):
        details["tokenizer"] = _tokenizers(past.tokenizer, wanted.tokenizer)
    return [
        Change(name, "train", detail, "no exact continuation") for name, detail in details.items()
    ]


def stream_changes(
    name: StreamName, past: Past, stream: StreamPast, plan: StreamPlan, wanted: Wanted
) -> list[Change]:
    """Return what a stream does differently from here on, apart from what has no continuation."""
    notes = {**past.datasets, **wanted.datasets}
    changes = []
    if stream.order != plan.order and same_samples(stream.order, plan.order):
        changes += _blend_changes(name, stream, plan.order, notes)
    train = past.stream("train")
    before, now = stream.last_segment.batch_size, plan.batch_size
    # Evaluations take a number of batches; that these are of another size is told once.
    is_told = train is not None and (
        before * wanted.train_batch_size == now * train.last_segment.batch_size
    )
    if before != now and (name == "train" or not is_told):
        what = "train_batch_size" if name == "train" else "samples per evaluation"
        changes.append(Change(what, name, f"{before} -> {now}", "new segment"))
    for identity, path in _moved(past.datasets, wanted.datasets, plan.order):
        changes.append(
            Change("dataset", name, f"{path[0]} -> {path[1]}, content {identity[:12]}", "none")
        )
    return changes


def component_name(
    component: ComponentDescription, notes: Mapping[str, DatasetNote], order: OrderDescription
) -> str:
    """Name a component for people: where its dataset was seen last, and its documents if needed."""
    note = notes.get(component.dataset)
    name = note.path if note is not None else f"dataset {component.dataset[:12]}"
    alike = [one for one in order.components if one.dataset == component.dataset]
    if note is None or (component.first_document, component.stop_document) != (
        0,
        note.num_documents,
    ):
        name += f"[{component.first_document}:{component.stop_document}]"
    return f"{name} (no. {component.occurrence + 1})" if len(alike) > 1 else name


def _settings(before: OrderDescription, now: OrderDescription) -> dict[str, str]:
    details: dict[str, str] = {}
    for key in SAMPLE_KEYS:
        values = (getattr(before, key), getattr(now, key))
        if values[0] != values[1] and key == "allow_chopped":
            details.setdefault("packing", f"allow_chopped {values[0]} -> {values[1]}")
        elif values[0] != values[1]:
            details[key] = f"{values[0]} -> {values[1]}"
    return details


def _tokenizers(before: TokenizerIdentity, now: TokenizerIdentity) -> str:
    if before.type != now.type:
        return f"{before.type} -> {now.type}"
    return f"{now.type}: the content of its files is another"


def _contents(
    past: Past, stream: StreamPast, now: OrderDescription, notes: Mapping[str, DatasetNote]
) -> dict[str, str]:
    """Find documents dealt out differently, and paths that hold something else than before."""
    details = {}
    drawn: dict[str, set[tuple[int, int]]] = {}
    for key in (*(one.key for one in stream.order.components), *stream.state.cursors):
        dataset, first, stop = _parse_key(key)
        drawn.setdefault(dataset, set()).add((first, stop))
    wanted_datasets = {component.dataset for component in now.components}
    # A dataset that moved away leaves its path to others.
    held = {
        past.datasets[dataset].path: dataset
        for dataset in drawn
        if dataset in past.datasets and dataset not in wanted_datasets
    }
    for component in now.components:
        documents = (component.first_document, component.stop_document)
        known = drawn.get(component.dataset)
        note = notes.get(component.dataset)
        if known is not None and documents not in known:
            was = ", ".join(f"{first}..{stop - 1}" for first, stop in sorted(known))
            details["split"] = f"documents {was} -> {documents[0]}..{documents[1] - 1}"
        elif known is None and note is not None and note.path in held:
            details["data"] = (
                f"{note.path} holds other content: {held[note.path][:12]} -> "
                f"{component.dataset[:12]}"
            )
    return details


def _parse_key(key: str) -> tuple[str, int, int]:
    dataset, _, rest = key.rpartition(":")
    first, stop = rest.partition("#")[0].split("-")
    return dataset, int(first), int(stop)


def _blend_changes(
    name: StreamName,
    stream: StreamPast,
    after: OrderDescription,
    notes: Mapping[str, DatasetNote],
) -> list[Change]:
    before = {component.key: component for component in stream.order.components}
    now = {component.key: component for component in after.components}
    redealt, changes = _redealt(name, before, now, stream)
    for key, component in now.items():
        if key in before or component.dataset in redealt:
            continue
        returns = stream.state.cursors.get(key, 0) > 0
        what = f"{component_name(component, notes, after)}, from its sample {component.start}"
        changes.append(
            Change("dataset returned" if returns else "dataset added", name, what, "new segment")
        )
    for key, component in before.items():
        if key not in now and component.dataset not in redealt:
            kept = stream.state.cursors.get(key, 0)
            what = f"{component_name(component, notes, stream.order)}, its sample {kept} is next"
            changes.append(Change("dataset removed", name, what, "new segment"))
    common = [key for key in before if key in now]
    if common != [key for key in now if key in before]:
        changes.append(Change("datasets reordered", name, "", "new segment"))
    weights = (_weights(stream.order), _weights(after))
    if weights[0] != weights[1] and len(now) > 1:
        shown = [", ".join(f"{weight:.6g}" for weight in side.values()) for side in weights]
        changes.append(Change("weights", name, f"{shown[0]} -> {shown[1]}", "new segment"))
    return changes


def _redealt(
    name: StreamName,
    before: Mapping[str, ComponentDescription],
    now: Mapping[str, ComponentDescription],
    stream: StreamPast,
) -> tuple[set[str], list[Change]]:
    """Return the datasets of which a stream reads other documents than before, and that in words.

    Of the training stream it is said already: there is no exact continuation.
    """
    redealt: dict[str, Change] = {}
    for component in now.values():
        was = [
            one
            for key, one in before.items()
            if one.dataset == component.dataset and key not in now
        ]
        if not was or component.key in before or stream.state.cursors.get(component.key, 0):
            continue
        documents = [
            f"{one.first_document}..{one.stop_document - 1}" for one in (was[0], component)
        ]
        if documents[0] != documents[1]:
            detail = f"documents {documents[0]} -> {documents[1]}"
            redealt[component.dataset] = Change("split", name, detail, "new segment")
    return set(redealt), [] if name == "train" else list(redealt.values())


def _weights(order: OrderDescription) -> dict[str, float]:
    weights = order.weights or (1.0,) * len(order.components)
    return dict(zip((one.key for one in order.components), weights, strict=True))


def _moved(
    before: Mapping[str, DatasetNote], now: Mapping[str, DatasetNote], order: OrderDescription
) -> list[tuple[str, tuple[str, str]]]:
    datasets = dict.fromkeys(component.dataset for component in order.components)
    return [
        (dataset, (before[dataset].path, now[dataset].path))
        for dataset in datasets
        if dataset in before and dataset in now and before[dataset].path != now[dataset].path
    ]
