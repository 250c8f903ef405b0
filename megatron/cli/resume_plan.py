"""What a launch will do, from its configuration. No torch: the launcher, the ranks and
``neox-ledger explain`` ask the same function and print the same lines.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron.cli.found_checkpoint import Source, find_source, found_checkpoint
from megatron.cli.wanted_launch import wanted_launch
from megatron.config.run_config import RunConfig
from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.planning import Counting, Found, ResumePlan, Wanted, plan_resume
from megatron.ledger.planning.missing_files import with_missing_files
from megatron.ledger.planning.past import Past
from megatron.ledger.planning.report import summary_lines
from megatron.ledger.queries.run_data import RunData

__all__ = ["PlannedLaunch", "plan_launch"]


@dataclass(frozen=True)
class PlannedLaunch:
    """A plan with what it was made from."""

    source: Source
    wanted: Wanted
    found: Found | None
    plan: ResumePlan

    @property
    def lines(self) -> list[str]:
        """The five lines that a launch prints before anything is built."""
        return summary_lines(self.plan)


def plan_launch(
    config: RunConfig,
    source: Source | None = None,
    *,
    counts_neox: bool = False,
    is_unlimited: bool = False,
    needs_tokens: bool = True,
) -> PlannedLaunch:
    """Plan a launch; a plan that refuses is returned, not raised.

    Args:
        config: of the launch.
        source: what it loads; None: what it would load, found without reading tensors.
        counts_neox: count also what NeoX's way would repeat and skip.
        is_unlimited: count however many samples there are.
        needs_tokens: look for token files; False: the indices are enough.

    Raises:
        MegatronError: the configuration, a dataset or the checkpoint cannot be used at all.
    """
    source = source or find_source(config)
    found = found_checkpoint(config, source)
    wanted = wanted_launch(config, records=_records(found), needs_tokens=needs_tokens)
    if not source.finetune and wanted.finetune:
        wanted = replace(wanted, finetune=False)  # begun before: the run is continued
    data = RunData({**_records(found), **wanted.datasets})
    counting = Counting(open_order=data.stream, counts_neox=counts_neox, is_unlimited=is_unlimited)
    plan = plan_resume(wanted, found, counting)
    if needs_tokens:
        plan = with_missing_files(
            plan, wanted.datasets, data.stream, eval_interval=wanted.eval_interval
        )
    return PlannedLaunch(source, wanted, found, plan)


def _records(found: Found | None) -> Mapping[str, DatasetNote]:
    return {} if found is None else Past.of(found).datasets
