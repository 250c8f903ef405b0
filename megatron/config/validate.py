"""Checks on the resolved keys. Each returns the problems it sees; loading reports all together."""

from collections.abc import Callable

from megatron.config.draft import Draft, reads

__all__ = ["CHECKS", "Check"]

Check = Callable[[Draft], list[str]]

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


@reads("deepspeed")
def check_deepspeed(draft: Draft) -> list[str]:
    """DeepSpeed can't be turned off."""
    if draft["deepspeed"]:
        return []
    return [f"{draft.say('deepspeed')} must be true: there is no other engine"]


def require(name: str) -> Check:
    """Return the check that a key is set."""

    @reads(name)
    def check(draft: Draft) -> list[str]:
        if draft[name] is not None:
            return []
        return [f"{name} is missing; no default would be sensible"]

    return check


@reads("hidden_size", "num_attention_heads", "attention_config", "model_parallel_size")
def check_heads(draft: Draft) -> list[str]:
    """Heads share the width evenly, and tensor ranks share the heads evenly."""
    hidden, heads, tensor = (
        draft[name] for name in ("hidden_size", "num_attention_heads", "model_parallel_size")
    )
    if hidden is None or heads is None:
        return []
    problems = []
    if hidden % heads and "mamba" not in (draft["attention_config"] or ()):
        problems.append(
            f"{draft.say('hidden_size')} must be a multiple of {draft.say('num_attention_heads')}"
        )
    if heads % tensor:
        problems.append(
            f"{draft.say('num_attention_heads')} must be a multiple of "
            f"{draft.say('model_parallel_size')}: every tensor-parallel rank has whole heads"
        )
    return problems


@reads(
    "num_attention_heads",
    "num_kv_heads",
    "model_parallel_size",
    "attention_config",
    "sparsity_config",
)
def check_kv_heads(draft: Draft) -> list[str]:
    """Query heads share key and value heads evenly, on every tensor rank."""
    heads, kv_heads = draft["num_attention_heads"], draft["num_kv_heads"]
    if kv_heads is None or heads is None or kv_heads == heads:
        return []
    said = draft.say("num_kv_heads")
    if heads % kv_heads:
        return [f"{said} must divide {draft.say('num_attention_heads')}"]
    problems = []
    if kv_heads % draft["model_parallel_size"]:
        problems.append(f"{said} must be a multiple of {draft.say('model_parallel_size')}")
    if draft["sparsity_config"]:
        problems.append(f"{said} can't be combined with sparsity_config")
    others = sorted(set(draft["attention_config"] or ()) - {"global", "flash"})
    if others:
        problems.append(f"{said} works with global and flash attention, not {', '.join(others)}")
    return problems


@reads("seq_length", "max_position_embeddings")
def check_positions(draft: Draft) -> list[str]:
    """Every token of a sequence has a position."""
    length, positions = draft["seq_length"], draft["max_position_embeddings"]
    if length is None or positions is None or length <= positions:
        return []
    return [
        f"{draft.say('seq_length')} is longer than {draft.say('max_position_embeddings')}; "
        f"set max_position_embeddings to at least {length}"
    ]


@reads("intermediate_size", "expansion_factor")
def check_mlp_width(draft: Draft) -> list[str]:
    """The MLP's width is said in one way."""
    if draft["intermediate_size"] is None or draft["expansion_factor"] is None:
        return []
    return [
        f"{draft.say('intermediate_size')} and {draft.say('expansion_factor')} both give the MLP's "
        "width; keep one"
    ]


@reads("lr", "min_lr", "optimizer")
def check_learning_rate(draft: Draft) -> list[str]:
    """The floor is below the peak."""
    if draft["min_lr"] is None or draft["min_lr"] <= draft["lr"]:
        return []
    return [f"{draft.say('min_lr')} is above the peak learning rate {draft['lr']}"]


@reads("override_lr_scheduler", "use_checkpoint_lr_scheduler")
def check_scheduler_source(draft: Draft) -> list[str]:
    """A resumed run has one schedule."""
    if not (draft["override_lr_scheduler"] and draft["use_checkpoint_lr_scheduler"]):
        return []
    return [
        "override_lr_scheduler takes the schedule from the configuration and "
        "use_checkpoint_lr_scheduler from the checkpoint; keep one"
    ]


@reads("save", "checkpoint_factor", "extra_save_iters")
def check_save(draft: Draft) -> list[str]:
    """A folder to save to needs a moment to save at."""
    if draft["save"] is None or draft["checkpoint_factor"] or draft["extra_save_iters"]:
        return []
    return [
        f"{draft.say('save')} is set, but not when to save: set checkpoint_factor (steps between "
        "checkpoints) or extra_save_iters"
    ]


@reads("num_layers", "num_unique_layers")
def check_unique_layers(draft: Draft) -> list[str]:
    """Shared layers come out even."""
    layers, unique = draft["num_layers"], draft["num_unique_layers"]
    if layers is None or unique is None or layers % unique == 0:
        return []
    return [f"{draft.say('num_unique_layers')} must divide {draft.say('num_layers')}"]


@reads("precision", "fp16_lm_cross_entropy", "fp16", "bf16")
def check_fp16_loss(draft: Draft) -> list[str]:
    """An fp16 loss needs an fp16 model."""
    if not draft["fp16_lm_cross_entropy"] or draft["precision"] == "fp16":
        return []
    return [f"{draft.say('fp16_lm_cross_entropy')} needs precision fp16, not {draft['precision']}"]


@reads(
    "data_path", "train_data_paths", "valid_data_paths", "test_data_paths", "train_label_data_paths"
)
def check_data_paths(draft: Draft) -> list[str]:
    """One dataset to split, or three lists of them."""
    lists = [f"{split}_data_paths" for split in ("train", "valid", "test")]
    given = [name for name in lists if draft[name]]
    problems = []
    if given and len(given) < 3:
        missing = [name for name in lists if name not in given]
        problems.append(
            f"{' and '.join(given)} given without {' and '.join(missing)}; "
            "give all three lists, or data_path alone"
        )
    if given and draft["data_path"] is not None:
        problems.append(
            f"{draft.say('data_path')} and {' and '.join(given)} are both given; keep one of them"
        )
    if draft["train_label_data_paths"] and (not draft["train_data_paths"] or draft["data_path"]):
        problems.append("train_label_data_paths needs train_data_paths, not data_path")
    return problems


@reads(
    "train_data_paths",
    "valid_data_paths",
    "test_data_paths",
    "train_data_weights",
    "valid_data_weights",
    "test_data_weights",
    "pos_train_data_paths",
    "pos_valid_data_paths",
    "pos_test_data_paths",
)
def check_weights(draft: Draft) -> list[str]:
    """Every dataset has a weight."""
    problems = []
    for split in ("train", "valid", "test"):
        paths = draft[f"{split}_data_paths"] or draft[f"pos_{split}_data_paths"]
        weights = draft[f"{split}_data_weights"]
        if paths and weights is not None and len(weights) != len(paths):
            problems.append(
                f"{split}_data_weights has {len(weights)} weights for {len(paths)} "
                f"{split}_data_paths ({draft.origin(f'{split}_data_weights')})"
            )
    return problems


@reads("amp", "flops_profiler")
def check_enabled_blocks(draft: Draft) -> list[str]:
    """Blocks that can be switched off say whether they are."""
    return [
        f'{draft.say(name)} must say "enabled": true or false'
        for name in ("amp", "flops_profiler")
        if draft[name] and "enabled" not in draft[name]
    ]


@reads("scheduler")
def check_scheduler(draft: Draft) -> list[str]:
    """A DeepSpeed schedule has a type and parameters."""
    block = draft["scheduler"]
    if block is None or (type(block.get("type")) is str and type(block.get("params")) is dict):
        return []
    return [f'{draft.say("scheduler")} must have "type", a name, and "params", a mapping']


@reads("moe_num_experts", "zero_optimization")
def check_experts(draft: Draft) -> list[str]:
    """Experts and ZeRO 2 or 3 exclude each other."""
    if (draft["moe_num_experts"] or 1) == 1 or draft["zero_stage"] in (0, 1):
        return []
    return [f"{draft.say('moe_num_experts')} needs ZeRO stage 0 or 1, not {draft['zero_stage']}"]


@reads("attention_config", "partition_activations")
def check_gmlp(draft: Draft) -> list[str]:
    """gMLP layers don't split their activations."""
    if not draft["partition_activations"] or not (
        {"gmlp", "amlp"} & set(draft["attention_config"] or ())
    ):
        return []
    return [f"{draft.say('partition_activations')} can't be combined with gmlp or amlp layers"]


CHECKS: tuple[Check, ...] = (
    check_deepspeed,
    *map(require, _REQUIRED),
    check_heads,
    check_kv_heads,
    check_positions,
    check_mlp_width,
    check_learning_rate,
    check_scheduler_source,
    check_save,
    check_unique_layers,
    check_fp16_loss,
    check_data_paths,
    check_weights,
    check_enabled_blocks,
    check_scheduler,
    check_experts,
    check_gmlp,
)
