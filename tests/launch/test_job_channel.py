"""What goes over the wire arrives whole, in order; what isn't ours is noticed."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import LaunchError
from megatron.engine.launch import head_link, job_channel
from megatron.engine.launch.head_link import HeadLink, connect_to_head
from megatron.engine.launch.job_channel import Channel

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def pair():
    return tuple(Channel(end) for end in _tcp_pair())


def _tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


def exchange(sender, receiver):
    received = []
    while True:
        sender.flush()
        received += receiver.receive()
        if not sender.has_unsent:
            return received + receiver.receive()


@given(st.lists(st.tuples(st.text(), VALUES), max_size=5))
def test_messages_arrive_whole_and_in_order(messages):
    sender, receiver = pair()
    for kind, value in messages:
        sender.send(kind, value=value)
    received = exchange(sender, receiver)
    assert [(message.kind, message["value"]) for message in received] == messages
    sender.close()
    receiver.close()


def test_a_message_larger_than_the_network_takes_at_once_arrives():
    sender, receiver = pair()
    sender.send("place", arguments=["x" * (8 << 20)])
    assert sender.has_unsent
    (message,) = exchange(sender, receiver)
    assert len(message["arguments"][0]) == 8 << 20


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"no": "kind"}\n'])
def test_who_speaks_another_language_is_given_up(noise):
    stranger, ours = _tcp_pair()
    channel = Channel(ours)
    stranger.sendall(noise)
    assert channel.receive() == []
    assert channel.is_broken


def test_the_end_of_a_connection_is_seen_after_what_was_said_last():
    sender, receiver = pair()
    sender.send("ended")
    sender.close()
    assert [message.kind for message in receiver.receive()] == ["ended"]
    assert receiver.is_broken
    receiver.send("beat")  # to nobody, without an error
    with pytest.raises(LaunchError, match="the 'ended' message has no 'status'"):
        job_channel.Message("ended", {})["status"]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(head_link.time, "monotonic", lambda: now[0])
    return now


def test_a_launcher_that_is_silent_too_long_is_given_up(clock):
    launcher, ours = pair()
    link = HeadLink(ours)
    for _ in range(4):
        clock[0] += 9.0
        link.take()
    assert link.loss == "nothing heard from the launcher for 36 s"
    launcher.send("beat")
    link.take()
    assert link.loss is None


def test_who_was_stopped_itself_does_not_take_the_launcher_for_lost(clock):
    _, ours = pair()
    link = HeadLink(ours)
    clock[0] += 3600.0
    link.take()
    assert link.loss is None


def test_an_agent_says_that_it_lives(clock):
    launcher, ours = pair()
    link = HeadLink(ours)
    link.keep_alive()
    assert launcher.receive() == []
    clock[0] += 5.0
    link.keep_alive()
    assert [message.kind for message in launcher.receive()] == ["beat"]


def test_the_addresses_that_were_tried_are_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LaunchError, match=rf"at port {port} of 127.0.0.1 \(Connection refused\)"):
        connect_to_head(["127.0.0.1"], port, timeout_s=0.0)
