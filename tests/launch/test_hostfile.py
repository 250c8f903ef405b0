"""Host files and filters: what is selected, and what a mistake says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.config.hostfile import find_hostfile, parse_hostfile, select_hosts

HOSTS = {"node1": 4, "node2": 2}


def test_hosts_keep_the_order_of_the_file_and_comments_are_left_out(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# rack 7\nnode2 slots=2\n\n  node1   slots=4  # the big one\n")
    assert list(parse_hostfile(file).items()) == [("node2", 2), ("node1", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb\n", "{file}:2: 'b' is not 'host slots=N'"),
        ("a slots=two\n", "{file}:1: 'a slots=two' is not 'host slots=N'"),
        ("a slots=0\n", "{file}:1: 'a slots=0' is not 'host slots=N' with N at least 1"),
        ("a slots=2 max=4\n", "{file}:1: 'a slots=2 max=4' is not"),
        ("a slots=2\n#\na slots=2\n", "{file}:3: host 'a' is already listed in line 1"),
        ("# nothing\n", "{file}: no host is listed"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, text, message):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message.format(file=file))):
        parse_hostfile(file)


def test_all_bad_lines_are_reported_together(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("a\nb slots=1\nc slots=\n")
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(file)
    assert len(caught.value.problems) == 2


def test_a_missing_hostfile_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"hostfile .*nowhere cannot be read: No such file"):
        parse_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, {"node1": [0, 1, 2, 3], "node2": [0, 1]}),
        ({"include": "node2@node1:2,0"}, {"node1": [0, 2], "node2": [0, 1]}),
        ({"include": "node1:0@node1:3"}, {"node1": [0, 3]}),
        ({"exclude": "node1:0,1"}, {"node1": [2, 3], "node2": [0, 1]}),
        ({"exclude": "node2"}, {"node1": [0, 1, 2, 3]}),
        ({"num_nodes": -1, "num_gpus": 2}, {"node1": [0, 1], "node2": [0, 1]}),
        ({"num_nodes": 1}, {"node1": [0, 1, 2, 3]}),
        ({"include": "node2@node1:2", "num_nodes": 1, "num_gpus": 4}, {"node1": [2]}),
    ],
)
def test_filters_then_nodes_then_slots(request_, expected):
    selected = select_hosts(HOSTS, **request_)
    assert selected == expected
    assert list(selected) == list(expected)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"num_gpus": 3},
            "num_gpus=3 asks for more ranks than slots on node2 (2 slots)",
        ),
        (
            {"num_nodes": 3},
            "num_nodes=3, but there are only 2 hosts to use: node1 (4 slots), node2",
        ),
        ({"include": "node3"}, "include 'node3': host 'node3' is not among node1 (4 slots), node2"),
        ({"include": "node2:2"}, "host 'node2' has no slot 2, its 2 slots are 0 to 1"),
        ({"exclude": "node2:x"}, "exclude 'node2:x': 'x' is not a slot number"),
        ({"exclude": "node1@node2"}, "leaves no slot on any of node1"),
        ({"include": "node1", "exclude": "node2"}, "are both set; only one can be"),
    ],
)
def test_asking_for_what_is_not_there_names_host_and_slots(request_, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        select_hosts(HOSTS, **request_)


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.integers(1, 6), min_size=2),
    st.data(),
)
def test_including_and_excluding_the_same_part_divide_the_slots(hosts, data):
    host = data.draw(st.sampled_from(sorted(hosts)))
    slots = data.draw(st.sets(st.integers(0, hosts[host] - 1), min_size=1))
    part = f"{host}:{','.join(map(str, slots))}"
    inside = select_hosts(hosts, include=part)
    outside = select_hosts(hosts, exclude=part)
    assert inside == {host: sorted(slots)}
    together = {name: sorted(inside.get(name, []) + outside.get(name, [])) for name in hosts}
    assert together == select_hosts(hosts)


def test_the_configured_hostfile_wins_over_the_environment_and_may_be_missing(tmp_path):
    configured, exported = tmp_path / "configured", tmp_path / "exported"
    environ = {"DLTS_HOSTFILE": str(exported)}
    exported.write_text("a slots=1\n")
    assert find_hostfile(None, environ) == exported
    assert find_hostfile(str(configured), environ) is None
    configured.write_text("a slots=1\n")
    assert find_hostfile(str(configured), environ) == configured
