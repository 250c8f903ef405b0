"""Which environment variables go from the launcher to the ranks of other nodes.

Those that say how to compute and to communicate, and where software is. What describes one machine
(its devices, its temporary folder, its shell) stays there. A ``.deepspeed_env`` file in the home
directory or the working directory adds lines ``NAME=VALUE``; ``$DS_ENV_FILE`` is another name
for it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron.engine.launch.job_file import TOKEN_VARIABLE

__all__ = ["travelling_environment"]

_PREFIXES = (
    *("GLOO_", "NCCL_", "UCX_", "MV2_", "FI_", "RDMAV_", "IBV_", "PSM3_", "HSA_", "MIOPEN_"),
    *("PYTHON", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "NUMEXPR_", "ATEN_"),
    *("TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NVTE_", "TRITON_", "HIP_", "ROCM_"),
    *("DS_", "DEEPSPEED_", "NEOX_", "DEEPY_", "MEGATRON_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"),
    *("TOKENIZERS_", "TIKTOKEN_", "WANDB_", "COMET_", "MLFLOW", "AWS_EC2_METADATA_"),
    *("SLURM_JOB_", "SLURM_ARRAY_"),  # of the whole job, not of a node or a step
)
_NAMES = (
    *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "LOGLEVEL"),
    *("SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "SLURM_NNODES", "LANG", "LC_ALL"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
_OF_ONE_MACHINE = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NEOX_PROGRESS_FILE", TOKEN_VARIABLE),
    *("SLURM_JOB_GPUS", "SLURM_JOB_CPUS_PER_NODE", "WANDB_API_KEY", "COMET_API_KEY", "HF_TOKEN"),
)
_ENV_FILE = ".deepspeed_env"
_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>.*)")


def travelling_environment(
    environ: Mapping[str, str], *, home: str | Path, working_directory: str | Path
) -> tuple[dict[str, str], list[str]]:
    """Return the variables that every node gets, and a note per line that can't be read."""
    chosen = {
        name: value
        for name, value in environ.items()
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _OF_ONE_MACHINE
    }
    notes: list[str] = []
    file = Path(environ.get("DS_ENV_FILE") or _ENV_FILE)
    paths = [os.path.abspath(Path(folder, file)) for folder in (home, working_directory)]
    for path in dict.fromkeys(paths):  # the nearer one wins
        chosen.update(_read(path, notes))
    return chosen, notes


def _read(path: str, notes: list[str]) -> dict[str, str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            notes.append(f"{path}:{number}: {line!r} is not NAME=VALUE; left out")
            continue
        value = match["value"]
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[match["name"]] = value
    return found
