"""The launcher closes the record of ranks that were killed."""

from megatron.ledger.attempt_facts import Stop, read_attempt_facts
from megatron.ledger.dead_attempts import close_dead_attempt
from megatron.ledger.ledger_file import read_ledger
from megatron.ledger.lineage import lineage_of_ledger
from megatron.ledger.lineage_check import check_abandoned
from tests.ledger.recorded_runs import TestRun

OURS = {"launch": "ours"}


def close(run: TestRun, launch: str = "ours", **more):
    return close_dead_attempt(run.save, launch, reason="hung", now=3e9, **more)


def test_a_killed_attempt_stops_after_its_last_line(tmp_path):
    run = TestRun.start(tmp_path / "run", environment=OURS)
    run.steps(1, 4)
    run.evaluate(4)
    checkpoint = run.save_checkpoint()
    with run.lines_path.open("ab") as file:
        file.write(b'{"step": 5, "posi')  # torn by the kill
    assert close(run, done_step=7).number == 1
    stop = read_attempt_facts(run.save, 1).stop
    assert (stop.reason, stop.time, stop.step, stop.done_step) == ("hung", 3e9, 4, 7)
    lineage = lineage_of_ledger(read_ledger(checkpoint), [run.save])
    assert check_abandoned(run.save, lineage) == ()


def test_an_attempt_killed_before_its_first_line_stops_where_it_began(tmp_path):
    run = TestRun.start(tmp_path / "run", environment=OURS)
    facts = close(run)
    assert facts.stop == Stop(reason="hung", time=3e9, step=0, chain=run.begin.chain)


def test_an_attempt_that_has_closed_its_record_itself_keeps_it(tmp_path):
    run = TestRun.start(tmp_path / "run", environment=OURS)
    run.steps(1, 4)
    run.recorder.close("signal SIGTERM")
    assert close(run).stop.reason == "signal SIGTERM"
    assert read_attempt_facts(run.save, 1).stop.reason == "signal SIGTERM"


def test_an_attempt_of_another_launch_is_left_alone(tmp_path):
    for environment in ({"launch": "theirs"}, {"launch": None}, {}):
        run = TestRun.start(tmp_path / "run", environment=environment)
        assert close(run) is None
        assert read_attempt_facts(run.save, run.recorder.number).stop is None


def test_a_launch_that_made_no_attempt_does_not_close_one_before(tmp_path):
    TestRun.start(tmp_path / "run", environment=OURS)
    run = TestRun.start(tmp_path / "run", environment={"launch": "theirs"})
    assert close(run) is None
    assert close_dead_attempt(tmp_path / "nothing", "ours", reason="hung", now=3e9) is None
