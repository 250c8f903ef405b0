"""Checking a value against its key's type, and the few conversions NeoX's files need.

NeoX checks types exactly: True is no int, 2.0 is no int, "10" is no int; an int may stand for a
float and None for anything. Choices compare without case. PyYAML reads ``5e-4`` as text, so text
that is a number in exponent form becomes one where a number is meant.
"""

import re
import types
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["coerce", "convert_numbers", "describe_type"]

_EXPONENT_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)[eE][+-]?\d+")
_QUOTED = re.compile(r"[+-]?\d+(\.\d*)?|true|false|True|False")
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}
_LISTS = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}


def coerce(value: Any, annotation: Any) -> Any:
    """Return ``value`` as its key's type wants it.

    Raises:
        ValueError: it is not of that type; the message is the rest of a sentence about the key.
    """
    if value is None:
        return None
    members = _members(annotation)
    if Any in members:
        return value
    for member in members:
        accepted, converted = _accept(value, member)
        if accepted:
            return converted
    hint = ""
    if isinstance(value, float) and value.is_integer() and int in members:
        hint = f"; write {int(value)}"
    elif isinstance(value, str) and _QUOTED.fullmatch(value) and {bool, int, float} & {*members}:
        hint = "; leave out the quotes"
    raise ValueError(f"must be {describe_type(annotation)}, got {_shown(value)}{hint}")


def convert_numbers(value: Any) -> Any:
    """Return ``value`` with text like ``5e-4`` inside dicts and lists turned into numbers."""
    if isinstance(value, dict):
        return {name: convert_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [convert_numbers(item) for item in value]
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value):
        number = float(value)
        # bucket sizes are written 5e8 and must be whole
        return int(number) if number.is_integer() and "-" not in value else number
    return value


def describe_type(annotation: Any) -> str:
    """Return what the key accepts, in words."""
    words = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            words.append("one of " + ", ".join(str(choice) for choice in get_args(member)))
        elif get_origin(member) is list:
            words.append(_LISTS.get(get_args(member)[0], "a list"))
        elif get_origin(member) is dict:
            words.append("a mapping")
        elif member is not type(None):
            words.append(_TYPE_NAMES.get(member, "any value"))
    return " or ".join(words)


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _accept(value: Any, member: Any) -> tuple[bool, Any]:
    if get_origin(member) is Literal:
        return _accept_choice(value, get_args(member))
    if get_origin(member) is list:
        return _accept_list(value, get_args(member)[0])
    if get_origin(member) is dict:
        return type(value) is dict, convert_numbers(value)
    if member is float:
        if type(value) in (int, float):
            return True, value
        if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value):
            return True, float(value)
        return False, None
    return type(value) is member, value


def _accept_list(value: Any, element: Any) -> tuple[bool, Any]:
    if type(value) is not list:
        return False, None
    if element is Any:
        return True, convert_numbers(value)
    accepted = [_accept(item, element) for item in value]
    return all(is_accepted for is_accepted, _ in accepted), [item for _, item in accepted]


def _accept_choice(value: Any, choices: tuple[Any, ...]) -> tuple[bool, Any]:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return True, choice
    if isinstance(value, str):
        for choice in choices:
            if isinstance(choice, str) and choice.lower() == value.lower():
                return True, choice
    return False, None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
