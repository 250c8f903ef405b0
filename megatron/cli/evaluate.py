"""``eval.py``: lm-eval's tasks on a trained model (spec/cli.md §6)."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import ConfigError
from megatron.base.printing import print_rank_0
from megatron.cli.inference_model import open_model
from megatron.config.run_config import RunConfig
from megatron.config.transport import load_transported
from megatron.engine.agreement import together
from megatron.engine.distributed import RankEnvironment, connect, rank_environment

__all__ = ["evaluate", "main"]

_BOOTSTRAPS = 10_000  # resamples behind a standard error, as in NeoX
_TASK_NAME = re.compile(r"^task:\s*[\"']?([^\s\"'#]+)", re.MULTILINE)


def main(
    input_args: Sequence[str] | None = None, overwrite_values: Mapping[str, Any] | None = None
) -> None:
    """Evaluate as the transported configuration says; NeoX's entry point.

    Args:
        input_args: command line, ``sys.argv[1:]`` if None: what ``deepy.py`` passes to ranks.
        overwrite_values: keys that win over the configuration.
    """
    evaluate(load_transported(input_args, overwrite_values), rank_environment())


def evaluate(config: RunConfig, environment: RankEnvironment) -> dict[str, Any]:
    """Evaluate on this rank, together with all others of ``environment``.

    Returns:
        The results by task, on every rank.

    Raises:
        ConfigError: lm-eval isn't installed, or a task isn't known.
        CheckpointError: there is no good checkpoint.
    """
    groups = connect(environment, config.topology, backend=config.other.distributed_backend)
    names, manager = together(groups, lambda: _tasks(config.text_generation.eval_tasks or []))
    model = open_model(config, groups)

    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    from megatron.cli.lm_eval_model import NeoXModel

    seed = config.other.seed
    results = simple_evaluate(
        model=NeoXModel(model, groups, seed=seed),
        tasks=names,
        task_manager=manager,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    path = _result_file(config.text_generation.eval_results_prefix or "")

    def write() -> Any:
        if groups.rank != 0:
            return None  # lm-eval sums up on a node's first rank alone
        told = {**results, "checkpoint": str(model.checkpoint)}
        text = json.dumps(told, indent=2, default=handle_non_serializable)
        write_atomically(path, text + "\n")
        print_rank_0(make_table(results))
        return results["results"]

    by_task = groups.from_rank_0(together(groups, write))
    print_rank_0(f"wrote {path}")
    return by_task


def _tasks(wanted: Sequence[str]) -> tuple[list[str], Any]:
    """Return the names of tasks, and lm-eval's register that knows them.

    A task may also be the path of a task's YAML file.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"eval.py needs lm-eval ({error}); install it: "
            "pip install -r requirements/requirements-eval.txt"
        ) from error
    if not wanted:
        raise ConfigError("eval_tasks is not set: name lm-eval tasks, with --eval_tasks A B")
    files = {name: Path(name) for name in wanted if name.endswith((".yaml", ".yml"))}
    manager = TaskManager(
        include_path=[str(path.parent) for path in files.values()] or None,
        include_defaults=len(files) < len(wanted),  # reading all of lm-eval's takes seconds
    )
    names = [_name_in(files[name]) if name in files else name for name in wanted]
    known = set(manager.all_tasks)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(
            f"eval_tasks: lm-eval knows no {', '.join(unknown)} among its {len(known)} tasks; "
            "`lm-eval ls tasks` lists them, and a task's own YAML file may be named by its path"
        )
    return manager.match_tasks(names), manager


def _name_in(path: Path) -> str:
    try:
        found = _TASK_NAME.search(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"eval_tasks: {path} can't be read: {error}") from error
    if found is None:
        raise ConfigError(f"eval_tasks: {path} has no line `task: NAME`")
    return found[1]


def _result_file(prefix: str) -> Path:
    start = f"{prefix}_" if prefix else ""
    return Path(f"{start}eval_results_{time.strftime('%m-%d-%Y-%H-%M-%S')}.json")
