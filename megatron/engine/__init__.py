"""Training on DeepSpeed: process groups, the engine, the step loop, evaluation and reports.

distributed      torch.distributed and the groups of this rank
deepspeed_config what DeepSpeed is told
assembly         planned layers -> DeepSpeed engine with our optimizer and schedule
steps            one training step, one evaluation
loop             steps, saves and evaluations in NeoX's order
saving           what a save records, and what a failed one means
stop_signals     what signals ask of this process
stopping         all ranks end after the same step
time_limit       a stop before time is up
progress_reports how long each part of a training may take until it counts as a hang
reports          console lines, TensorBoard, Weights & Biases
"""
