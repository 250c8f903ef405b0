"""The loss of a downloaded step on the batch that training read next, beside its neighbours'."""

import math

import numpy as np
import pytest
import torch
import yaml

from megatron.cli.pythia.downloaded import open_downloaded
from megatron.cli.pythia.loss_check import LossCheck, loss_findings
from megatron.cli.pythia.losses import sample_losses
from megatron.cli.pythia.main import main
from megatron.stream.indexed_dataset import IndexedDatasetBuilder
from tests.pythia import recorded_runs
from tests.pythia_models.stand_ins import ROWS, TOKENS, branch, released_model, trained

BATCH, SEQ_LENGTH = 8, 16


@pytest.fixture
def rows(tmp_path):
    """A preshuffled set of 64 steps, its samples by row."""
    random = np.random.default_rng(0)
    rows = random.integers(0, TOKENS, (64 * BATCH, SEQ_LENGTH + 1)).astype(np.uint16)
    builder = IndexedDatasetBuilder(str(tmp_path / "document.bin"), np.uint16)
    for row in rows:
        builder.add_item(row)
        builder.end_document()
    builder.finalize(str(tmp_path / "document.idx"))
    return torch.from_numpy(rows.astype(np.int64))


def transformers_losses(model, samples):
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        logits = model.float()(samples[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), samples[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(samples), -1).mean(1)


def guessing(step):
    """Weights under which every token is as likely as any other."""
    model = trained(step)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def misled(step):
    """Weights that are sure of the wrong tokens."""
    model = trained(step)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def findings_of(tmp_path, model, step, *against):
    how = LossCheck(prefix=str(tmp_path / "document"), num_samples=4)
    found = list(loss_findings(tmp_path / f"step{step}", model, step, against, how))
    return [finding.text for finding in found if finding.kind == "note"], [
        finding.text for finding in found if finding.kind == "warning"
    ]


def test_it_is_what_transformers_computes(rows, tmp_path):
    model = released_model(tmp_path, train_iters=64)
    hub = trained(20, hidden_act="gelu_fast")
    opened = open_downloaded(branch(tmp_path, 20, hub), model.settings)
    losses = sample_losses(opened, model.settings, rows[:3])
    assert torch.allclose(losses.float(), transformers_losses(hub, rows[:3]), atol=2e-5)


@pytest.mark.parametrize("run", ["tp1_dp2_zero1", "tp2_dp2_zero1"])
def test_of_neoxs_files_it_is_what_neox_recorded(run, tmp_path):
    """The biases that each of two tensor ranks adds once more are in it."""
    recorded = recorded_runs.unpack(run, tmp_path)
    settings = recorded_runs.model_settings(recorded)
    tokens = torch.from_numpy(np.load(recorded / "data_tokens.npy").astype(np.int64))
    opened = open_downloaded(recorded / "global_step5", settings)
    batch = len(tokens) // 10
    loss = sample_losses(opened, settings, tokens[5 * batch : 6 * batch]).mean().item()
    assert loss == pytest.approx(recorded_runs.losses(recorded, "train_log")[5], abs=2e-3)


def test_the_samples_are_those_of_the_batch_after_the_step(rows, tmp_path):
    model = released_model(tmp_path, train_iters=64)
    hub = trained(20, hidden_act="gelu_fast")
    branch(tmp_path, 20, hub)
    (note,), _ = findings_of(tmp_path, model, 20)
    expected = transformers_losses(hub, rows[20 * BATCH : 20 * BATCH + 4]).mean()
    assert note == f"loss on the first 4 samples of step 21's batch: {expected:.4f}"


def test_a_loss_above_an_earlier_steps_or_below_a_later_ones_is_warned_of(rows, tmp_path):
    model = released_model(tmp_path, train_iters=64)
    branch(tmp_path, 20, misled(20))
    branch(tmp_path, 10, guessing(10))
    branch(tmp_path, 30, guessing(30))
    (note,), (warning,) = findings_of(tmp_path, model, 20, tmp_path / "step10", tmp_path / "step30")
    assert f", at step 10 {math.log(ROWS):.4f}, at step 30 {math.log(ROWS):.4f}" in note
    assert "higher than that of the earlier step 10" in warning
    _, (warning,) = findings_of(tmp_path, model, 10, tmp_path / "step20")
    assert "lower than that of the later step 20" in warning
    assert findings_of(tmp_path, model, 10, tmp_path / "step30")[1] == []


def test_a_step_that_has_learnt_nothing_is_warned_of(rows, tmp_path):
    model = released_model(tmp_path, train_iters=2000)
    branch(tmp_path, 600, guessing(600))
    _, (warning,) = findings_of(tmp_path, model, 600)
    assert "is hardly better than guessing, 4.6052, after 600 steps" in warning


def test_without_tokens_or_a_next_batch_it_is_left_out(rows, tmp_path):
    model = released_model(tmp_path, train_iters=64)
    branch(tmp_path, 64, trained(64))
    branch(tmp_path, 20, trained(20))
    assert findings_of(tmp_path, model, 64)[0] == [
        "no loss was computed: step 64 is the last, no batch follows it"
    ]
    (tmp_path / "document.bin").unlink()
    (note,), _ = findings_of(tmp_path, model, 20)
    assert note.startswith("no loss was computed: ")
    assert "document.bin" in note


def test_the_command_tells_it_where_data_is_named(rows, tmp_path, capsys):
    model = released_model(tmp_path, train_iters=64)
    keys = yaml.safe_load(model.files[0].read_text())
    paths = {f"{split}_data_paths": ["elsewhere"] for split in ("train", "valid", "test")}
    model.files[0].write_text(yaml.safe_dump(keys | paths))
    step = branch(tmp_path, 20, trained(20))
    command = f"check {step} --config {model.files[0]} --step 20 --data {tmp_path / 'document'}"
    assert main(command.split()) == 0
    assert "note: loss on the first 4 samples of step 21's batch: " in capsys.readouterr().out
    assert main([*command.split(), "--loss-samples", "0"]) == 0
    assert "loss on" not in capsys.readouterr().out
