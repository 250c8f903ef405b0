"""Starting ranks and ending them, all of them.

    deepy.py ── forks ──> rank 0, rank 1, ...       each leads a session of its own
        │                   │
        │ pipe              └─ dies with deepy.py (PR_SET_PDEATHSIG)
        v
      guard ── when the pipe breaks ──> ends what the ranks' sessions still hold

placement         what one node runs; the environment and command line of each rank
rank_process      starts one rank
output            passes the ranks' output on; keeps the end of what each said on stderr
failures          which rank failed first, and how that is told
conclusion        how a whole job ended
agent             the loop: waits for exits, forwards signals, ends the rest after a failure
watchdog          which rank is over its time
wishes            which signals are one wish to stop
sessions          the guard
devices, port     how many slots this machine has; a free rendezvous port

On several nodes ``deepy.py`` is the head. It has pdsh, srun or mpirun start one agent per node:

    deepy.py ── pdsh, srun or mpirun ──> node agent (cli.node_agent) ── forks ──> ranks of the node
        ^                                    │
        └──────────── job channel ───────────┘

multi_node        what has to be ready before the agents start
remote_start      the command that starts them; travelling: which variables ranks get
job_file          the token, and secrets that must not stand in a command line
job_channel       what head and agents say to each other; addresses: where the head can be reached
head, head_link   the two ends
software          versions that have to be the same on all nodes

Nothing here imports torch or deepspeed at module level, so that a launch starts at once.
"""
