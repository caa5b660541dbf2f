#!/usr/bin/env bash
# lab.sh FOLDER: a real Slurm of two nodes, n1 and n2, on one machine. conftest.py starts it as the first process in
# namespaces of its own (processes, network, mounts, host name), so nothing of it is left once it ends, which it does
# when its stdin does. It says "ready" when both nodes are idle. FOLDER must be short: sockets lie in it.
set -euo pipefail
lab=$1
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$lab"/{log,state,spool/n1,spool/n2}
chmod 755 "$lab"

# Nodes that a script for 8 GPUs a node fits on. Slurm counts their devices, nothing opens them: copies of /dev/null.
cpus=96 gpus=8 memory=1000000
for ((i = 0; i < gpus; i++)); do mknod "$lab/gpu$i" c 1 3; done
for node in n1 n2; do echo "NodeName=$node Name=gpu File=$lab/gpu[0-$((gpus - 1))]"; done > "$lab/gres.conf"
sed "s|@LAB@|$lab|; s|@CPUS@|$cpus|; s|@GPUS@|$gpus|; s|@MEMORY@|$memory|" "$here/slurm.conf.in" > "$lab/slurm.conf"
# slurmd starts the cgroup plugin even where nothing uses it; named here, it does not need /sys/fs/cgroup.
echo CgroupPlugin=cgroup/v1 > "$lab/cgroup.conf"
export SLURM_CONF=$lab/slurm.conf

# Names for the daemons, which listen on the address of their own, and for the jobs (MASTER_ADDR).
printf '127.0.0.1 localhost\n10.231.0.1 slab-ctl\n10.231.0.11 n1\n10.231.0.12 n2\n' > "$lab/hosts"
mount --bind "$lab/hosts" /etc/hosts
hostname slab-ctl
# A network for each node, joined by a bridge, with no way out. `ip netns` keeps them under /run.
mount -t tmpfs lab /run
ip link set lo up
ip link add slab type bridge
ip addr add 10.231.0.1/24 dev slab
ip link set slab up
for i in 1 2; do
  ip netns add "n$i"
  ip link add "n$i" type veth peer name eth0 netns "n$i"
  ip link set "n$i" master slab up
  ip -n "n$i" addr add "10.231.0.1$i/24" dev eth0
  ip -n "n$i" link set lo up
  ip -n "n$i" link set eth0 up
done

start() {  # NAME COMMAND...
  "${@:2}" < /dev/null > "$lab/log/$1.out" 2>&1 &
}
node() {  # NAME COMMAND...: not by `ip netns exec`, which mounts another /sys
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/$1" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$@"
}
await() {  # WHAT COMMAND...
  for _ in $(seq 150); do "${@:2}" > /dev/null 2>&1 && return; sleep 0.1; done
  echo "$1 did not come up"
  tail -n 20 "$lab"/log/*
  exit 1
}
all_idle() { [ "$(sinfo -h -p low -o '%D %T')" = "2 idle" ]; }

# A key, a socket and a log of its own; /etc/munge is not touched.
(umask 077; head -c 1024 /dev/urandom > "$lab/munge.key")
start munged munged --foreground --force --key-file="$lab/munge.key" --socket="$lab/munge.sock" --num-threads=2 \
  --pid-file="$lab/munged.pid" --log-file="$lab/log/munged" --seed-file="$lab/munge.seed"
await munged sh -c "munge -n -S '$lab/munge.sock' | unmunge -S '$lab/munge.sock'"
start slurmctld slurmctld -D -i
await slurmctld scontrol ping
for n in n1 n2; do start slurmd.$n node $n slurmd -D -N $n; done
await nodes all_idle
echo ready
cat > /dev/null
