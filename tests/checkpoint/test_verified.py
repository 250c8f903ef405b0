"""All ranks come to one verdict on a checkpoint's bytes, each having read a part of them."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.base.file_digests import digest_file
from megatron.checkpoint.verified import verify_together
from megatron.ledger.manifest import Manifest, StoredFile, write_manifest

NEOX = Path(__file__).parents[1] / "data" / "oracle" / "ckpt_b" / "global_step10"
RANKS = 3


def together(look: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Run ``look(rank, gather)`` on threads that stand for ranks; return what each returns."""
    barrier, values = threading.Barrier(RANKS, timeout=30), [None] * RANKS
    results: list[Any] = [None] * RANKS

    def rank_main(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        try:
            results[rank] = look(rank, gather)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def verdicts(*checkpoints: Path, **options: bool) -> list[str | None]:
    """Return every rank's verdict; with several paths rank r looks at the r-th."""
    paths = list(checkpoints) if len(checkpoints) == RANKS else [checkpoints[0]] * RANKS
    options = {"is_numbered": True, **options}
    return together(
        lambda rank, gather: verify_together(
            paths[rank], gather, rank=rank, world_size=RANKS, **options
        )
    )


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "global_step5"
    directory.mkdir()
    files = {}
    for number in range(5):
        path = directory / f"layer_{number:02d}-model_00-model_states.pt"
        path.write_bytes(bytes([number]) * 1000 * (number + 1))
        files[path.name] = StoredFile(path.stat().st_size, digest_file(path))
    write_manifest(
        directory,
        Manifest(sequence=2, step=5, run_id=None, attempt=None, parent=None, files=files),
    )
    return directory


def test_a_whole_checkpoint_is_good_on_all_ranks(checkpoint):
    assert verdicts(checkpoint) == [None] * RANKS


@pytest.mark.parametrize("number", range(5))
def test_damage_in_anybodys_share_is_told_by_all(checkpoint, number):
    path = checkpoint / f"layer_{number:02d}-model_00-model_states.pt"
    content = bytearray(path.read_bytes())
    content[number] ^= 4
    path.write_bytes(content)
    [verdict] = set(verdicts(checkpoint))
    assert verdict.startswith(f"{path.name} holds other bytes than were written")


def test_files_of_several_shares_are_all_named(checkpoint):
    for path in checkpoint.glob("layer_*"):
        path.write_bytes(b"!" * path.stat().st_size)
    [verdict] = set(verdicts(checkpoint))
    assert verdict.count("holds other bytes") == 5


def test_ranks_that_see_different_directories_find_out(checkpoint, tmp_path):
    other = tmp_path / "other" / "global_step5"
    shutil.copytree(checkpoint, other)
    (other / "manifest.json").unlink()
    [verdict] = set(verdicts(checkpoint, checkpoint, other))
    assert "rank 0 the manifest.json of commit 2, rank 2 no manifest.json" in verdict
    [verdict] = set(verdicts(checkpoint, tmp_path / "nowhere", checkpoint))
    assert "rank 1 no such directory; it must lie on a file system that all nodes share" in verdict


def test_a_failure_nobody_thought_of_reaches_all_ranks(checkpoint, monkeypatch):
    def fail(*_: object) -> list[str]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("megatron.checkpoint.verified.digest_problems", fail)
    assert verdicts(checkpoint) == ["ZeroDivisionError: a bug"] * RANKS


def test_neox_files_are_one_whole_and_match_their_checksums(tmp_path):
    assert verdicts(NEOX, is_numbered=False) == [None] * RANKS
    copy = tmp_path / "global_step10"
    shutil.copytree(NEOX, copy, copy_function=shutil.copyfile)
    path = copy / "layer_05-model_01-model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    [verdict] = set(verdicts(copy, is_numbered=False))
    assert verdict.startswith(f"{path.name} ")
    assert "checksum" in verdict
    path.unlink()
    [verdict] = set(verdicts(copy, is_numbered=False))
    assert path.name in verdict
    assert "missing" in verdict


def test_a_numbered_checkpoint_without_a_manifest_is_not_taken_for_neoxs():
    [verdict] = set(verdicts(NEOX, is_numbered=True))
    assert verdict.startswith("manifest.json is missing")
