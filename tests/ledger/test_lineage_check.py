"""Edited, dropped and moved lines are named, wherever it happens."""

import functools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.ledger.attempts import decode_line, encode_record
from megatron.ledger.chain import chained_line
from megatron.ledger.ledger_file import read_ledger, write_ledger
from megatron.ledger.lineage import lineage_of_checkpoint, lineage_of_run
from megatron.ledger.lineage_check import check_abandoned, check_lineage
from tests.ledger.example_ledgers import small_ledger
from tests.ledger.recorded_runs import TestRun, memory_directory


def write_run(save):
    """Write two attempts: one killed at step 7 after a save at 4, one that went on and finished."""
    first = TestRun.start(save)
    first.steps(1, 2)
    first.evaluate(2)
    first.steps(3, 4)
    first.save_checkpoint(evaluation_due=True)
    first.evaluate(4)
    first.steps(5, 7)
    second = TestRun.start(save, read_ledger(save / "global_step4"))
    second.evaluate(4)
    second.steps(5, 8)
    second.save_checkpoint()
    second.evaluate(8)
    second.recorder.close("finished")
    return second


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def lines_of(run, attempt):
    path = run.save / "attempts" / f"{attempt:04d}.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


def findings(save):
    lineage = lineage_of_checkpoint(save / "global_step8")
    return [*check_lineage(lineage).findings, *check_abandoned(save, lineage)]


def only_finding(run):
    [finding] = findings(run.save)
    return str(finding)


def test_untouched_lines_are_fine(run):
    assert findings(run.save) == []


@pytest.mark.parametrize(("attempt", "index", "name"), [(1, 1, "covered"), (2, 5, "afterwards")])
def test_an_edited_line_is_named(run, attempt, index, name):
    path, lines = lines_of(run, attempt)
    lines[index] = lines[index].replace(b'"loss": ', b'"loss": 1')
    path.write_bytes(b"".join(lines))
    assert only_finding(run) == (
        f"{path}:{index + 1}: it doesn't continue from the line before: it was changed, or a line "
        "before it is missing"
    )


@pytest.mark.parametrize(("attempt", "steps"), [(1, "1..4"), (2, "5..8")])
def test_a_missing_file_is_named_with_what_it_held(run, attempt, steps):
    path, _ = lines_of(run, attempt)
    path.unlink()
    assert only_finding(run) == f"{path}: the file is missing; it held steps {steps} of the lineage"


def test_a_missing_file_off_the_lineage_is_named(run):
    lineage = lineage_of_checkpoint(run.save / "global_step4")
    path, _ = lines_of(run, 2)
    path.unlink()
    [finding] = check_abandoned(run.save, lineage)
    assert str(finding) == f"{path}: the file is missing; it held steps 5..8"


def test_lines_without_the_facts_of_their_attempt_are_named(run):
    path, _ = lines_of(run, 2)
    path.with_suffix(".json").unlink()
    assert only_finding(run) == (
        f"{path.with_suffix('.json')}: the file is missing: what the lines of steps 5..8 beside it "
        "went on from isn't known"
    )


def test_a_missing_run_file_is_named_and_the_lines_are_found_all_the_same(run):
    (run.save / "run.json").unlink()
    lineage = lineage_of_run(run.save)
    assert check_lineage(lineage).num_steps == 8
    [finding] = check_abandoned(run.save, lineage)
    assert str(finding).startswith(f"{run.save / 'run.json'}: the file is missing; the attempts ")


def test_a_checkpoint_without_any_attempts_beside_it_is_no_problem(run):
    for path in (run.save / "attempts").iterdir():
        path.unlink()
    assert findings(run.save) == []


def test_dropped_lines_are_named(run):
    path, lines = lines_of(run, 2)
    path.write_bytes(b"".join([*lines[:2], *lines[4:]]))
    assert only_finding(run) == f"{path}:3: the lines of steps 6..7 are missing before it"


def test_a_dropped_evaluation_is_named(run):
    path, lines = lines_of(run, 1)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert f"{path}:3: it doesn't continue from the line before" in only_finding(run)


def test_reordered_lines_are_named(run):
    path, lines = lines_of(run, 2)
    lines[2], lines[3] = lines[3], lines[2]
    path.write_bytes(b"".join(lines))
    assert only_finding(run) == (
        f"{path}:3: the line of step 7 stands where step 6 is expected: it was moved or changed"
    )


def test_a_moved_evaluation_is_named(run):
    path, lines = lines_of(run, 1)
    lines[1], lines[2] = lines[2], lines[1]
    path.write_bytes(b"".join(lines))
    assert f"{path}:2: an evaluation's line stands where step 2 is expected" in only_finding(run)


def test_lines_cut_off_before_a_checkpoint_are_named(run):
    path, lines = lines_of(run, 2)
    path.write_bytes(b"".join(lines[:3]))
    [finding] = findings(run.save)
    assert str(finding) == f"{path}: the lines of steps 7..8 are missing: the end was cut off"
    assert finding.step == 7


def test_lines_cut_off_after_the_last_checkpoint_of_a_stopped_attempt_are_named(run):
    path, lines = lines_of(run, 2)
    path.write_bytes(b"".join(lines[:-1]))
    assert "the attempt stopped after step 8 with chain" in only_finding(run)
    assert "which none of its 5 lines has: the end was cut off" in only_finding(run)


def rewrite(lines, index, change, previous):
    """Change a record and give it and all later lines new chains."""
    records = [decode_line(line.rstrip(b"\n")).record for line in lines]
    records[index] = replace(records[index], **change)
    out = []
    for record in records:
        line, previous = chained_line(previous, encode_record(record))
        out.append(line + b"\n")
    return out


def test_lines_written_anew_with_new_chains_do_not_fit_the_checkpoint(run):
    path, lines = lines_of(run, 2)
    start = read_ledger(run.save / "global_step4").chain
    path.write_bytes(b"".join(rewrite(lines, 2, {"digest": "0" * 16}, start)))
    assert "that the checkpoint notes for step 8: lines were written anew" in str(
        findings(run.save)[0]
    )


def test_an_edited_sum_of_digests_is_named(run):
    checkpoint = run.save / "global_step8"
    ledger = read_ledger(checkpoint)
    spans = (ledger.spans[0], replace(ledger.spans[1], digest_sum="0" * 16))
    write_ledger(checkpoint, replace(ledger, spans=spans))
    assert "sum up to" in only_finding(run)


def test_an_attempt_that_says_it_went_on_from_a_line_nobody_wrote_is_named(run):
    path = run.save / "attempts" / "0002.json"
    facts = json.loads(path.read_text())
    facts["begin"]["spans"][0]["chain"] = "0" * 16
    path.write_text(json.dumps(facts))
    assert "went on from chain 0000000000000000 at step 4, which no line of this run has" in str(
        findings(run.save)[0]
    )


def test_damaged_facts_are_named(run):
    (run.save / "attempts" / "0001.json").write_text("{")
    assert "0001.json does not describe an attempt" in "\n".join(map(str, findings(run.save)))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, {"position": 5}, "consumed positions 5..9, its segment says 4..8: samples were repeat"),
        (1, {"samples": 3}, "consumed positions 4..7, its segment says 4..8: samples were repeate"),
        (4, {"position": 0}, "the valid evaluation after step 4 read from position 0, the one "),
        (2, {"position": 4}, "the valid evaluation after step 2 read from position 4, the one "),
    ],
)
def test_lines_that_tell_of_repeats_or_skips_are_named(tmp_path, index, change, message):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 2)
    run.evaluate(2)
    run.steps(3, 3)
    run.evaluate(4)
    path, lines = lines_of(run, 1)
    path.write_bytes(b"".join(rewrite(lines, index, change, small_ledger().run_id)))
    findings = check_lineage(lineage_of_run(run.save)).findings
    assert message in str(findings[0])
    assert findings[0].line == index + 1


def test_evaluations_are_followed_again_after_a_gap(tmp_path):
    """The middle attempt's lines are lost: what came after them is still checked."""
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 2)
    for step in (2, 4):
        run.evaluate(step)
        run.save_checkpoint()
        run = TestRun.start(run.save, read_ledger(run.save / f"global_step{step}"))
        run.steps(step + 1, step + 2)
    run.save_checkpoint()
    (run.save / "attempts" / "0002.jsonl").unlink()
    check = check_lineage(lineage_of_checkpoint(run.save / "global_step6"))
    [finding] = check.findings
    assert (finding.step, finding.path.name) == (3, "0002.jsonl")
    assert finding.text == "the file is missing; it held steps 3..4 of the lineage"
    assert check.num_steps == 4


@functools.cache
def untouched():
    """Return the files of a run by name."""
    with memory_directory() as save:
        write_run(save)
        return {
            path.relative_to(save): path.read_bytes()
            for path in sorted(save.rglob("*"))
            if path.is_file()
        }


def edited_bytes(draw, data):
    """Return the data with one byte changed, removed or added, and the line it stood in."""
    offset = draw(st.integers(min_value=0, max_value=len(data) - 1))
    byte = draw(st.integers(min_value=0, max_value=255).filter(lambda one: one != data[offset]))
    kind = draw(st.sampled_from(["change", "remove", "add"]))
    line = data[:offset].count(b"\n") + 1
    before, after = data[:offset], data[offset + 1 :]
    added = bytes([byte])
    if kind == "change":
        return before + added + after, line
    if kind == "remove":
        return before + after, line
    return before + added + data[offset:], line


def edited_lines(draw, data):
    """Return the data with lines dropped, swapped or doubled, and the first that is wrong."""
    lines = data.splitlines(keepends=True)
    index = draw(st.integers(min_value=0, max_value=len(lines) - 1))
    other = draw(st.integers(min_value=0, max_value=len(lines) - 1))
    kind = draw(st.sampled_from(["drop", "swap", "double"]))
    if kind == "drop":
        return b"".join(lines[:index] + lines[index + 1 :]), index + 1
    if kind == "double" or index == other:
        return b"".join([*lines[: index + 1], *lines[index:]]), index + 2
    lines[index], lines[other] = lines[other], lines[index]
    return b"".join(lines), min(index, other) + 1


@given(st.data())
def test_random_edits_are_named(data):
    attempt = data.draw(st.sampled_from([1, 2]))
    edit = data.draw(st.sampled_from([edited_bytes, edited_lines]))
    files = dict(untouched())
    [name] = [name for name in files if name.name == f"{attempt:04d}.jsonl"]
    original = files[name]
    files[name], line = edit(data.draw, original)
    with memory_directory() as save:
        for path, content in files.items():
            (save / path).parent.mkdir(exist_ok=True, parents=True)
            (save / path).write_bytes(content)
        found = [one for one in findings(save) if one.path == save / name]
    if files[name] + b"\n" == original:
        return  # every line is still whole
    num_lines = original.count(b"\n")
    lost_its_end = not files[name].endswith(b"\n") or files[name].count(b"\n") < line
    if attempt == 1 and line == num_lines and lost_its_end:
        return  # what a kill leaves behind: a torn last line, or one line less
    assert found, "the edit was not seen"
    is_cut = line >= num_lines and lost_its_end
    assert found[0].line == (None if is_cut else line)
