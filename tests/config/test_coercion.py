"""Types: NeoX's exact ones, choices in any case, and numbers that YAML 1.1 reads as text."""

from typing import Any, Literal

import pytest

from megatron.config.coercion import coerce, convert_numbers

Norm = Literal["layernorm", "rmsnorm"]


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (None, int | None, None),
        (3, int | None, 3),
        (3, float | None, 3),
        ("5e-4", float | None, 0.0005),
        ("1e6", float | None, 1e6),
        (".5E+1", float, 5.0),
        ("LayerNorm", Norm | None, "layernorm"),
        ([1, 2], list[int] | None, [1, 2]),
        ([1, "5e-1"], list[float], [1, 0.5]),
        (["1e5"], list[str], ["1e5"]),  # a path, not a number
        (
            {"lr": "6e-4", "betas": [0.9, "95e-2"]},
            dict[str, Any],
            {"lr": 6e-4, "betas": [0.9, 0.95]},
        ),
        ("localhost", str | list[str], "localhost"),
        (object, Any, object),
    ],
)
def test_a_good_value_is_taken(value, annotation, expected):
    assert coerce(value, annotation) == expected


@pytest.mark.parametrize(
    ("value", "annotation", "complaint"),
    [
        (True, int | None, "must be a whole number, got True"),
        (1, bool, "must be true or false, got 1"),
        ("true", bool, "must be true or false, got 'true'; leave out the quotes"),
        ("10", int, "must be a whole number, got '10'; leave out the quotes"),
        (1000000.0, int, "must be a whole number, got 1000000.0; write 1000000"),
        ("10", float, "must be a number, got '10'; leave out the quotes"),
        (True, float, "must be a number, got True"),
        (5, str, "must be text, got 5"),
        ("batchnorm", Norm, "must be one of layernorm, rmsnorm, got 'batchnorm'"),
        ("0,1", list[int], "must be a list of whole numbers, got '0,1'"),
        ([1, True], list[int], "must be a list of whole numbers, got [1, True]"),
        ("Adam", dict[str, Any], "must be a mapping, got 'Adam'"),
        ("x", int | float, "must be a whole number or a number, got 'x'"),
    ],
)
def test_a_bad_value_says_what_it_must_be(value, annotation, complaint):
    with pytest.raises(ValueError, match="must be") as caught:
        coerce(value, annotation)
    assert str(caught.value).startswith(complaint)


def test_bucket_sizes_in_exponent_form_become_whole_numbers():
    converted = convert_numbers({"reduce_bucket_size": "5e8", "lr": "1e-3", "name": "e5"})
    assert converted == {"reduce_bucket_size": 500_000_000, "lr": 0.001, "name": "e5"}
    assert type(converted["reduce_bucket_size"]) is int
