"""What a launch will do, decided before anything heavy is built.

    configuration + datasets ── Wanted ─┐
                                        ├─ plan_resume ─> ResumePlan ─> segments, orders, cursors
    checkpoint's ledger ────── Found ───┘        │                      five lines, a report, JSON
                                                 │                      or one ConfigError
                 Counting.open_order ────────────┘ (only to count what a change costs)

Values in, values out. A stream goes on from what its ledger says; what can't go on exactly is
refused unless ``accept_data_change`` names it.

    past               what the checkpoint says, or what a foreign one must have consumed
    data_changes       what is different now
    continuation       how a stream goes on: same order, new blend, or another order
    component_ranges   positions of a blend as samples of its components
    token_counts       which tokens two futures consume unequally often
    neox_rule, costs   what NeoX would do, and what each way repeats and skips
    refusals, report   words
"""

from megatron.ledger.planning.costs import Counting
from megatron.ledger.planning.inputs import (
    DATA_CHANGES,
    ForeignCheckpoint,
    Found,
    LearningRates,
    SampleSource,
    Wanted,
)
from megatron.ledger.planning.plan import plan_resume
from megatron.ledger.planning.resume_plan import ResumePlan

__all__ = [
    "DATA_CHANGES",
    "Counting",
    "ForeignCheckpoint",
    "Found",
    "LearningRates",
    "ResumePlan",
    "SampleSource",
    "Wanted",
    "plan_resume",
]
