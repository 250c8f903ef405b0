"""The instants of a commit at which a kill leaves something else on disk.

Whoever writes calls :func:`reach` right after each of them. Training does nothing there; a test
installs a hook that lists the points, or ends the process at one of them.
"""

from collections.abc import Callable

__all__ = ["Hook", "install", "reach"]

Hook = Callable[[str], None]

_hook: Hook | None = None


def reach(name: str) -> None:
    """Say that a write has just happened, such as ``"commit: manifest written"``."""
    if _hook is not None:
        _hook(name)


def install(hook: Hook | None) -> None:
    """From now on call ``hook`` at every point of this process, on whatever thread; None: no more.

    Only tests do.
    """
    global _hook
    _hook = hook
