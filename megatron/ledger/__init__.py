"""The record of a run: what each step consumed, and which checkpoint a launch goes on from.

    while training                             afterwards, or from outside
    ──────────────                             ───────────────────────────
    digests ──┐                                lineage ── lineage_check
              ├─ recorder ─┬─ attempts/NNNN.jsonl ──┤   (line_search)
    redone_   │            ├─ attempts/NNNN.json  ──┤
    steps ────┘            └─ global_stepN/         │
                              ledger.json ──────────┘
    before:  lease, run_directory, checkpoint_choice, instructions, planning
    saving:  commit, manifest, retention
    after:   queries

``ledger_file`` holds the values that all of them pass around, ``chain`` the arithmetic that makes
lines tell when they were touched, ``attempt_facts``, ``run_file`` and ``environment`` what is known
of a launch and its run. No torch here: everything can be read on a login node.
"""
