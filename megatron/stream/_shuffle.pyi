from typing import Any

from numpy.typing import NDArray

def shuffle(array: NDArray[Any], key: NDArray[Any], position: int, /) -> int: ...
def draw_wide(limit: int, key: NDArray[Any], position: int, /) -> tuple[int, int]: ...
def walk(
    sizes: NDArray[Any],
    documents: NDArray[Any],
    rows: NDArray[Any],
    stride: int,
    document: int,
    ahead: int,
    /,
) -> tuple[int, int]: ...
def draw_blend(
    weights: NDArray[Any],
    counts: NDArray[Any],
    first_draw: int,
    datasets: NDArray[Any],
    samples: NDArray[Any],
    /,
) -> None: ...
def count_occurrences(values: NDArray[Any], first: int, counters: NDArray[Any], /) -> bool: ...
def copy_from_files(
    addresses: NDArray[Any],
    bounds: NDArray[Any],
    target: NDArray[Any],
    sources: NDArray[Any],
    targets: NDArray[Any],
    sizes: NDArray[Any],
    /,
) -> int: ...
