"""eval.py: lm-eval on a local task, equal at every topology, with transformers' likelihoods."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import lm_eval  # noqa: F401 - warm before ranks are forked
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from megatron.checkpoint.hugging_face.from_neox import ExportSettings, export_model
from megatron.cli.evaluate import evaluate
from megatron.cli.inference_model import open_model
from megatron.cli.lm_eval_model import NeoXModel
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import build_tokenizer
from megatron.engine.distributed import RankEnvironment, connect
from tests.engine.test_topologies import TOPOLOGIES
from tests.engine.training_runs import DATA, ORACLE, neox_config, world_size
from tests.worlds import RankContext, run_ranks

pytestmark = pytest.mark.distributed

QUESTIONS = [
    {"question": "The quick brown", "choices": [" fox", " dog", " tree"], "answer": 0},
    {"question": "One, two,", "choices": [" three", " blue"], "answer": 0},
    {"question": "In the", "choices": [" beginning", " xyz", " end"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write two tasks over the same three lines and return their files' names."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    written = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        "local_text": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return [str(folder / f"{name}.yaml") for name in written]


def _config(tmp_path: Path, **changes: Any) -> RunConfig:
    config = neox_config(tmp_path, **{"load": str(ORACLE / "ckpt_a")} | changes)
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return load_config([path], {}, local_slots=lambda: world_size(config))


def _in_world(config: RunConfig, tmp_path: Path, work: Any) -> Any:
    """Return what ``work(config, environment)`` gives on rank 0; all ranks must agree."""

    def rank_main(context: RankContext) -> Any:
        environment = RankEnvironment(
            context.rank, context.rank, context.world_size, context.init_method
        )
        os.chdir(tmp_path)
        with open(os.devnull, "w") as file, contextlib.redirect_stdout(file):
            return work(config, environment)

    answers = run_ranks(rank_main, config.topology.world_size, tmp_path, timeout_s=300)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def _results(config: RunConfig, environment: RankEnvironment) -> dict[str, Any]:
    return {task: dict(values) for task, values in evaluate(config, environment).items()}


def test_tasks_have_the_same_results_at_every_topology_and_are_written(
    tasks: list[str], tmp_path: Path
):
    results = {
        name: _in_world(_config(tmp_path, eval_tasks=tasks, **TOPOLOGIES[name]), tmp_path, _results)
        for name in ("sequential", "TP2 x PP2", "DP2")
    }
    assert results["sequential"].keys() == {"local_choice", "local_text"}
    assert results["TP2 x PP2"] == results["sequential"]
    assert results["DP2"] == results["sequential"]
    files = sorted(tmp_path.glob("eval_results_*.json"))
    assert files
    written = json.loads(files[-1].read_text())
    choice = written["results"]["local_choice"]["acc,none"]
    assert choice == results["sequential"]["local_choice"]["acc,none"]
    assert written["checkpoint"].endswith("ckpt_a/global_step10")


def _likelihoods(config: RunConfig, environment: RankEnvironment) -> Any:
    groups = connect(environment, config.topology, backend="gloo")
    model = NeoXModel(open_model(config, groups), groups, seed=1)
    pairs = [(one["question"], choice) for one in QUESTIONS for choice in one["choices"]]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    long_text = "a rolling text. " * 40
    rolled = [Instance("loglikelihood_rolling", {}, (long_text,), 0)]
    return model.loglikelihood(asked, disable_tqdm=True), model.loglikelihood_rolling(rolled)


def test_likelihoods_are_those_of_transformers(tmp_path: Path):
    checkpoint = ORACLE / "ckpt_a" / "global_step10"
    hub = export_model(checkpoint, tmp_path / "hub", ExportSettings(hidden_act="gelu_fast")).path
    theirs = AutoModelForCausalLM.from_pretrained(hub).eval()
    tokenizer = build_tokenizer("HFTokenizer", str(DATA / "tokenizer" / "tok.json"))

    def score(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        with torch.no_grad():
            logits = theirs(torch.tensor([context + continuation])).logits[0, :-1]
        logs = logits[-len(continuation) :].log_softmax(dim=-1)
        chosen = torch.tensor(continuation)
        total = logs.gather(1, chosen[:, None]).sum()
        return float(total), bool((logs.argmax(-1) == chosen).all())

    config = _config(tmp_path, **TOPOLOGIES["TP2"])
    pairs, rolled = _in_world(config, tmp_path, _likelihoods)
    expected = []
    for one in QUESTIONS:
        context = tokenizer.tokenize(one["question"])
        for choice in one["choices"]:
            whole = tokenizer.tokenize(one["question"] + choice)
            expected.append(score(context, whole[len(context) :]))
    assert [likelihood for likelihood, _ in pairs] == pytest.approx(
        [likelihood for likelihood, _ in expected], rel=1e-4
    )
    assert [greedy for _, greedy in pairs] == [greedy for _, greedy in expected]
    # Windows of seq_length tokens; the first begins after the end-of-document token.
    tokens = [tokenizer.eod, *tokenizer.tokenize("a rolling text. " * 40)]
    length = config.model.seq_length
    total = 0.0
    for first in range(0, len(tokens) - 1, length):
        last = min(first + length, len(tokens) - 1)
        begin = max(0, last - length)
        total += score(tokens[begin : first + 1], tokens[first + 1 : last + 1])[0]
    assert rolled == pytest.approx([total], rel=1e-4)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([], "eval_tasks is not set"),
        pytest.param(
            ["no_such_task"],
            "lm-eval knows no no_such_task among its",
            marks=pytest.mark.matrix,  # reads all of lm-eval's tasks
        ),
        (["/nowhere/task.yaml"], "/nowhere/task.yaml can't be read"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_the_model_is_loaded(
    wanted: list[str], message: str, tmp_path: Path
):
    config = _config(tmp_path, eval_tasks=wanted, load="/nowhere", **TOPOLOGIES["sequential"])
    with pytest.raises(Exception, match=message):
        _in_world(config, tmp_path, _results)
