"""The names of a checkpoint's torch files: which layer, which ranks.

layer_{LL}-model_{TT}-model_states.pt        weights of one layer, tensor rank TT (pipelines)
mp_rank_{XX}_model_states.pt                 metadata of a stage's tensor rank; without a pipeline
                                             also its weights
zero_pp_rank_{D}_mp_rank_{XX}_model_states.pt           the same, by ZeRO 3
[bf16_]zero_pp_rank_{D}_mp_rank_{XX}_optim_states.pt    optimizer state of a data-parallel rank

No torch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["TorchFiles", "sorted_files"]

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_MODEL_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SCATTERED = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
# DeepSpeed of NeoX v1.0 left the underscore out.
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


@dataclass
class TorchFiles:
    """File names by what they hold."""

    layers: dict[tuple[int, int], str] = field(default_factory=dict)  # layer, tensor rank
    model_states: dict[int, str] = field(default_factory=dict)  # model rank
    scattered: dict[tuple[int, int], str] = field(default_factory=dict)  # data rank, model rank
    optimizer: dict[tuple[int, int], str] = field(default_factory=dict)  # data rank, model rank
    others: list[str] = field(default_factory=list)  # .pt files that nothing reads

    @property
    def are_bf16(self) -> bool:
        """Whether DeepSpeed's bf16 optimizer wrote the optimizer files."""
        return any(name.startswith("bf16_") for name in self.optimizer.values())


def sorted_files(names: Iterable[str]) -> TorchFiles:
    """Sort the names of a directory's files; of two for one place, the first is kept."""
    files = TorchFiles()
    for name in sorted(names):
        if match := _LAYER.fullmatch(name):
            files.layers.setdefault((int(match[1]), int(match[2])), name)
        elif match := _MODEL_STATES.fullmatch(name):
            files.model_states.setdefault(int(match[1]), name)
        elif match := _SCATTERED.fullmatch(name):
            files.scattered.setdefault((int(match[1]), int(match[2])), name)
        elif match := _OPTIMIZER.fullmatch(name):
            files.optimizer.setdefault((int(match[2]), int(match[3])), name)
        elif name.endswith(".pt"):
            files.others.append(name)
    return files
