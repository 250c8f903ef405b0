"""``neox-ledger``: questions about a run, its data and its resume. No torch, no GPU.

One module per command: its options, one call of a query, and how the answer looks.
"""
