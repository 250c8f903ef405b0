"""The compiled inner loops, or an error that says how to get them."""

try:
    from megatron.stream._shuffle import (
        copy_from_files,
        count_occurrences,
        draw_blend,
        draw_wide,
        shuffle,
        walk,
    )
except ImportError as error:
    raise ImportError(
        "megatron.stream._shuffle is not built for this Python: run `make setup` "
        "(or `python setup.py build_ext --inplace` in the checkout)"
    ) from error

__all__ = ["copy_from_files", "count_occurrences", "draw_blend", "draw_wide", "shuffle", "walk"]
