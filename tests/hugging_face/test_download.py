"""Models by their names on the hub, from its library's cache: these tests are offline."""

import json
from pathlib import Path

import pytest

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.hugging_face.download import local_directory
from tests.hugging_face.hub_models import random_model, save
from tools.ckpts.convert_hf_to_neox import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path) -> None:
    model = cache / "models--tiny--pythia"
    snapshot = model / "snapshots" / COMMIT
    save(random_model(), snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "step3000").write_text(COMMIT)
    (model / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(model / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")


def test_a_cached_branch_is_converted(tmp_path, monkeypatch):
    fill_cache(tmp_path / "cache")
    # what HF_HUB_CACHE and HF_HUB_OFFLINE set at a start
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def convert(revision: str) -> None:
        save_as = str(tmp_path / revision)
        main(["tiny/pythia", save_as, "--revision", revision, "--step", "3"])

    convert("step3000")
    ledger = json.loads((tmp_path / "step3000" / "global_step3" / "ledger.json").read_text())
    assert ledger["model"]["padded_vocab_size"] == 120
    with pytest.raises(CheckpointError, match="tiny/pythia at step4000 is no directory here"):
        convert("step4000")


def test_what_is_no_name(tmp_path):
    assert local_directory(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="nowhere is neither a directory nor a model's name"):
        local_directory("nowhere")
    with pytest.raises(ConfigError, match="is a directory, which has no revision step1"):
        local_directory(str(tmp_path), "step1")
