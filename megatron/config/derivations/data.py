"""Defaults that depend on which data and prompts are given."""

from typing import Any

from megatron.config.draft import Draft, reads

__all__ = ["derive_data_weights", "derive_text_gen_type"]


@reads(
    "train_data_paths",
    "valid_data_paths",
    "test_data_paths",
    "pos_train_data_paths",
    "pos_valid_data_paths",
    "pos_test_data_paths",
    "train_data_weights",
    "valid_data_weights",
    "test_data_weights",
)
def derive_data_weights(draft: Draft) -> dict[str, Any]:
    """Weigh datasets equally where nothing else is written."""
    changes = {}
    for split in ("train", "valid", "test"):
        paths = draft[f"{split}_data_paths"] or draft[f"pos_{split}_data_paths"]
        if paths and draft[f"{split}_data_weights"] is None:
            changes[f"{split}_data_weights"] = [1.0] * len(paths)
    return changes


@reads("text_gen_type", "sample_input_file")
def derive_text_gen_type(draft: Draft) -> dict[str, Any]:
    """Generate from the prompt file if there is one."""
    if draft["text_gen_type"] is not None:
        return {}
    return {"text_gen_type": "input-file" if draft["sample_input_file"] else "unconditional"}
