"""``tools/pythia.py``: released Pythia checkpoints, checked and made ready to go on from.

models            what pythia-160m-deduped is: its configuration files
known_releases    what was reported wrong or missing, with sources
downloaded        a directory as it lies on the hub, or NeoX's, by layer and name
measurements      digests and statistics of its tensors, in one pass
checks            what can be proven wrong from content, and what can't
file_checks       are its files whole, and of one step
loss_check        its loss on the batch after the step
importing         a checkpoint of ours at step N from it
written_start     that checkpoint's files
"""
