"""Lines pass whole; the end of stderr is kept from the last traceback on."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.engine.launch.output import OutputPipe, StderrTail


def tail_of(*lines: str) -> StderrTail:
    tail = StderrTail()
    for second, line in enumerate(lines):
        tail.add(line.encode() + b"\n", float(second))
    return tail


TRACE = "Traceback (most recent call last):"


def test_the_excerpt_begins_with_the_last_traceback():
    tail = tail_of("noise", TRACE, "  handled", TRACE, "  File", "ValueError: boom", "at exit")
    assert tail.excerpt() == f"{TRACE}\n  File\nValueError: boom\nat exit\n"
    assert tail.trace_began_at == 3.0


@pytest.mark.parametrize(
    "link",
    [
        "During handling of the above exception, another exception occurred:",
        "The above exception was the direct cause of the following exception:",
    ],
)
def test_a_chain_of_tracebacks_is_one(link):
    tail = tail_of("noise", TRACE, "KeyError: 'a'", "", link, "", TRACE, "ValueError: boom")
    assert tail.excerpt().startswith(f"{TRACE}\nKeyError")
    assert tail.trace_began_at == 1.0


@pytest.mark.parametrize(
    "start",
    [
        "  + Exception Group Traceback (most recent call last):",
        "Fatal Python error: Segmentation fault",
        "terminate called after throwing an instance of 'std::runtime_error'",
    ],
)
def test_other_ways_to_die_count_as_tracebacks(start):
    assert tail_of("noise", start, "more").excerpt() == f"{start}\nmore\n"


def test_without_a_traceback_the_last_lines_are_shown():
    tail = tail_of(*map(str, range(100)))
    assert tail.excerpt() == "".join(f"{number}\n" for number in range(80, 100))
    assert tail.trace_began_at is None


def test_a_traceback_too_long_to_keep_says_how_much_is_missing():
    tail = tail_of(TRACE, *map(str, range(999)))
    assert tail.excerpt().startswith("... 600 lines left out, see above ...\n599\n")


@given(
    st.lists(st.text("ab\r\n", max_size=5), max_size=12).map("".join),
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.integers(0, 1),
)
def test_any_division_into_writes_gives_the_same_lines(text, sizes, rank):
    ours, target = os.pipe()
    theirs, source = os.pipe()
    with os.fdopen(theirs, "rb", buffering=0) as reader:
        pipe = OutputPipe(reader, target, rank)
        data = text.encode()
        while data:
            size, sizes = sizes[0], [*sizes[1:], sizes[0]]
            os.write(source, data[:size])
            data = data[size:]
            assert pipe.pass_on(0.0)
            if pipe.prompt_at is not None:
                pipe.show_prompt()
        os.close(source)
        assert not pipe.pass_on(0.0)
        pipe.close(0.0)
    os.close(target)
    passed = b""
    while chunk := os.read(ours, 4096):
        passed += chunk
    os.close(ours)
    prefix = "[rank1]: " if rank else ""
    expected = "".join(prefix + line for line in text.splitlines(keepends=True))
    if text and not text.endswith("\n"):
        expected += "\n"
    assert passed.decode() == expected


def test_a_mark_that_torch_has_set_is_not_set_twice_nor_kept_in_the_excerpt():
    ours, target = os.pipe()
    theirs, source = os.pipe()
    tail = StderrTail()
    with os.fdopen(theirs, "rb", buffering=0) as reader:
        os.write(source, f"[rank3]: {TRACE}\nplain\n".encode())
        OutputPipe(reader, target, 3, tail).pass_on(0.0)
    assert os.read(ours, 100).decode() == f"[rank3]: {TRACE}\n[rank3]: plain\n"
    assert tail.excerpt() == f"{TRACE}\nplain\n"
    for descriptor in (ours, target, source):
        os.close(descriptor)
