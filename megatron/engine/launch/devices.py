"""How many slots this machine has, asked without importing torch (2 s)."""

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["count_devices", "local_slots"]


def local_slots(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of slots: one per visible GPU, or one on a machine without GPUs."""
    return count_devices(environ) or 1


def count_devices(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of visible GPUs, 0 if there is none or the CPU is asked for."""
    if environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    present = _count_nvidia() or _count_amd(Path("/sys/class/kfd/kfd/topology/nodes"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if present == 0 or visible is None:
        return present
    # CUDA reads the list up to the first entry it can't use; names (GPU-..., MIG-...) are taken
    # at their word.
    count = 0
    for name in visible.split(","):
        is_number = re.fullmatch(r"\s*\d+\s*", name) is not None
        if not name.strip() or name.strip() == "-1" or (is_number and int(name) >= present):
            break
        count += 1
    return count


def _count_nvidia() -> int:
    # NVIDIA's management library counts what this container may use, unlike /proc/driver/nvidia.
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if library.nvmlInit_v2() != 0:
        return 0
    try:
        count = ctypes.c_uint(0)
        return count.value if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
    finally:
        library.nvmlShutdown()


def _count_amd(nodes: Path) -> int:
    # Every node of the kernel's compute topology with SIMD units is a GPU; the others are CPUs.
    count = 0
    for properties in nodes.glob("*/properties"):
        try:
            units = re.search(r"^simd_count (\d+)$", properties.read_text(), re.MULTILINE)
        except OSError:
            continue  # a GPU that is not ours to use
        count += units is not None and int(units[1]) > 0
    return count
