"""Real runs with s3_path and keep_last_n_checkpoints, against moto's server on this machine."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from megatron.ledger.run_directory import list_checkpoints
from tests.engine.interrupted_runs import InterruptedRun
from tests.engine.training_runs import copy_corpus
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """In a process of its own: this one, from which ranks are forked, must have no threads."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def bucket(server, monkeypatch) -> Any:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3").Bucket("bucket")
    bucket.create()
    yield bucket
    bucket.objects.all().delete()
    bucket.delete()


def run_in(folder: Path, **changes: Any) -> InterruptedRun:
    folder.mkdir(exist_ok=True)
    data = {"data_path": copy_corpus(folder)["data_path"], "split": "90,5,5", "num_gpus": 2}
    keys = {"s3_path": "s3://bucket/models", "eval_interval": 100, "async_save": True}
    return InterruptedRun(folder, data, **keys | changes)


def local_files(save: Path, step: int) -> dict[str, bytes]:
    checkpoint = save / f"global_step{step}"
    return {
        path.relative_to(save).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }


def test_every_checkpoint_is_copied_and_only_the_newest_are_kept_here(tmp_path, bucket):
    run = run_in(tmp_path / "a", keep_last_n_checkpoints=2)
    run.launch()
    assert list_checkpoints(run.save) == [9, 12]
    assert not [path.name for path in run.save.glob(".*") if path.name != ".lock-guard"]
    remote = {one.key: one.get()["Body"].read() for one in bucket.objects.all()}
    steps = {name.split("/")[2] for name in remote}
    assert steps == {f"global_step{step}" for step in (3, 6, 9, 12)}
    for step in (9, 12):
        prefix = f"models/save/global_step{step}/"
        copy = {name: data for name, data in remote.items() if name.startswith(prefix)}
        assert copy == {
            f"models/save/{name}": data for name, data in local_files(run.save, step).items()
        }
        assert f"{prefix}manifest.json" in copy


def test_a_copy_brought_back_is_resumed_from(tmp_path, bucket):
    run = run_in(tmp_path / "a")
    undisturbed = run.launch().losses
    back = run_in(tmp_path / "b", s3_path=None)
    for one in bucket.objects.filter(Prefix="models/save/global_step6/"):
        target = back.save / one.key.removeprefix("models/save/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(one.get()["Body"].read())
    (back.save / "latest").write_text("global_step6")
    (back.save / "run.json").write_text((run.save / "run.json").read_text())
    assert back.launch().losses == undisturbed[6:]


def test_copies_that_cannot_be_made_are_refused_at_the_start_or_are_failed_saves(
    tmp_path, bucket, monkeypatch
):
    run = run_in(tmp_path / "a", on_save_error="stop")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    told = r"s3_path: checkpoints can't be copied to s3://bucket/models/save: .*endpoint"
    with pytest.raises(WorldFailed, match=told):
        run.launch()
    assert list_checkpoints(run.save) == []
    printed = run.launch(on_save_error="continue").printed
    assert list_checkpoints(run.save) == [3, 6, 9, 12]
    assert printed.count("WARNING: s3_path: checkpoints can't be copied to") == 1
    assert printed.count("WARNING: A CHECKPOINT FAILED.") == 4
    assert "global_step3 is saved, but its copy s3://bucket/models/save/global_step3" in printed
    assert list(bucket.objects.all()) == []
