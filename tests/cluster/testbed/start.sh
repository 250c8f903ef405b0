#!/bin/bash
# start.sh [N]: head (slurmctld) + N nodes (slurmd, sshd, munged each); returns when all N are idle.
# Settings by environment: TESTBED (state dir), TESTBED_NET, TESTBED_CPUS, TESTBED_GPUS (1 or more),
# TESTBED_PREEMPT=steps (SLURM's default: a preempted job's --signal is not sent, its steps get SIGTERM),
# TESTBED_PRIVATE (directories that each node gets its own empty copy of; all else is shared, as over NFS).
set -euo pipefail
. "$(dirname "$0")/lib.sh"
N=${1:-2}
[ "$(id -u)" = 0 ] || die "must be root"
[ ! -e "$TB" ] || die "$TB exists: run stop.sh first"
umask 022; mkdir -p "$TB"/etc/{slurm,ssh}
trap 'code=$?; [ $code = 0 ] || "$HERE/stop.sh" --keep' EXIT
( umask 077; head -c 128 /dev/urandom >"$TB/munge.key"; ssh-keygen -q -t ed25519 -N '' -f "$TB/id" )
{ echo "127.0.0.1 localhost"; for h in head $(seq -f 'node%g' "$N"); do echo "$(addr $h) $h"; done; } >"$TB/etc/hosts"
sed -e "s|@TB@|$TB|; s|@N@|$N|; s|@CPUS@|${TESTBED_CPUS:-4}|; s|@GPUS@|${TESTBED_GPUS:-2}|" "$HERE/slurm.conf.in" >"$TB/etc/slurm/slurm.conf"
[ "${TESTBED_PREEMPT:-}" != steps ] || sed -i /preempt_send_user_signal/d "$TB/etc/slurm/slurm.conf"
for g in $(seq 0 $((${TESTBED_GPUS:-2} - 1))); do mknod "$TB/etc/gpu$g" c 1 3; done   # stand-ins: Slurm only asks for a device
echo "Name=gpu File=$TB/etc/gpu[0-$((${TESTBED_GPUS:-2} - 1))]" >"$TB/etc/slurm/gres.conf"
cat >"$TB/etc/sshd_config" <<E
HostKey $TB/id
AuthorizedKeysFile $TB/id.pub
PidFile /run/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
E
cat >"$TB/etc/ssh/testbed.conf" <<E
Host *
  IdentityFile $TB/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
E
boot head; for i in $(seq "$N"); do boot "node$i"; done
for t in $(seq 120); do
  [ "$(enter head sinfo -h -N -p low -t idle -o %N 2>/dev/null | wc -l)" = "$N" ] && { enter head sinfo -N -l; exit 0; }
  sleep .5
done
enter head sinfo -N -l >&2 || :; tail -n 20 "$TB"/*/*.log >&2; die "nodes not idle after 60 s"
