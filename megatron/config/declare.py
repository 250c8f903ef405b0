"""How a configuration key is declared, and what a launch makes of a value other than the default.

Every key has an outcome, or a rule that picks one from the value and the other keys:

    WORKS           it does what NeoX's does
    no_effect       it changes nothing here; said once at launch
    same_numbers    it picks a kernel in NeoX and the numbers are the same here; said once
    refused         known to NeoX, not supported here yet; the launch stops
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = [
    "WORKS",
    "KeyDeclaration",
    "Outcome",
    "OutcomeKind",
    "OutcomeRule",
    "key",
    "no_effect",
    "only",
    "part_of",
    "refused",
    "same_numbers",
]


class OutcomeKind(Enum):
    """The four things that can happen to a non-default value at launch."""

    WORKS = "works"
    NO_EFFECT = "no effect here"
    SAME_NUMBERS = "kernel choice, same numbers"
    REFUSED = "not supported here yet"


@dataclass(frozen=True)
class Outcome:
    """What happens to a value at launch, and the rest of the sentence that says so."""

    kind: OutcomeKind
    text: str = ""


# (value, all keys flat) -> outcome; never called with None, which always means "unset".
OutcomeRule = Callable[[Any, Mapping[str, Any]], Outcome]

WORKS = Outcome(OutcomeKind.WORKS)


def no_effect(why: str) -> Outcome:
    """The key changes nothing, because ``why``."""
    return Outcome(OutcomeKind.NO_EFFECT, why)


def same_numbers(why: str) -> Outcome:
    """The key picks a kernel in NeoX; here the numbers don't depend on it."""
    return Outcome(OutcomeKind.SAME_NUMBERS, why)


def refused(advice: str) -> Outcome:
    """The launch stops; ``advice`` says what to do instead."""
    return Outcome(OutcomeKind.REFUSED, advice)


def part_of(switch: str) -> Outcome:
    """The key only tunes a feature behind ``switch``, which is itself refused when turned on."""
    return no_effect(f"it only tunes {switch}, which is off")


def only(*supported: Any, advice: str) -> OutcomeRule:
    """A rule under which the ``supported`` values work and any other is refused."""

    def judge(value: Any, _keys: Mapping[str, Any]) -> Outcome:
        return WORKS if value in supported else refused(advice)

    return judge


@dataclass(frozen=True, kw_only=True)
class KeyDeclaration:
    """What a group says about one of its keys, beyond name, type and default."""

    outcome: Outcome | OutcomeRule
    tier: int  # 1: GPT-NeoX and Pythia pretraining need it; 2: common; 3: exotic
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    aliases: tuple[str, ...] = ()  # other spellings of the same key
    mirrors: tuple[str, ...] = ()  # keys that NeoX always overwrites with this one
    is_derived: bool = False  # worked out by loading; a written value that differs has no effect


def key(
    default: Any,
    *,
    outcome: Outcome | OutcomeRule,
    tier: int = 1,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: tuple[str, ...] = (),
    mirrors: tuple[str, ...] = (),
    is_derived: bool = False,
) -> Any:
    """Declare a dataclass field that is a configuration key (``Any``, as dataclasses.field is)."""
    declaration = KeyDeclaration(
        outcome=outcome,
        tier=tier,
        unit=unit,
        minimum=minimum,
        maximum=maximum,
        aliases=aliases,
        mirrors=mirrors,
        is_derived=is_derived,
    )
    metadata = {"declaration": declaration}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
