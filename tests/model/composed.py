"""The planned layers put together without an engine, and NeoX's keys with their defaults."""

from types import SimpleNamespace
from typing import Any

import torch

from megatron.model.facts import ModelFacts
from megatron.model.layer_plan import layer_plan
from megatron.model.loss import cross_entropy_loss
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings

MODEL_KEYS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": None,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "intermediate_size": None,
    "expansion_factor": None,
    "mlp_multiple_of": 1,
    "norm": "layernorm",
    "layernorm_epsilon": 1e-5,
    "rms_norm_epsilon": 1e-8,
    "scalenorm_epsilon": 1e-8,
    "pos_emb": "learned",
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "rotary_save_freqs_buffer": False,
    "rpe_num_buckets": 32,
    "rpe_max_distance": 128,
    "opt_pos_emb_offset": 0,
    "no_weight_tying": False,
    "attention_config": None,
    "activation": "gelu",
    "bias_gelu_fusion": False,
    "use_qk_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "sliding_window_width": None,
    "gpt_j_residual": False,
    "gpt_j_tied": False,
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
    "init_method": "normal",
    "output_layer_init_method": "scaled_normal",
    "init_method_std": 0.02,
}


def settings_of(*, vocabulary: int = 128, multiplicity: int = 1, **keys: Any) -> ModelSettings:
    """Settings from NeoX's defaults and ``keys``; what isn't a model key is left out."""
    dropouts = {name: keys.get(name, 0.0) for name in ("hidden_dropout", "attention_dropout")}
    known = {name: value for name, value in keys.items() if name in MODEL_KEYS}
    return ModelSettings.from_config(
        SimpleNamespace(**{**MODEL_KEYS, **known}),
        SimpleNamespace(**dropouts),
        ModelFacts(vocabulary, multiplicity),
    )


class ComposedModel(torch.nn.Module):
    """All layers in order; parameters are called ``<layer number>.<name>``."""

    def __init__(
        self,
        settings: ModelSettings,
        tensor_parallel: TensorParallel | None = None,
        *,
        seed: int = 1234,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel or TensorParallel()
        plan = layer_plan(settings, self.tensor_parallel, seed=seed, dtype=dtype, **options)
        self.layers: list[Any] = []
        tied: dict[str, torch.nn.Module] = {}
        for layer in plan:
            if layer.tied_key in tied:
                self.layers.append(layer.bind_tied(tied[layer.tied_key]))
                continue
            built = layer.factory()
            self.layers.append(built)
            if not layer.is_function:
                self.add_module(str(layer.index), built)
            if layer.tied_key:
                tied[layer.tied_key] = built

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = tokens
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        """Loss of int64 samples (batch, sequence + 1), every token counting."""
        labels = samples[:, 1:]
        return cross_entropy_loss(
            self(samples[:, :-1]), labels, torch.ones(labels.shape), self.tensor_parallel
        )


def random_samples(settings: ModelSettings, *, rows: int = 3, seed: int = 0) -> torch.Tensor:
    """Int64 samples (rows, sequence + 1)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, settings.seq_length + 1)
    return torch.randint(0, settings.padded_vocab_size, shape, generator=generator)


def randomise(model: torch.nn.Module, seed: int = 5) -> None:
    """Give every parameter, biases and norms too, values that show mistakes."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(seed + index)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (parameter.dim() == 1))
