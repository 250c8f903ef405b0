"""A checkpoint rewritten for another topology, without starting a single rank.

plan            which layers, parameters and flat vectors each rank of the new topology has
streamed_file   torch files whose tensors are produced when their turn comes to be written
optimizer_files the optimizer's state as DeepSpeed's optimizer at the new topology loads it
offline         one checkpoint directory to another
for_neox        what changes when NeoX itself is to read the result

Values are read through ``parameter_state``, as a launch at another topology reads them.
"""
