"""Training on a corpus in shards is training on its one file; only shards that are read count."""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron.cli.ledger.main import main
from megatron.data.shard_files import cut_dataset
from megatron.stream.shard_layout import find_shards
from tests.engine.training_runs import neox_config, run_training
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

STEPS = 3
KEYS = {"train_iters": STEPS, "checkpoint_factor": 100, "eval_interval": 100}


def write_config(folder, **changes):
    folder.mkdir(exist_ok=True)
    places = {"save": str(folder / "save"), "load": str(folder / "save")}
    return neox_config(folder, **{**KEYS, **places, **changes})


def in_shards(folder, num_shards, **changes):
    """Return a configuration whose corpus lies in so many files."""
    config = write_config(folder, **changes)
    prefix = Path(config["data_path"])
    whole = folder / "whole"
    for suffix in ("bin", "idx"):
        prefix.with_suffix(f".{suffix}").rename(whole.with_suffix(f".{suffix}"))
    size = whole.with_suffix(".bin").stat().st_size
    shard_bytes = -(-size // num_shards) | 1  # odd: cuts inside a token
    cut_dataset(whole, prefix, shard_bytes)
    assert len(find_shards(str(prefix))) == num_shards
    return config


def tools_say(folder, capsys):
    """Return all that neox-ledger tells of the run, without where its bytes lie."""
    capsys.readouterr()
    answers = []
    for step in range(1, STEPS + 1):
        assert main(["step", str(step), "--run", str(folder / "save"), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        del answer["run"]
        for sample in answer["samples"]:
            sample["dataset"] = Path(sample["dataset"]).name
            for document in sample["documents"]:
                sizes = (stop - start for start, stop in (b["bytes"] for b in document["bytes"]))
                document["bytes"] = sum(sizes)
        answers.append(answer)
    assert main(["verify", "--run", str(folder / "save"), "--all"]) == 0
    answers.append(capsys.readouterr().out)
    assert main(["document", "7", "--run", str(folder / "save"), "--json"]) == 0
    answers.append(re.sub(r'"dataset": "[^"]*"', "", capsys.readouterr().out))
    return answers


def maps_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_idx.npy"))}


def facts(run):
    return [(one.step, one.position, one.digest, one.loss) for one in run.records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_training(write_config(folder), folder / "launch")


@pytest.mark.parametrize("num_shards", [133, 83, 21])
def test_shards_train_as_the_one_file_does(whole, tmp_path, capsys, num_shards):
    folder, expected = whole
    config = in_shards(tmp_path / "run", num_shards)
    found = run_training(config, tmp_path / "launch")
    assert found.losses == expected.losses
    assert facts(found) == facts(expected)
    assert found.records[0].digest == "405cec4e22477671"  # the oracle's run a, step 1
    assert maps_of(tmp_path / "run") == maps_of(folder)
    assert tools_say(tmp_path / "run", capsys) == tools_say(folder, capsys)


def required(folder, capsys, steps=f"1..{STEPS}"):
    """Return the files of training steps with the first step that needs each."""
    capsys.readouterr()
    config = str(folder / "my.yml")
    assert main(["shards", "required-for", steps, config, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    return {Path(one["file"]): one["first_step"] for one in files}


def test_shards_that_no_step_reads_may_be_missing_and_one_that_is_read_is_named(
    whole, tmp_path, capsys
):
    _, expected = whole
    folder = tmp_path / "run"
    config = in_shards(folder, 133, eval_iters=0)
    (folder / "my.yml").write_text(json.dumps(config))  # JSON is YAML
    needed = required(folder, capsys)
    for path in set(find_shards(config["data_path"])) - set(needed):
        path.unlink()
    found = run_training(config, tmp_path / "launch")
    assert found.losses == expected.losses
    assert [one[:3] for one in facts(found)] == [one[:3] for one in facts(expected)]
    assert (
        f"{133 - len(needed)} of 133 token files are missing, none is read up to" in found.printed
    )

    only_first = next(
        path
        for path in required(folder, capsys, "1..1")
        if path not in required(folder, capsys, f"2..{STEPS}")
    )
    only_first.rename(tmp_path / "away")
    assert main(["verify", "--run", str(folder / "save"), "--all"]) == 2
    said = capsys.readouterr().out
    assert f"digests    {STEPS - 1} steps" in said
    assert str(only_first) in said
    (tmp_path / "away").rename(only_first)

    shutil.rmtree(folder / "save")
    late = next(path for path, step in needed.items() if step == STEPS)
    late.unlink()
    with pytest.raises(WorldFailed, match=rf"step {STEPS}, .*{late.name} does not exist"):
        run_training(config, tmp_path / "again")
    printed = (tmp_path / "again/stdout.txt").read_text()
    assert f"missing: step {STEPS} needs {late}" in printed

    early = next(path for path, step in needed.items() if step == 1)
    early.unlink()
    shutil.rmtree(folder / "save")
    with pytest.raises(WorldFailed, match=f"ConfigError: step 1 needs {early}, which does not"):
        run_training(config, tmp_path / "refused")


def test_a_run_goes_on_while_shards_come_and_go(tmp_path, capsys):
    folder = tmp_path / "run"
    config = in_shards(folder, 133, eval_iters=0, train_iters=6, checkpoint_factor=STEPS)
    (folder / "my.yml").write_text(json.dumps(config))
    needed = required(folder, capsys)
    away = tmp_path / "away"
    away.mkdir()
    spare = set(find_shards(config["data_path"])) - set(needed)
    for path in spare:
        path.rename(away / path.name)
    first = run_training(config | {"exit_interval": STEPS}, tmp_path / "first")
    assert "known by the index and the token files there" in first.printed
    for path in spare:
        (away / path.name).rename(path)
    second = run_training(config, tmp_path / "second")
    assert "changed    nothing" in second.printed
    assert "missing" not in second.printed
    assert [one.step for one in second.records] == [4, 5, 6]
    whole = write_config(tmp_path / "whole", eval_iters=0, train_iters=6)
    expected = run_training(whole, tmp_path / "third")
    assert [one[:3] for one in facts(expected)] == [
        one[:3] for one in [*facts(first), *facts(second)]
    ]
    assert main(["verify", "--run", str(folder / "save"), "--all"]) == 0
