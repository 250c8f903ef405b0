"""The loss of a downloaded step, layer by layer: no more than one of them is in memory."""

from dataclasses import replace
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.cli.pythia.downloaded import Downloaded
from megatron.model.layer_plan import PlannedLayer, layer_plan
from megatron.model.loss import token_losses
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings

__all__ = ["sample_losses"]


def sample_losses(
    downloaded: Downloaded,
    settings: ModelSettings,
    samples: torch.Tensor,
    *,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the mean loss of each sample, in fp32 arithmetic.

    Args:
        downloaded: weights, whose names and shapes are the model's.
        settings: the model.
        samples: int64 token ids, (samples, sequence + 1).
        device: where to compute.

    Raises:
        CheckpointError: a tensor can't be read.
    """
    # Hugging Face's files hold biases as often as the model counts them.
    multiplicity = settings.tp_bias_multiplicity if downloaded.is_neox else 1
    actual = replace(
        settings, padded_vocab_size=downloaded.vocabulary, tp_bias_multiplicity=multiplicity
    )
    one_rank = TensorParallel()
    plan = layer_plan(actual, one_rank, seed=0, device=device)
    states = [row[None, :-1].to(device) for row in samples]
    tied: dict[str, torch.nn.Module] = {}
    with torch.no_grad():
        for layer in plan[:-1]:
            computed = _built(layer, downloaded, tied)
            states = [computed(state) for state in states]
        head = _built(plan[-1], downloaded, tied)
        losses = [
            token_losses(head(state), row[None, 1:].to(device), one_rank).mean()
            for state, row in zip(states, samples, strict=True)
        ]
    return torch.stack(losses).double().cpu()


def _built(layer: PlannedLayer, downloaded: Downloaded, tied: dict[str, torch.nn.Module]) -> Any:
    """Return a layer with its weights, or the one it is tied to."""
    if layer.tied_key in tied:
        return layer.bind_tied(tied[layer.tied_key])
    built = layer.factory()
    if layer.is_function:
        return built
    for name, parameter in built.named_parameters():
        found, weight = downloaded.read((layer.index, name))
        if weight.shape != parameter.shape:
            raise CheckpointError(
                f"{found}: {name} of layer {layer.index} has shape {list(weight.shape)}, not "
                f"{list(parameter.shape)}"
            )
        parameter.copy_(weight)
    downloaded.release()
    if layer.tied_key is not None:
        tied[layer.tied_key] = built
    return built
