"""Copies in object storage, over real HTTP to moto's server on this machine."""

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec.asyn
import pytest
import requests
import s3fs
from moto.server import ThreadedMotoServer

from megatron.base.errors import CheckpointError
from megatron.base.exit_codes import FAILED
from megatron.base.file_digests import digest_file
from megatron.base.write_points import install
from megatron.checkpoint.remote_copy import copy_checkpoint, require_writable
from megatron.ledger.manifest import Manifest, StoredFile, read_manifest, write_manifest

PART = 5 << 20  # the least S3 takes
ROOT = "s3://bucket/models"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    _end_threads_of_fsspec()


def _end_threads_of_fsspec() -> None:
    """Later tests fork worlds of ranks from this process: it must not keep threads."""
    loop, thread = fsspec.asyn.loop[0], fsspec.asyn.iothread[0]

    async def end_tasks() -> None:  # parts of a copy that was given up
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.shutdown_default_executor()

    asyncio.run_coroutine_threadsafe(end_tasks(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    fsspec.asyn.loop[0] = fsspec.asyn.iothread[0] = None


@pytest.fixture
def bucket(server, monkeypatch) -> Iterator[s3fs.S3FileSystem]:
    """An empty bucket, and the environment that a user would set."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    remote = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    remote.mkdir("bucket")
    yield remote
    remote.rm("bucket", recursive=True)
    remote.close_session(remote.loop, remote.s3)


class Relay(ThreadingHTTPServer):
    """Passes requests on to a server until it is cut; the first so many PUTs it refuses itself."""

    def __init__(self, server: str, *, refusals: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _RelayHandler)
        self.server = server
        self.refusals = refusals
        self.refused = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def cut(self) -> None:
        """Be gone: connections are refused from now on."""
        self.shutdown()
        self.server_close()
        self._thread.join()


class _RelayHandler(BaseHTTPRequestHandler):
    server: Relay
    protocol_version = "HTTP/1.1"  # S3's clients wait for "100 Continue" before they send a body

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT" and self.server.refused < self.server.refusals:
            self.server.refused += 1
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        answer = requests.request(
            self.command, self.server.server + self.path, headers=headers, data=body, timeout=10
        )
        self._answer(answer.status_code, answer.headers, answer.content)

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name not in ("Connection", "Content-Length", "Transfer-Encoding"):
                self.send_header(name, value)
        # A HEAD is answered with the length of what a GET would give.
        length = headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 - http.server's names

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def checkpoint_of(save: Path, step: int, **files: bytes) -> tuple[Path, Manifest]:
    checkpoint = save / f"global_step{step}"
    (checkpoint / "configs").mkdir(parents=True)
    names = {name.replace("__", "/").replace("_yml", ".yml"): data for name, data in files.items()}
    for name, data in names.items():
        (checkpoint / name).write_bytes(data)
    stored = {
        name: StoredFile(len(data), digest_file(checkpoint / name)) for name, data in names.items()
    }
    manifest = Manifest(sequence=1, step=step, run_id="r", attempt=1, parent=None, files=stored)
    write_manifest(checkpoint, manifest)
    return checkpoint, manifest


def files_of(remote: s3fs.S3FileSystem, prefix: str) -> dict[str, bytes]:
    names = remote.find(prefix)
    return {name.removeprefix(prefix + "/"): remote.cat_file(name) for name in names}


def local_files(checkpoint: Path) -> dict[str, bytes]:
    return {
        path.relative_to(checkpoint).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("root", [ROOT, ROOT + "/"])
def test_a_copy_lies_where_neox_puts_it_and_equals_the_checkpoint(tmp_path, bucket, root):
    large = os.urandom(2 * PART + 12345)
    checkpoint, manifest = checkpoint_of(
        tmp_path / "run", 10, layer=large, ledger=b"{}", configs__a_yml=b"a: 1", empty=b""
    )
    copy_checkpoint(checkpoint, manifest, root, "run", PART)
    copied = files_of(bucket, "bucket/models/run/global_step10")
    assert copied == local_files(checkpoint)
    assert set(copied) == {"layer", "ledger", "configs/a.yml", "empty", "manifest.json"}
    assert bucket.info("bucket/models/run/global_step10/layer")["ETag"].endswith('-3"')  # parts
    assert "-" not in bucket.info("bucket/models/run/global_step10/ledger")["ETag"]


def test_a_copy_brought_back_is_a_checkpoint(tmp_path, bucket):
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, layer=b"weights", configs__a_yml=b"")
    copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    back = tmp_path / "back" / "global_step10"
    bucket.get("bucket/models/run/global_step10", str(back), recursive=True)
    assert read_manifest(back) == manifest
    assert local_files(back) == local_files(checkpoint)


def test_another_step_of_that_name_is_replaced_with_all_its_files(tmp_path, bucket):
    for name, files in (("old", {"rank_0": b"a", "rank_1": b"b"}), ("new", {"rank_0": b"c"})):
        checkpoint, manifest = checkpoint_of(tmp_path / name, 10, **files)
        copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    assert files_of(bucket, "bucket/models/run/global_step10") == local_files(checkpoint)
    checkpoint_100, manifest = checkpoint_of(tmp_path / "run", 100, rank_0=b"d")
    copy_checkpoint(checkpoint_100, manifest, ROOT, "run", PART)
    assert files_of(bucket, "bucket/models/run/global_step10") == local_files(checkpoint)


@pytest.mark.parametrize("stops_after", range(3))
def test_a_killed_copy_has_no_manifest_even_where_an_older_one_was(tmp_path, bucket, stops_after):
    files = {"layer": b"new", "ledger": b"{}", "optimizer": os.urandom(2 * PART)}
    checkpoint, manifest = checkpoint_of(tmp_path / "old", 10, layer=b"old", ledger=b"[]")
    copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, **files)

    def run() -> None:
        reached = []

        def die(point: str) -> None:
            reached.append(point)
            if len(reached) > stops_after:
                os.kill(os.getpid(), signal.SIGKILL)

        install(die)
        copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    there = files_of(bucket, "bucket/models/run/global_step10")
    assert "manifest.json" not in there
    assert there["layer"] == b"new"
    copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    assert files_of(bucket, "bucket/models/run/global_step10") == local_files(checkpoint)


def test_a_server_that_goes_away_leaves_the_checkpoint_and_no_remote_manifest(
    tmp_path, bucket, server, monkeypatch
):
    files = {"layer": b"weights", "ledger": b"{}", "optimizer": b"moments"}
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, **files)
    before = local_files(checkpoint)
    relay = Relay(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.address)
    install(lambda point: relay.cut())  # after the first file
    try:
        with pytest.raises(
            CheckpointError,
            match=r"global_step10 is saved, but its copy s3://bucket/models/run/global_step10 "
            r"is not complete: .*has no manifest\.json",
        ):
            copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    finally:
        install(None)
    assert local_files(checkpoint) == before
    assert set(files_of(bucket, "bucket/models/run/global_step10")) == {"layer"}


def test_an_answer_that_says_slow_down_is_asked_again(tmp_path, bucket, server, monkeypatch):
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, layer=b"weights")
    relay = Relay(server, refusals=1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.address)
    copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    relay.cut()
    assert relay.refused == 1
    assert files_of(bucket, "bucket/models/run/global_step10") == local_files(checkpoint)


def test_a_server_that_never_answers_ends_the_copy_too(tmp_path, bucket, monkeypatch):
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, layer=b"weights")
    monkeypatch.setattr("megatron.checkpoint.remote_copy._PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(CheckpointError, match="is not complete: FSTimeoutError"):
            copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)


def test_a_copy_that_is_given_up_ends_within_a_part(tmp_path, bucket):
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, layer=bytes(4 * PART))
    with pytest.raises(CheckpointError, match="is not complete: InterruptedError: it was given up"):
        copy_checkpoint(checkpoint, manifest, ROOT, "run", PART, is_cancelled=lambda: True)
    assert files_of(bucket, "bucket/models/run/global_step10") == {}


def test_what_a_copy_needs_is_tried_at_the_start_and_leaves_nothing(bucket):
    require_writable(ROOT, "run")
    require_writable(ROOT, "run")
    assert files_of(bucket, "bucket") == {}


def test_a_wrong_bucket_is_for_the_user_to_change_and_a_silent_server_may_come_back(
    bucket, monkeypatch
):
    with pytest.raises(
        CheckpointError, match=r"can't be copied to s3://nowhere/run: .*bucket"
    ) as no:
        require_writable("s3://nowhere", "run")
    assert no.value.exit_code is None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(CheckpointError, match="can't be copied to") as refused:
        require_writable(ROOT, "run")
    assert refused.value.exit_code == FAILED


def test_a_bucket_that_is_not_there_is_said(tmp_path, bucket):
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, layer=b"weights")
    with pytest.raises(CheckpointError, match=r"copy s3://nowhere/run/global_step10 .*bucket"):
        copy_checkpoint(checkpoint, manifest, "s3://nowhere", "run", PART)


def test_a_file_that_changed_since_the_commit_is_never_given_a_manifest(tmp_path, bucket):
    checkpoint, manifest = checkpoint_of(tmp_path / "run", 10, layer=b"weights", ledger=b"{}")
    (checkpoint / "layer").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="other files arrived than were sent: layer"):
        copy_checkpoint(checkpoint, manifest, ROOT, "run", PART)
    assert not bucket.exists("bucket/models/run/global_step10/manifest.json")
