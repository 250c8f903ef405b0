#!/bin/bash
# node.sh kill|boot|cut|heal|slurmd-kill|slurmd-start NODE, or node.sh slurmctld-restart head
set -euo pipefail
. "$(dirname "$0")/lib.sh"
n=${2:?}; head=$(alive head) || die "head is not running"
case $1 in
  kill) halt "$n";;                                         # power off
  boot) boot "$n"; sleep 2; enter head scontrol update nodename="$n" state=resume 2>/dev/null || :;;   # power on again
  cut)  nsenter -t "$head" -n ip link set "$n" down;;   # unplug the network at the switch: the node notices nothing
  heal) nsenter -t "$head" -n ip link set "$n" up;;
  slurmd-kill)  enter "$n" sh -c 'kill -9 $(cat /run/slurmd.pid)';;
  slurmd-start) enter "$n" slurmd -N "$n" -L "$TB/$n/slurmd.log";;
  # the controller dies without a word (no state is written on the way) and comes back
  slurmctld-restart) enter head sh -c 'kill -9 $(cat /run/slurmctld.pid)'; sleep "${DOWN_S:-2}"; enter head slurmctld -L "$TB/head/slurmctld.log";;
  *) die "usage: node.sh kill|boot|cut|heal|slurmd-kill|slurmd-start NODE, or slurmctld-restart head";;
esac
