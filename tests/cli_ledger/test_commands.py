"""The commands as users type them: tables, JSON, exit status."""

import json
import shutil

import pytest

from megatron.cli.ledger.main import COMMANDS, main
from tests.ledger.queries.histories import blended_run, eventful_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eventful")
    eventful_run(folder)
    return folder


@pytest.fixture
def ask(folder, capsys):
    """Run a command on the eventful run; return exit status, stdout and stderr."""

    def ask(*arguments, run=folder / "save"):
        status = main([*map(str, arguments), "--run", str(run)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return ask


@pytest.fixture
def ask_json(ask):
    """Run a command with ``--json``; return what it printed, parsed."""

    def ask_json(*arguments, **options):
        status, out, _ = ask(*arguments, "--json", **options)
        answer = json.loads(out)
        assert answer.pop("format") == 1
        return status, answer

    return ask_json


def rows_of(out, heading):
    """Return the cells of a printed table's lines below its heading."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [heading])
    return [line.split() for line in lines[start + 1 :]]


def test_step_prints_every_sample_with_its_documents(ask, ask_json):
    status, out, _ = ask("step", 3)
    assert status == 0
    assert out.startswith("step 3: positions 16 to 23 of the train stream, order ")
    assert "recorded, attempt 1\n" in out
    assert f"loss {1 / 3:.6f}" in out
    table = rows_of(out, "position")
    samples = [cells for cells in table if len(cells) == 10]
    assert [cells[0] for cells in samples] == [str(p) for p in range(16, 24)]
    assert {cells[4] for cells in samples} == {"corpus"}
    assert {cells[8] for cells in samples} == {"corpus.bin"}

    status, answer = ask_json("step", 3)
    assert (status, answer["positions"], answer["attempt"]) == (0, [16, 24], 1)
    assert sum(len(sample["documents"]) for sample in answer["samples"]) == len(table)
    first = answer["samples"][0]
    assert set(first) == {
        *("position", "component", "component_position", "dataset", "data_parallel_rank"),
        *("micro_step", "row", "block", "epochs", "sample", "padding", "documents"),
    }
    for document in first["documents"]:
        tokens = document["tokens"][1] - document["tokens"][0]
        assert sum(b - a for a, b in (one["bytes"] for one in document["bytes"])) == 2 * tokens


def test_step_shows_one_ranks_part(ask_json):
    _, answer = ask_json("step", 3, "--rank", 1, "--micro-step", 0)
    assert [sample["position"] for sample in answer["samples"]] == [18, 19]


def test_step_without_its_data_tells_what_needs_none(folder, ask, ask_json, tmp_path):
    eventful_run(tmp_path)
    for suffix in ("bin", "idx"):
        (tmp_path / f"corpus.{suffix}").unlink()
    status, out, err = ask("step", 3, run=tmp_path / "save")
    assert status == 0
    assert len(rows_of(out, "position")) == 8
    assert "documents and bytes are not known: dataset" in err
    _, answer = ask_json("step", 3, run=tmp_path / "save")
    assert "is not there" in answer["data_missing"]
    assert "documents" not in answer["samples"][0]
    _, moved = ask_json("step", 3, "--data", folder / "corpus", run=tmp_path / "save")
    assert moved["data_missing"] is None
    assert "documents" in moved["samples"][0]


def test_a_copied_checkpoint_is_enough(folder, ask, tmp_path):
    checkpoint = tmp_path / "global_step24"
    shutil.copytree(folder / "save/global_step24", checkpoint)
    status, out, _ = ask("step", 20, run=checkpoint)
    assert status == 0
    assert "done before the checkpoint; the line that recorded it is not here, attempt 4" in out
    assert ask("document", 30, run=checkpoint)[0] == 0
    status, out, _ = ask("log", run=checkpoint)
    assert status == 0
    assert "this is a checkpoint alone" in out


def test_document_lists_steps_and_abandoned_ones_when_asked(ask, ask_json):
    status, out, _ = ask("document", 30)
    assert status == 0
    assert "abandoned" not in out
    listed = rows_of(out, "step")
    _, answer = ask_json("document", 30, "--abandoned")
    kept = [row for row in answer["consumed"] if not row["is_abandoned"]]
    assert [str(row["step"]) for row in kept] == [cells[0] for cells in listed]
    assert len(answer["consumed"]) > len(kept)
    assert all(row["epoch"] >= 1 for row in kept)


def test_shard_and_bytes_take_a_file(folder, ask, ask_json):
    status, out, _ = ask("shard", folder / "corpus.bin")
    assert status == 0
    assert out.startswith(f"{folder / 'corpus.bin'}: 24 steps")
    _, answer = ask_json("bytes", f"{folder / 'corpus.bin'}:100-104")
    assert answer["bytes"] == [100, 104]
    assert answer["consumed"]
    status, _, err = ask("bytes", f"{folder / 'corpus.bin'}:100-9999999")
    assert status == 2
    assert "go beyond its end" in err


def test_a_file_is_known_by_its_name_too(folder, ask):
    assert ask("shard", "corpus.bin")[1] == ask("shard", folder / "corpus.bin")[1].replace(
        str(folder / "corpus.bin"), "corpus.bin"
    )


def test_a_rank_that_the_step_had_not_is_said(ask):
    status, out, err = ask("step", 3, "--rank", 7)
    assert status == 0
    assert rows_of(out, "position") == []
    assert "no sample of the step is there; it has data-parallel ranks 0.." in err


def test_steps_that_are_not_done_yet_cannot_be_verified(ask):
    status, out, _ = ask("verify", "--steps", "20..30")
    assert status == 2
    assert "unknown    step 30 isn't done yet: the lineage ends with step 24" in out


def test_verify_says_what_was_looked_at(ask, ask_json, folder, tmp_path):
    status, out, _ = ask("verify")
    assert status == 0
    assert "recorded   24 steps and 6 evaluations, each line continuing the one before" in out
    assert "positions  every one consumed once (no repeat, no skip)" in out
    assert out.endswith("result     everything agrees\n")
    save = tmp_path / "save"
    shutil.copytree(folder / "save", save)
    path = save / "attempts/0001.jsonl"
    path.write_text(
        path.read_text().replace('"step": 4, "position": 24', '"step": 4, "position": 25')
    )
    status, out, _ = ask("verify", run=save)
    assert status == 1
    assert f"PROBLEM    step 4: {path}:4: " in out
    assert "first at step 4" in out
    status, answer = ask_json("verify", run=save)
    assert (status, answer["exit_status"]) == (1, 1)
    assert (answer["first_problem"]["step"], answer["first_problem"]["line"]) == (4, 4)


def test_verify_that_cannot_tell_ends_with_2(folder, ask, tmp_path):
    shutil.copytree(folder / "save/global_step24", tmp_path / "global_step24")
    status, out, _ = ask("verify", run=tmp_path / "global_step24")
    assert status == 2
    assert "unknown    the lines of steps 1..10, 11..15, 16..24 are not here" in out


def test_a_run_that_has_lost_its_attempts_is_told_from_a_checkpoint_alone(folder, ask, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(folder / "save", save)
    shutil.rmtree(save / "attempts")
    for run in (save, save / "global_step24"):
        status, out, _ = ask("verify", run=run)
        assert status == 2
        assert f"are not here: {save}/attempts is gone; put a copy of it back" in out
        assert (
            f"({save}/attempts is gone; this is what the checkpoint tells)"
            in ask("log", run=run)[1]
        )


def test_log_draws_the_attempts(ask, ask_json):
    status, out, _ = ask("log")
    assert status == 0
    drawn = [line for line in out.splitlines() if "attempt " in line]
    assert [line[: line.index("attempt") + 9] for line in drawn] == [
        "* attempt 1",
        "| o attempt 3",
        "* attempt 2",
        "* attempt 4",
    ]
    assert "(16..20 abandoned)" in drawn[2]
    _, answer = ask_json("log")
    assert [one["attempt"] for one in answer["attempts"]] == [1, 2, 4, 3]
    assert answer["streams"]["train"]["next_position"] == 156


def test_export_writes_a_folder_once(ask, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = ask("export", "3..5", "--output", out)
    assert (status, printed) == (0, f"{out}: 24 samples of 3 steps\n")
    status, _, err = ask("export", "3..5", "--output", out)
    assert status == 2
    assert "exists; name another output, or remove it" in err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_export_that_fails_leaves_nothing(ask, tmp_path):
    eventful_run(tmp_path / "run")
    (tmp_path / "run/corpus.bin").unlink()
    status, _, err = ask("export", "1", "--output", tmp_path / "out", run=tmp_path / "run/save")
    assert status == 2
    assert "corpus.bin does not exist" in err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_diff_tells_by_its_exit_status(folder, tmp_path, capsys):
    save = folder / "save"
    assert main(["diff", str(save), str(save / "global_step15")]) == 0
    assert "samples   the same in all steps 1..15" in capsys.readouterr().out
    other = blended_run(tmp_path)
    assert main(["diff", str(save), str(other.save)]) == 1
    assert "samples   others from step 1 on: datasets " in capsys.readouterr().out
    assert main(["diff", str(save), str(other.save), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["samples_part_at"] == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"neox-ledger {name} " in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "0"], "'0' is no step; they count from 1"),
        (["export", "5..3", "--output", "x"], "steps count from 1, and ranges ascend"),
        (["bytes", "corpus.bin"], "is not of the form FILE:FIRST-STOP"),
        (["stepp"], "invalid choice: 'stepp'"),
    ],
)
def test_what_cannot_be_understood_is_said(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
