"""What was reported wrong or missing of the released Pythias: a table with sources.

Nothing here was verified against the hub by us. An entry alone therefore only warns; a file whose
SHA-256 is an entry's is proof.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["ALL_STEPS", "KNOWN_RELEASES", "KnownRelease", "known_of"]

ALL_STEPS = range(143001)
_FIRST_STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_ISSUES = "github.com/EleutherAI/pythia issue "
_MISSING = _ISSUES + "#107, #94, #141"


@dataclass(frozen=True)
class KnownRelease:
    """One report."""

    models: str  # regular expression that the whole name matches
    steps: Container[int]
    text: str
    source: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File -> beginning of the digest that the wrong file has, if it was published."""
    steps_of_the_file: Container[int] = ()
    """Steps at which a file of this digest is the right one."""


KNOWN_RELEASES = (
    KnownRelease(
        r"pythia-2\.8b",
        {
            *_FIRST_STEPS,
            *range(1000, 53001, 1000),
            *(55000, 60000, 65000, 70000, 80000, 90000, 100000, 103000, 110000),
            *(120000, 130000, 140000),
        },
        "the branch serves the weights of `main`: 76 branches were found to be one file",
        _ISSUES + "#195, #205",
        {"model.safetensors": "ab496f1c3fd79e3c749a9d5414136a2c8e4224f94eecb261970315cdb0f813fe"},
    ),
    KnownRelease(
        r"pythia-2\.8b",
        {54000, 56000, 57000, 58000, 59000, 61000, 62000, 63000, 64000, 143000},
        "ten branches, step143000 among them, serve a second file: at most one of them is right",
        _ISSUES + "#195, #205",
        {"model.safetensors": "462f2b960062159c"},
        steps_of_the_file={143000},
    ),
    KnownRelease(
        r"pythia-6\.9b-deduped",
        ALL_STEPS,
        "branches of neox-ckpt-pythia-6.9b-deduped were reported to be one file, as pythia-2.8b's",
        _ISSUES + "#195, comment of 2026-03-19",
    ),
    KnownRelease(
        r"pythia-12b",
        {50000, 58000},
        "the first of three shards is step143000's, the other two are the step's own",
        _ISSUES + "#206",
        {
            "pytorch_model-00001-of-00003.bin": (
                "9d21715462588073675eca9c65ba55a47d911da460a6083938d04acd4589f542"
            )
        },
        steps_of_the_file={143000},
    ),
    KnownRelease(
        r"pythia-12b-deduped",
        {32000},
        "was wrong, and uploaded again in June 2023: an older copy is another model",
        _ISSUES + "#108",
    ),
    KnownRelease(r"pythia-12b", {4000, 32000}, "was missing for a while", _MISSING),
    KnownRelease(r"pythia-6\.9b", {26000}, "was missing for a while", _MISSING),
    KnownRelease(
        r"pythia-(12b|1b)(-deduped)?",
        ALL_STEPS,
        "some steps of the 12b and one of the 1b were missing for a while; which isn't on record",
        _MISSING,
    ),
    KnownRelease(r"pythia-410m-seed9", {40000}, "weights are missing", _ISSUES + "#202"),
    KnownRelease(r"pythia-410m-seed6", {88000}, "weights are missing", _ISSUES + "#202"),
    KnownRelease(r"pythia-410m-seed2", {111000}, "weights are missing", _ISSUES + "#202"),
    KnownRelease(
        r"pythia-160m-weight-seed[12]",
        range(1, 143001),
        "steps from 1 on don't descend from the run's own step 0; step 1 is the data-seed runs'",
        _ISSUES + "#203",
    ),
    KnownRelease(
        r"pythia-160m-data-seed[12]",
        {1},
        "equals step 1 of weight-seed1 and weight-seed2, which is theirs wrongly",
        _ISSUES + "#203",
    ),
    KnownRelease(
        r"pythia-14m-seed0",
        ALL_STEPS,
        "its step 0 is no published 14m's, though its seed is 1234",
        "README of neox-ckpt-pythia-14m-seed0",
    ),
    KnownRelease(
        r".*",
        {1},
        "has the weights of step 0, and should: the first update runs at learning rate 0",
        _ISSUES + "#83",
    ),
    KnownRelease(
        r"pythia-.*",
        {2},
        "was reported identical to step 0; a third party measured a difference of 9.5e-7 (70m)",
        _ISSUES + "#198, unresolved",
    ),
)
"""From pythia.md §2.1; evidence grade 3P throughout."""


def known_of(
    model: str, step: int | None, entries: Iterable[KnownRelease] = KNOWN_RELEASES
) -> Iterator[KnownRelease]:
    """Yield what was reported of a step of ``model``; of all its steps if ``step`` is None."""
    for entry in entries:
        if re.fullmatch(entry.models, model) and (step is None or step in entry.steps):
            yield entry
