"""A tiny run released as Pythia is: branches of steps, made by transformers."""

from pathlib import Path

import torch
import yaml
from transformers import GPTNeoXForCausalLM

from megatron.cli.pythia.models import ReleasedModel, model_of_files
from tests.hugging_face.hub_models import random_model, save

LAYERS, WIDTH, HEADS, TOKENS = 2, 32, 4, 100
ROWS = 104  # TOKENS, padded

CONFIG = {
    "neox_version": "v1.0",
    "pipe_parallel_size": 1,
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "bias_gelu_fusion": True,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "make_vocab_size_divisible_by": 8,
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": None,
    "train_iters": 143000,
    "lr_decay_style": "cosine",
    "warmup": 0.01,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "min_lr": 1e-4,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12},
    "zero_optimization": {"stage": 1},
}


def write_config(folder: Path, **changes: object) -> Path:
    """Write the run's configuration."""
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def released_model(folder: Path, **changes: object) -> ReleasedModel:
    """The run's model under a name of its own."""
    return model_of_files([write_config(folder, **changes)], name="tiny", num_tokens=TOKENS)


def trained(step: int, *, run: int = 0, **changes: object) -> GPTNeoXForCausalLM:
    """Weights that training could have left after ``step`` steps."""
    shape = {
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "vocab_size": ROWS,
    }
    return random_model(seed=1000 * run + step, **(shape | changes)).half()


def first_values(*, run: int = 0, factor: float = 1.0) -> GPTNeoXForCausalLM:
    """Weights as small_init and wang_init draw them; matrices times ``factor``."""
    model = trained(0, run=run).float()
    generator = torch.Generator().manual_seed(run)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            is_output_side = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            std = 2 / (LAYERS * WIDTH**0.5) if is_output_side else (2 / (5 * WIDTH)) ** 0.5
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * std * factor)
    return model.half()


def branch(folder: Path, step: int, model: GPTNeoXForCausalLM, **options: object) -> Path:
    """Save a step as a branch of the hub has it."""
    return save(model, folder / f"step{step}", **options)
