"""A save directory that isn't one for all nodes is found out before anything is trained."""

import contextlib
import os
import tempfile
import threading
from pathlib import Path

from megatron.ledger.shared_directory import answer_mark, leave_mark, remove_marks

TOKEN = "0123456789abcdef"


def test_nodes_that_share_the_directory_see_the_mark_and_nothing_is_left(tmp_path):
    leave_mark(tmp_path, TOKEN)
    assert [answer_mark(tmp_path, TOKEN, f"node-{n}") for n in range(3)] == [None] * 3
    remove_marks(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_the_same_name_on_another_disk_is_a_problem(tmp_path):
    for node in ("node-0", "node-1"):
        (tmp_path / node / "save").mkdir(parents=True)
    leave_mark(tmp_path / "node-0" / "save", TOKEN)
    problem = answer_mark(tmp_path / "node-1" / "save", TOKEN, "node-1", timeout_s=0.05)
    assert "does not see what rank 0 wrote there" in problem


def test_a_directory_that_is_missing_on_a_node_is_a_problem(tmp_path):
    leave_mark(tmp_path, TOKEN)
    problem = answer_mark(tmp_path / "missing", TOKEN, "node-1", timeout_s=0.05)
    assert "does not see" in problem


def test_the_mark_of_an_earlier_launch_doesnt_count(tmp_path):
    leave_mark(tmp_path, TOKEN)
    assert answer_mark(tmp_path, "f" * 16, "node-0", timeout_s=0.05) is not None


def test_a_mark_that_shows_up_late_is_waited_for(tmp_path):
    leave_mark(tmp_path, TOKEN)
    (mark,) = tmp_path.iterdir()
    mark.rename(tmp_path / "not yet")
    timer = threading.Timer(0.2, lambda: (tmp_path / "not yet").rename(mark))
    timer.start()
    assert answer_mark(tmp_path, TOKEN, "node-0", timeout_s=20) is None
    timer.join()


def test_a_node_that_may_not_write_is_a_problem():
    with tempfile.TemporaryDirectory() as name:
        save = Path(name)
        leave_mark(save, TOKEN)
        save.chmod(0o555)
        with unprivileged():
            problem = answer_mark(save, TOKEN, "node-1")
        save.chmod(0o755)
    assert problem == "may not write there: Permission denied"


@contextlib.contextmanager
def unprivileged():
    """Root may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
