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
agent             the loop: waits for exits, forwards signals, ends the rest after a failure
sessions          the guard
devices, port     how many slots this machine has; a free rendezvous port
deepspeed_runner  several nodes: DeepSpeed's runner

Nothing here imports torch or deepspeed at module level, so that a launch starts at once.
"""
