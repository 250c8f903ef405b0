"""Questions to a run's record: which data a step saw, which steps saw some data, whether all holds.

Values in, values out: nothing here prints, and nothing needs torch. A question is asked of a
:class:`~megatron.ledger.queries.run_view.RunView`, made from a run directory (also while the run
trains) or from a checkpoint alone; what needs the tokens also gets
:class:`~megatron.ledger.queries.run_data.RunData`.
"""
