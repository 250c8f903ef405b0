"""What a run is told to do: every NeoX key declared once, checked, made into one value.

    YAML files, overrides
          │  yaml_files      read, hyphens become underscores, duplicates refused
          ▼
    {key: Written}           what the user wrote, and where
          │  draft           aliases, types, limits
          │  derivations     what follows: batch sizes, precision, topology, ...
          │  validate        checks inside and across groups
          ▼
      RunConfig              groups, topology, batch geometry; nothing writes to it afterwards
          │  outcomes        at launch: what works, has no effect, or is not supported yet
          ▼  transport       as arguments, to every rank

Keys are declared in ``groups``, one dataclass per NeoX group. No module here imports torch.
"""
