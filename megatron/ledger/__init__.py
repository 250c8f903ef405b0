"""The record of a run: what each step consumed, and which checkpoint a launch goes on from.

No torch here: everything can be read on a login node.
"""
