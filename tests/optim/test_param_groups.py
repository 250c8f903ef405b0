"""Which parameters decay, and in which order the groups list them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron.optim.param_groups import NORM_CLASS_NAMES, weight_decay_groups

ORDER = json.loads((Path(__file__).parents[1] / "data/optim/group_order.json").read_text())


def names_by_group(module, weight_decay=0.1):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [names[id(parameter)] for parameter in group["params"]]
        for group in weight_decay_groups(module, weight_decay)
    ]


def block(hidden_size=4):
    return nn.ModuleDict(
        {
            "input_layernorm": nn.LayerNorm(hidden_size),
            "attention": nn.ModuleDict(
                {
                    "query_key_value": nn.Linear(hidden_size, 3 * hidden_size),
                    "dense": nn.Linear(hidden_size, hidden_size),
                }
            ),
            "post_attention_layernorm": nn.LayerNorm(hidden_size),
            "mlp": nn.ModuleDict(
                {
                    "linear1": nn.Linear(hidden_size, 4 * hidden_size),
                    "linear2": nn.Linear(4 * hidden_size, hidden_size),
                }
            ),
        }
    )


def test_groups_of_a_neox_model_list_the_names_of_real_neox_in_its_order():
    model = nn.ModuleDict({"0": nn.ModuleDict({"word_embeddings": nn.Embedding(8, 4)})})
    model.update({str(index): block() for index in (2, 3, 4, 5)})
    model["7"] = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    model["8"] = nn.ModuleDict({"final_linear": nn.Linear(4, 8, bias=False)})
    assert names_by_group(model) == [
        ORDER["weight_decay_params"],
        ORDER["no_weight_decay_params"],
    ]


def test_only_the_second_group_overrides_the_optimizers_decay():
    model = block()
    decaying, others = weight_decay_groups(model, 0.1)
    assert decaying.keys() == {"params", "name"}
    assert (decaying["name"], others["name"]) == ("weight_decay_params", "no_weight_decay_params")
    optimizer = torch.optim.AdamW([decaying, others], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", sorted(NORM_CLASS_NAMES))
def test_a_norm_is_known_by_its_class_name(name):
    norm = type(name, (nn.Module,), {})()
    norm.scale = nn.Parameter(torch.ones(4))
    assert names_by_group(nn.ModuleDict({"norm": norm})) == [[], ["norm.scale"]]


def test_without_decay_there_is_one_group_of_everything():
    model = block()
    (group,) = weight_decay_groups(model, 0.0)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == len(list(model.parameters()))


def test_a_flagged_parameter_does_not_decay():
    linear = nn.Linear(4, 4)
    linear.weight._no_weight_decay = True
    assert names_by_group(linear) == [[], ["weight", "bias"]]


def test_a_frozen_parameter_is_in_no_group():
    linear = nn.Linear(4, 4)
    linear.weight.requires_grad_(False)
    assert names_by_group(linear) == [[], ["bias"]]


def test_a_shared_parameter_is_listed_once():
    head = nn.Linear(4, 8, bias=False)
    embedding = nn.Embedding(8, 4)
    head.weight = embedding.weight
    groups = weight_decay_groups(nn.ModuleList([embedding, head]), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 0]
