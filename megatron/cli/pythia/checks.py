"""Is a downloaded step what it should be? What content proves, and what only reports say."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.hugging_face.hub_directory import (
    has_file,
    hub_file,
)
from megatron.checkpoint.hugging_face.names import whole_shapes
from megatron.checkpoint.parameter_state import open_parameter_states
from megatron.cli.pythia.comparison import (
    MAYBE_UNLEARNT,
    MeasuredStep,
    Measurements,
    compared,
    named,
)
from megatron.cli.pythia.downloaded import (
    Downloaded,
    Place,
    declared_sizes,
    open_downloaded,
    step_named,
)
from megatron.cli.pythia.file_checks import directory_findings, file_findings, has_optimizer
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.known_releases import KNOWN_RELEASES, KnownRelease, known_of
from megatron.cli.pythia.measurements import measure
from megatron.cli.pythia.models import ReleasedModel
from megatron.data.tokenizers import build_tokenizer
from megatron.model.settings import ModelSettings

__all__ = ["check_release", "known_findings", "measure_all"]

_LISTED = 4
_HEAD = "final_linear.weight"
_TOKENIZER = "tokenizer.json"
_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "mlp_up_size", "tied_embedding")
_OUTPUT_SIDE = ("attention.dense.weight", "mlp.linear2.weight")
# Of a standard deviation, in standard errors; there are some hundred matrices in a model.
_SIGMAS = 6
_ROUNDING = 2e-3  # of values near 1 in bf16, and of subnormal ones in fp16


def check_release(
    directory: Path,
    model: ReleasedModel,
    step: int,
    *,
    against: Sequence[Path] = (),
    other_runs: Sequence[Path] = (),
    entries: Iterable[KnownRelease] = KNOWN_RELEASES,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[Measurements], None] = lambda measured: None,
) -> list[Finding]:
    """Check what was downloaded of one step.

    Args:
        directory: in Hugging Face's or NeoX's form.
        model: what it should be.
        step: as branches count.
        against: other steps of the same run; their paths say which.
        other_runs: steps of other runs of the same model, with another seed.
        entries: what was reported; tests have their own.
        on_tensor: told how many of how many tensors are read.
        keep: given what was measured of the tensors.

    Returns:
        Everything found; empty if there is nothing to say.
    """
    iteration = model.iteration(step)
    entries = list(entries)
    findings = list(known_findings(model.name, step, entries))
    try:
        findings += _declared(directory, model)
        if any(finding.kind == "wrong" for finding in findings):
            return findings
        if directory.is_dir():
            findings += directory_findings(directory, step, iteration)
        downloaded = open_downloaded(directory, model.settings, iteration=iteration)
        findings += file_findings(downloaded, model, step, entries)
        if any(finding.kind == "unknown" for finding in findings):
            return findings
        misfits = list(_shapes(downloaded, model))
        findings += misfits
        if misfits:
            return findings
        findings += _tokenizer(downloaded, model)
        measured = measure_all(downloaded, on_tensor, with_statistics=iteration <= 1)
        keep(measured)
        findings += _values(measured, model)
        findings += _first_values(measured, model.settings, iteration)
        findings += _masters(downloaded, model.settings)
    except CheckpointError as error:
        return [*findings, Finding("unknown", str(error))]
    here = MeasuredStep(directory, step, measured)
    for path in (*against, *other_runs):
        try:
            there = _open_step(path, model)
        except (CheckpointError, ConfigError) as error:
            findings.append(Finding("unknown", str(error)))
            continue
        findings += compared(here, there, is_other_run=path in other_runs)
    return findings


def known_findings(
    model: str, step: int | None, entries: Iterable[KnownRelease] = KNOWN_RELEASES
) -> Iterator[Finding]:
    """Yield what was reported of a step. Nothing of it is proof."""
    for entry in known_of(model, step, entries):
        yield Finding("warning", f"{model} step {step}: {entry.text}", entry.source)


def measure_all(
    downloaded: Downloaded,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    *,
    with_statistics: bool = False,
) -> Measurements:
    """Read every tensor once."""
    measured = {}
    for number, place in enumerate(downloaded.shapes):
        on_tensor(number, len(downloaded.shapes))
        measured[place] = measure(downloaded.read(place)[1], with_statistics=with_statistics)
        downloaded.release()
    on_tensor(len(downloaded.shapes), len(downloaded.shapes))
    return measured


def _open_step(path: Path, model: ReleasedModel) -> MeasuredStep:
    step = step_named(path)
    iteration = None if step is None else model.iteration(step)
    opened = open_downloaded(path, model.settings, iteration=iteration)
    if step is None and opened.steps_inside:
        step = next(iter(opened.steps_inside.values())) * model.steps_per_iteration
    return MeasuredStep(path, step, measure_all(opened))


def _declared(directory: Path, model: ReleasedModel) -> Iterator[Finding]:
    """Compare config.json, which needs no weights to be there."""
    if not directory.is_dir():
        return
    declared = declared_sizes(directory)
    if declared is None:
        return
    different = [
        f"{name} is {getattr(declared, name)}, {model.name}'s is {getattr(model.settings, name)}"
        for name in _SIZES
        if getattr(declared, name) != getattr(model.settings, name)
    ]
    if different:
        count = sum(map(math.prod, whole_shapes(declared).values()))
        yield Finding(
            "wrong",
            f"config.json describes a model of {count:,} parameters: {'; '.join(different)}",
        )
    elif declared.padded_vocab_size != model.settings.padded_vocab_size and _knows_rows(model):
        yield _wrong_vocabulary(declared.padded_vocab_size, model)


def _knows_rows(model: ReleasedModel) -> bool:
    return model.num_tokens is not None


def _wrong_vocabulary(rows: int, model: ReleasedModel) -> Finding:
    return Finding(
        "wrong",
        f"the embedding has {rows:,} rows; {model.name} was trained with "
        f"{model.settings.padded_vocab_size:,}: {model.num_tokens:,} tokens, padded. The rows of "
        "the padding were trained too and take part in the loss",
    )


def _shapes(downloaded: Downloaded, model: ReleasedModel) -> Iterator[Finding]:
    expected = whole_shapes(model.settings)
    found = downloaded.shapes
    count = sum(map(math.prod, found.values()))
    wanted = sum(map(math.prod, expected.values()))
    rows = downloaded.vocabulary
    vocabulary = {(0, "word_embeddings.weight"), (model.settings.num_layers + 4, _HEAD)}
    different = [
        place
        for place in {**expected, **found}
        if expected.get(place) != found.get(place) and place not in vocabulary
    ]
    if different:
        place = different[0]
        yield Finding(
            "wrong",
            f"it is a model of {count:,} parameters, {model.name} has {wanted:,}; the first tensor "
            f"that differs is layer {place[0]}'s {place[1]}: {_shape(found.get(place))} instead of "
            f"{_shape(expected.get(place))}",
        )
    elif rows != model.settings.padded_vocab_size and _knows_rows(model):
        yield _wrong_vocabulary(rows, model)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _tokenizer(downloaded: Downloaded, model: ReleasedModel) -> Iterator[Finding]:
    if not has_file(downloaded.path, _TOKENIZER):
        return
    path = hub_file(downloaded.path, _TOKENIZER)
    try:
        size = build_tokenizer("HFTokenizer", str(path)).vocab_size
    except ConfigError as error:
        yield Finding("unknown", f"{path} is no tokenizer: {error}")
        return
    if size > downloaded.vocabulary:
        yield Finding(
            "wrong",
            f"{_TOKENIZER} has {size:,} entries, but the embedding only {downloaded.vocabulary:,} "
            "rows: it is another model's",
        )
    elif model.num_tokens is not None and size != model.num_tokens:
        yield Finding(
            "warning",
            f"{_TOKENIZER} has {size:,} entries; that of {model.name} has {model.num_tokens:,}",
        )


def _values(measured: Measurements, model: ReleasedModel) -> Iterator[Finding]:
    broken = [place for place, one in measured.items() if one.num_nonfinite]
    if broken:
        yield Finding("wrong", f"{named(broken)} hold NaN or infinite values")
    types = {str(one.dtype).removeprefix("torch.") for one in measured.values()}
    if len(types) > 1:
        yield Finding("warning", f"tensors are of several types: {', '.join(sorted(types))}")
    trained = model.training_dtype
    if types != {"float32"} or trained == "fp32":
        return
    inexact = [place for place, one in measured.items() if trained not in one.exact_in]
    if not inexact:
        yield Finding(
            "note",
            f"stored as fp32, every value exact in {trained}: an upcast, which has nothing that "
            f"the {trained} file lacks. The optimizer's fp32 masters are not in it",
        )
    else:
        yield Finding(
            "warning",
            f"stored as fp32 and not a widened {trained} file: {named(inexact)} hold values that "
            f"{trained} cannot. Released files hold the {trained} weights",
        )


def _first_values(
    measured: Measurements, settings: ModelSettings, iteration: int
) -> Iterator[Finding]:
    """Compare with the formulas of the first values, where they are due, and where they aren't."""
    vectors = {place: one for place, one in measured.items() if not one.is_matrix}
    if iteration > 1:
        if vectors and all(one.is_unlearnt for one in vectors.values()):
            kind = "warning" if iteration <= MAYBE_UNLEARNT else "wrong"
            yield Finding(
                kind,
                f"all {len(vectors)} biases and norms are 0 or 1 still: these are first values, "
                f"not those of step {iteration}",
            )
        return
    learnt = [
        place for place, one in vectors.items() if one.first != _born(place) or not one.is_constant
    ]
    if learnt:
        yield Finding("wrong", f"{named(learnt)} are not 0 (biases) and 1 (norms) as at first")
    for place, one in measured.items():
        if not one.is_matrix or one.std is None or one.mean is None:
            continue
        expected = _first_std(place[1], settings)
        if expected is None:
            continue
        allowed = expected * (_SIGMAS / math.sqrt(2 * one.num_elements) + _ROUNDING)
        if abs(one.std - expected) > allowed:
            method = _method(place[1], settings)
            yield Finding(
                "wrong",
                f"layer {place[0]}'s {place[1]} has standard deviation {one.std:.6f}; "
                f"{method} gives {expected:.6f} (within {allowed:.6f})",
            )
            return
        if abs(one.mean) > expected * _SIGMAS / math.sqrt(one.num_elements):
            yield Finding("wrong", f"layer {place[0]}'s {place[1]} has mean {one.mean:.3e}, not 0")
            return


def _born(place: Place) -> float:
    return 1.0 if place[1].endswith("norm.weight") else 0.0


def _method(name: str, settings: ModelSettings) -> str:
    return settings.output_layer_init_method if name in _OUTPUT_SIDE else settings.init_method


def _first_std(name: str, settings: ModelSettings) -> float | None:
    """Return the standard deviation at step 0; None if there is no formula for it here."""
    layers, width, sigma = settings.num_layers, settings.hidden_size, settings.init_method_std
    return {
        "normal": sigma,
        "scaled_normal": sigma / math.sqrt(2 * layers),
        "small_init": math.sqrt(2 / (5 * width)),
        "wang_init": 2 / (layers * math.sqrt(width)),
    }.get(_method(name, settings))


def _masters(downloaded: Downloaded, settings: ModelSettings) -> Iterator[Finding]:
    """Compare weights with the optimizer's fp32 copies, rounded."""
    stored = downloaded.stored
    if stored is None:
        return
    if not has_optimizer(stored):
        yield Finding("note", "weights alone: there is no optimizer state to compare them with")
        return
    actual = replace(settings, padded_vocab_size=downloaded.vocabulary)
    try:
        states = open_parameter_states(stored, actual)
    except CheckpointError as error:
        yield Finding("unknown", f"the optimizer's state cannot be read: {error}")
        return
    size = stored.tensor_parallel_size
    different = []
    for layer, name in downloaded.shapes:
        for rank in range(size):
            weight = stored.weights(layer, rank)[1][name]
            master = states.part(layer, name, "master", size=size, rank=rank)
            if not bool((master.to(weight.dtype) == weight).all()):
                different.append((layer, name))
                break
    if different:
        yield Finding(
            "wrong",
            f"{len(different)} of {len(downloaded.shapes)} weights are not the optimizer's "
            f"masters, rounded: {named(different)}. They are of different saves",
        )
    else:
        yield Finding(
            "note", f"all {len(downloaded.shapes)} weights are the optimizer's masters, rounded"
        )
