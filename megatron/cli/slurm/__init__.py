"""``neox-slurm``: what a job does when a launch of its run has ended. No torch."""
