"""The commands behind ``tools/ckpts/verify.py`` and ``tools/ckpts/inspect_checkpoints.py``."""
