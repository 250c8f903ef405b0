"""Checkpoints in NeoX's layout: written through DeepSpeed, read by us.

save             one checkpoint, waited for
saver            checkpoints that are written while training goes on
save_settings    what all checkpoints of a run have in common
snapshot         the state of a running training, copied
hashed_file      a file whose digest is known when it is written
verified         all ranks check all bytes of a checkpoint, and agree
load             a full resume, or weights alone
parameter_state  masters and moments of any writer, by name; stored_optimizer, stored_layout and
                 flat_partitions find them in the files
resharding       parameter states into the engine of another topology; live_optimizer fills it
reshape/         the same from directory to directory, in bounded memory
weights          layer files (or a sequential module file) -> live module, at any TP and PP
stored           what a checkpoint directory holds, and who wrote it
compatibility    is it this run's model, topology and parameter order?
engine_optimizer state of DeepSpeed's optimizers
optimizer_state  state of the torch optimizer inside: as ours want it, and as NeoX wants it
remote_copy      a committed checkpoint, copied to object storage
rng              random states of a rank
safe_torch       the only place where torch opens a file
agreement        all ranks go on, or all raise

Without torch, for tools and for whoever must not trust a file:

checkpoint_files, stored_headers, structure, optimizer_structure    do the files make one whole?
mapped_tensors, stored_values, weight_copies, neighbours            what do they hold?
verification     all of it, in one verdict
"""
