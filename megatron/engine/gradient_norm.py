"""Gradient norm and clipping where no DeepSpeed optimizer does it (fp32 without ZeRO)."""

from collections.abc import Iterable

import torch
import torch.distributed

from megatron.engine.distributed import ProcessGroups

__all__ = ["GradientClipper"]


class GradientClipper:
    """Computes the global L2 norm of a step's gradients and scales them to ``limit``.

    DeepSpeed's own fp32 clipping leaves out replicated parameters of every pipeline stage but the
    first (it counts them where the rank *in the model group* is 0), and counts tied embeddings
    twice. Here each parameter counts once: sharded ones on every tensor rank, replicated ones on
    tensor rank 0, tied ones on the stage that owns them.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], groups: ProcessGroups, limit: float
    ) -> None:
        self.parameters = list(parameters)
        self.groups = groups
        self.limit = limit  # 0: measure, don't clip
        self.last_norm: float | None = None

    def clip(self) -> None:
        """Measure ``last_norm`` and, if it is above the limit, scale all gradients in place."""
        total = torch.zeros((), dtype=torch.float32, device=self.groups.device)
        for parameter in self.parameters:
            if parameter.grad is not None and self._counts(parameter):
                total += parameter.grad.detach().float().pow(2).sum()
        torch.distributed.all_reduce(total, group=self.groups.model)
        norm = total.sqrt()
        self.last_norm = float(norm)
        if self.limit > 0:
            scale = torch.clamp(self.limit / (norm + 1e-6), max=1.0)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale.to(parameter.grad.dtype))

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        return is_sharded or self.groups.place.tensor_parallel_rank == 0
