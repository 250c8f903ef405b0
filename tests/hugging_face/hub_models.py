"""Tiny models of transformers', their directories, and our model with a checkpoint's weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron.checkpoint.hugging_face.model_files import stored_model
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.weights import copy_weights, read_weights
from tests.model.composed import ComposedModel

VOCABULARY = 120


def random_model(*, seed: int = 3, **changes: Any) -> GPTNeoXForCausalLM:
    """A model whose every parameter, biases and norms too, shows mistakes."""
    keys = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "hidden_act": "gelu",
        "attn_implementation": "eager",
    } | changes
    keys.setdefault("intermediate_size", 4 * keys["hidden_size"])
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**keys))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(scale * noise)
        for name, parameter in model.named_parameters():
            if "norm.weight" in name or "layernorm.weight" in name:
                parameter.add_(1)
    return model.eval()


def save(model: GPTNeoXForCausalLM, directory: Path, **options: Any) -> Path:
    """Save as transformers does."""
    model.save_pretrained(directory, **options)
    return directory


def load(directory: Path) -> GPTNeoXForCausalLM:
    """Load as transformers does, refusing what it would make up."""
    model, report = GPTNeoXForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def tokens(model: GPTNeoXForCausalLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, model.config.max_position_embeddings)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return found if torch.is_tensor(found) else found.logits


def our_model(checkpoint: Path) -> ComposedModel:
    """Our model on one rank, with a checkpoint's weights through the loader of a run."""
    _, settings = stored_model(checkpoint)
    model = ComposedModel(settings)
    module: Any = SimpleNamespace(sequential=model)
    weights = read_weights(
        StoredCheckpoint(checkpoint),
        module,
        settings=settings,
        tensor_parallel_size=1,
        tensor_rank=0,
    )
    copy_weights(module, weights)
    return model


def file_bytes(directory: Path) -> dict[str, bytes]:
    """The weights' files of a directory."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}
