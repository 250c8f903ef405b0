"""The GPT-NeoX family of models on megatron-core's tensor-parallel layers.

    facts, settings     what the model is; no torch
    parameter_shapes    names and shapes of all parameters, without building them; no torch
    tp_layout           which part of each tensor a tensor rank holds, and back
    initialisation      first values, equal at every topology
    light_import        megatron-core without compilers and trackers
    parallel_layers     embedding and linear layers over tensor ranks   (imports megatron.core)
    norms, rotary, score_bias, attention, feed_forward, block, embedding, head      the layers
    key_value_cache     what generating text keeps of the tokens so far
    layer_plan          NeoX's numbered list of layers
    loss                vocabulary-parallel cross entropy

Hidden states are [sequence, batch, hidden] inside the blocks and [batch, sequence, hidden] at both
ends, as in NeoX. Nothing here imports CUDA-only code or reads global process groups: the tensor
group is an argument.
"""

import warnings

# megatron-core says so four times per rank at its import. It is meant for its own optimizers, which
# training here never uses, and there is nothing for a user to do about it.
warnings.filterwarnings(
    "ignore", message="Transformer Engine and Apex are not installed", module=r"megatron\.core\."
)
