#!/usr/bin/env bash
# minislurm.sh - a real, private, multi-node Slurm cluster on ONE machine, for tests.
#
#   minislurm.sh install                 install the Debian/Ubuntu packages that are missing
#   minislurm.sh start  DIR              start (idempotent); prints the lines to eval
#   minislurm.sh stop   DIR              stop everything, by pid; waits until it is gone
#   minislurm.sh status DIR              daemons, nodes, jobs; exit 0 = controller and all nodes usable
#   minislurm.sh env    DIR              print the `export ...` lines
#   minislurm.sh run    DIR CMD...       run CMD with that environment
#   -- faults --------------------------------------------------------------------------
#   minislurm.sh node-kill   DIR NODE    power the node off: SIGKILL everything on it
#   minislurm.sh node-start  DIR NODE    boot it again
#   minislurm.sh slurmd-kill DIR NODE    SIGKILL slurmd only (its jobs go on)
#   minislurm.sh slurmd-start DIR NODE
#   minislurm.sh ctld-kill   DIR         SIGKILL slurmctld (jobs go on)
#   minislurm.sh ctld-start  DIR         start it again, with its saved state
#   minislurm.sh link-down   DIR NODE    cut the node's network cable   (netns mode only)
#   minislurm.sh link-up     DIR NODE
#   minislurm.sh node-exec   DIR NODE CMD...   run CMD on the node, outside any job
#
# MINISLURM_MODE=auto|netns|loop   netns: each node is its own network+pid+mount+uts+ipc
#                                  namespace with its own IP, host name, /dev/shm and /tmp/ray
#                                  (needs CAP_SYS_ADMIN+CAP_NET_ADMIN);
#                                  loop: plain daemons on 127.77.x.y, needs no privilege at all
# MINISLURM_NODES=4 MINISLURM_CPUS=4 MINISLURM_MEM=4000 MINISLURM_GPUS=2    per node, all pretended
# MINISLURM_PROCTRACK=auto|cgroup|linuxproc|pgid   auto: cgroup in netns mode where a v1 freezer is to be had
#                                  (kills what a job daemonized, as real clusters do), else linuxproc
# MINISLURM_SLURMD_TIMEOUT=10      seconds until an unreachable node is DOWN and its jobs requeued
# MINISLURM_REQUEUE_DELAY=5        seconds a requeued job must wait (Slurm's default: 120; 2 is refused, and acts as ~30)
# MINISLURM_PRIVATE="/dev/shm /tmp/ray"   directories each node has for itself (netns mode)
# MINISLURM_EXTRA=...              text appended to slurm.conf
# MINISLURM_INSTALL=1|0            0: never apt-get
# shellcheck disable=SC1090,SC1091,SC2012,SC2015,SC2030,SC2031,SC2045,SC2046,SC2086,SC2143,SC2165,SC2166,SC2167
set -u
umask 022
export PATH="$PATH:/usr/sbin:/sbin"
SELF=$(readlink -f "$0")

MODE=${MINISLURM_MODE:-auto}
NODES=${MINISLURM_NODES:-4}
CPUS=${MINISLURM_CPUS:-4}
MEM=${MINISLURM_MEM:-4000}
GPUS=${MINISLURM_GPUS:-2}
PROCTRACK=${MINISLURM_PROCTRACK:-auto}
SLURMD_TIMEOUT=${MINISLURM_SLURMD_TIMEOUT:-10}
REQUEUE_DELAY=${MINISLURM_REQUEUE_DELAY:-5}
PRIVATE=${MINISLURM_PRIVATE-/dev/shm /tmp/ray}
NET=${MINISLURM_NET:-10.77}
WAIT=${MINISLURM_WAIT:-60}

die()  { echo "minislurm: $*" >&2; if [ -n "${STARTING:-}" ]; then STARTING=""; do_stop; fi; exit 1; }
note() { echo "minislurm: $*" >&2; }

# --- processes, by pid -------------------------------------------------------
# A pid counts as alive only when it is no zombie: where PID 1 does not reap (containers),
# `kill -0` succeeds on a dead daemon for ever.
stat_of()  { local s=""; [ -n "${1:-}" ] && { s=$(<"/proc/$1/stat"); } 2>/dev/null; [ -n "$s" ] || return 1; s=${s##*) }; set -- $s; echo "$1 ${20}"; }
alive()    { local s; s=$(stat_of "$1") && [ "${s%% *}" != Z ] && [ "${s%% *}" != X ]; }
remember() { local s; s=$(stat_of "$2") || return 1; echo "$2 ${s#* }" >"$D/run/$1.pid"; }   # pid + start time
recall()   { local pid t s; { read -r pid t <"$D/run/$1.pid"; } 2>/dev/null || return 1
             s=$(stat_of "$pid") && [ "${s#* }" = "$t" ] && [ "${s%% *}" != Z ] && echo "$pid"; }
wait_for() { local n=$(( $1 * 20 )); shift; while ! "$@"; do [ $((n--)) -gt 0 ] || return 1; sleep 0.05; done; }
gone()     { ! alive "$1"; }
end()      { # end NAME [SIGNAL] - the remembered process; SIGKILL after 10 s
  local pid; pid=$(recall "$1") || { rm -f "$D/run/$1.pid"; return 0; }
  kill -"${2:-TERM}" "$pid" 2>/dev/null
  wait_for 10 gone "$pid" || { kill -KILL "$pid" 2>/dev/null; wait_for 5 gone "$pid"; }
  rm -f "$D/run/$1.pid"
}
launch()   { # launch NAME CMD... - in the background, own session, nothing inherited but the environment
  local name=$1; shift
  setsid "$@" </dev/null >>"$D/log/$name.out" 2>&1 9>&- &
  remember "$name" $!
}

# --- packages ----------------------------------------------------------------
need_packages() {
  local p=""
  command -v slurmctld >/dev/null || p="$p slurmctld"
  command -v slurmd    >/dev/null || p="$p slurmd"
  command -v sbatch    >/dev/null || p="$p slurm-client"
  command -v munged    >/dev/null || p="$p munge"
  command -v flock     >/dev/null || p="$p util-linux"
  if [ "$MODE" != loop ]; then command -v ip >/dev/null || p="$p iproute2"; fi
  echo "$p"
}
install_packages() {
  local p; p=$(need_packages); [ -z "$p" ] && return 0
  [ "${MINISLURM_INSTALL:-1}" = 1 ] || die "missing packages:$p"
  local sudo=""; [ "$(id -u)" = 0 ] || sudo="sudo -n"
  note "installing$p"
  { $sudo apt-get update -q && DEBIAN_FRONTEND=noninteractive $sudo apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends $p; } \
    >"${TMPDIR:-/tmp}/minislurm-apt.$$.log" 2>&1 || { tail -n 20 "${TMPDIR:-/tmp}/minislurm-apt.$$.log" >&2; die "apt-get failed"; }
  rm -f "${TMPDIR:-/tmp}/minislurm-apt.$$.log"
}

# --- what this machine allows ------------------------------------------------
can_netns() {
  [ "$(id -u)" = 0 ] && command -v ip >/dev/null && command -v nsenter >/dev/null || return 1
  local t="mst$$"
  unshare --mount --net --pid --fork --uts --ipc --propagation private true 2>/dev/null || return 1
  ip link add "$t" type bridge 2>/dev/null || return 1
  ip link add "${t}a" type veth peer name "${t}b" 2>/dev/null; local rc=$?
  ip link del "${t}a" 2>/dev/null; ip link del "$t" 2>/dev/null
  return $rc
}
veth_of() { echo "ms${ID}${1/node/n}"; }
names() { local i; for i in $(seq "$NODES"); do echo "node$i"; done; }
ip_of() { # node -> address
  if [ "$1" = ctl ]; then ctl_ip; elif [ "$MODE" = netns ]; then echo "$NET.$ID.${1#node}"; else echo "127.77.$ID.${1#node}"; fi; }
ctl_ip()   { if [ "$MODE" = netns ]; then echo "$NET.$ID.254"; else echo 127.0.0.1; fi; }
ctl_name() { if [ "$MODE" = netns ]; then echo ctl; else echo localhost; fi; }
ctl_port() { if [ "$MODE" = netns ]; then echo 6817; else echo $((10000+ID*50)); fi; }
port_of()  { if [ "$MODE" = netns ]; then echo 6818; else echo $((10001+ID*50+${1#node})); fi; }
on_ctl()   { # the controller's own namespaces (no pid namespace: pids stay ours)
  if [ "$MODE" = netns ]; then echo "nsenter -t $(recall ctl) -m -u -n --"; fi; }
port_taken() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

save_settings() { cat >"$D/run/settings" <<EOF
MODE=$MODE
ID=$ID
NODES=$NODES
CPUS=$CPUS
MEM=$MEM
GPUS=$GPUS
PROCTRACK=$PROCTRACK
SLURMD_TIMEOUT=$SLURMD_TIMEOUT
PRIVATE='$PRIVATE'
EOF
}
load_settings() { [ -r "$D/run/settings" ] && . "$D/run/settings"; }

# --- network -----------------------------------------------------------------
claim()    { # this ID's ports, against another start at the same moment
  local c=/tmp/.minislurm.$ID o=""
  mkdir "$c" 2>/dev/null && { echo "$D" >"$c/dir"; return 0; }
  sleep 0.1; { o=$(<"$c/dir"); } 2>/dev/null
  if [ "$o" != "$D" ] && [ -e "$o/run/settings" -o -e "$o/run/starting" ]; then return 1; fi     # in use
  rm -rf "$c" 2>/dev/null; mkdir "$c" 2>/dev/null && echo "$D" >"$c/dir"                          # left behind
}
unclaim()  { if [ "$(cat "/tmp/.minislurm.$ID/dir" 2>/dev/null)" = "$D" ]; then rm -rf "/tmp/.minislurm.$ID"; fi; }
net_up() { # picks a free ID, which names the bridge and the subnet
  local i
  if [ "$MODE" = netns ]; then
    for i in $(seq 1 250); do ip link add "ms$i" type bridge 2>/dev/null && { ID=$i; break; }; done
    [ -n "$ID" ] || die "no free bridge name"
    ip link set "ms$ID" alias "minislurm $D"
    sysctl -qw "net.ipv6.conf.ms$ID.disable_ipv6=1" 2>/dev/null
    ip addr add "$NET.$ID.253/24" dev "ms$ID"   # this side, from which jobs are submitted
    ip link set "ms$ID" up
    # should the bridge vanish, nothing meant for it leaves this machine
    ip route add blackhole "$NET.$ID.0/24" metric 4000 2>/dev/null
  else
    for ID in $(seq 1 250); do
      claim || continue
      for i in $(ctl_port) $(for i in $(names); do port_of "$i"; done); do port_taken 127.0.0.1 "$i" && { unclaim; continue 2; }; done
      i=""; break
    done
    [ -z "$i" ] || die "no free ports"
  fi
}
net_down() {
  [ "$MODE" = netns ] || { [ -z "$ID" ] || unclaim; return 0; }
  local b
  # ours, however it was left: the alias names the state directory
  for b in $(ip -o link show type bridge 2>/dev/null | awk -F'[: ]+' '{print $2}'); do
    case $b in ms[0-9]*) ;; *) continue;; esac
    [ "$(cat "/sys/class/net/$b/ifalias" 2>/dev/null)" = "minislurm $D" ] || continue
    local v; for v in $(ls "/sys/class/net/$b/brif" 2>/dev/null); do ip link del "$v" 2>/dev/null; done
    ip link del "$b" 2>/dev/null
    ip route del blackhole "$NET.${b#ms}.0/24" metric 4000 2>/dev/null
  done
  return 0
}

# --- nodes -------------------------------------------------------------------
in_node() { # in_node NODE CMD... - runs CMD there
  local n=$1; shift
  if [ "$MODE" = netns ]; then
    local pid; pid=$(recall "$n") || return 1
    nsenter -t "$pid" -m -u -i -n -p -- "$@"
  else "$@"; fi
}
node_init() { # PID 1 of a node: D and NODE are set
  local pid rest d
  read -r pid rest </proc/self/stat          # /proc is still the outer one: this is our pid outside
  echo "$pid" >"$D/run/$NODE.outer.tmp"
  hostname "$NODE"
  mount --bind "$D/hosts" /etc/hosts
  # names come from that file only: a DNS query would wait 5 s for an answer that cannot come
  [ -e /etc/nsswitch.conf ] && mount --bind "$D/nsswitch.conf" /etc/nsswitch.conf
  [ -e /etc/resolv.conf ] && mount --bind "$D/resolv.conf" /etc/resolv.conf
  if [ "$NODE" = ctl ]; then PRIVATE=""; else mount -t proc proc /proc; fi
  if [ "$PROCTRACK" = cgroup ] && [ "$NODE" != ctl ]; then   # a part of the tree for this cluster alone
    mkdir -p "/sys/fs/cgroup/freezer/ms$ID" && mount --bind "/sys/fs/cgroup/freezer/ms$ID" /sys/fs/cgroup/freezer
  fi
  for d in $PRIVATE; do
    if [ "$d" = /dev/shm ]; then mkdir -p "$d"; mount -t tmpfs -o mode=1777 tmpfs "$d"
    else mkdir -p "$d" "$D/nodes/$NODE$d"; chmod 1777 "$D/nodes/$NODE$d"; mount --bind "$D/nodes/$NODE$d" "$d"; fi
  done
  mv "$D/run/$NODE.outer.tmp" "$D/run/$NODE.outer"
  trap 'exit 0' TERM
  while :; do sleep 3600 & wait $!; done       # bash reaps whatever is orphaned here
}
node_boot() {
  local n=$1 pid v own="--ipc --pid --fork --kill-child"
  [ "$MODE" = netns ] || { slurmd_start "$n"; return; }
  [ "$n" = ctl ] && own=""
  rm -f "$D/run/$n.outer"
  INIT_PRIVATE="$PRIVATE" INIT_PROCTRACK="$PROCTRACK" INIT_ID="$ID" setsid unshare --mount --net --uts $own --propagation private \
    "$SELF" __init "$D" "$n" </dev/null >>"$D/log/$n.out" 2>&1 9>&- &
  wait_for 10 test -s "$D/run/$n.outer" || { cat "$D/log/$n.out" >&2; die "$n did not boot"; }
  pid=$(<"$D/run/$n.outer"); remember "$n" "$pid"
  v=$(veth_of "$n")
  ip link del "$v" 2>/dev/null
  ip link add "$v" type veth peer name eth0 netns "$pid" || die "no veth for $n"
  ip link set "$v" master "ms$ID" up
  sysctl -qw "net.ipv6.conf.$v.disable_ipv6=1" 2>/dev/null
  nsenter -t "$pid" -n sh -c "
    sysctl -qw net.ipv6.conf.all.disable_ipv6=1 2>/dev/null
    ip link set lo up; ip addr add $(ip_of "$n")/24 dev eth0; ip link set eth0 up
    # a default route that leads nowhere: programs that ask the kernel for 'my address'
    # by connecting a UDP socket to some public address get the node's own; nothing leaves
    ip link add sink type bridge && ip link set sink up && ip route add default dev sink src $(ip_of "$n")" || die "no network for $n"
  [ "$n" = ctl ] || slurmd_start "$n"
}
slurmd_start() {
  local n=$1
  if [ "$MODE" = netns ]; then in_node "$n" env -i PATH="$PATH" HOME=/root slurmd -N "$n" -f "$D/slurm.conf" >>"$D/log/$n.out" 2>&1 9>&- </dev/null \
      || { tail -n 5 "$D/log/$n.out" "$D/log/slurmd.$n.log" >&2; die "slurmd of $n"; }
  else launch "$n" env -i PATH="$PATH" HOME="$HOME" slurmd -D -N "$n" -f "$D/slurm.conf"; fi
}
slurmd_kill() {
  if [ "$MODE" = netns ]; then in_node "$1" sh -c "kill -9 \$(cat '$D/run/slurmd.$1.inner')"
  else end "$1" KILL; fi
}
job_pids() { # job processes of this cluster (on node $1), by their environment
  local e p me=$$
  for e in /proc/[0-9]*/environ; do
    p=${e#/proc/}; p=${p%/environ}; [ "$p" = "$me" ] && continue
    { tr '\0' '\n' <"$e"; } 2>/dev/null | awk -v c="SLURM_CONF=$D/slurm.conf" -v n="SLURMD_NODENAME=${1:-}" -v any="${1:+0}" '
      $0==c {a=1} index($0,"SLURMD_NODENAME=")==1 {b = (any=="") || $0==n} END {exit !(a&&b)}' && echo "$p"
  done
}
stepd_pids() { # a slurmstepd's own environment has no SLURMD_NODENAME
  local e p
  for e in /proc/[0-9]*/comm; do
    p=${e#/proc/}; p=${p%/comm}
    case $(cat "$e" 2>/dev/null) in slurmstepd*) ;; *) continue;; esac
    { tr '\0' '\n' <"/proc/$p/environ"; } 2>/dev/null | grep -qx "SLURM_CONF=$D/slurm.conf" || continue
    echo "$p"
  done
}
node_kill() {
  local n=$1 p
  if [ "$MODE" = netns ]; then
    end "$n" KILL; rm -f "$D/run/$n.outer"; ip link del "$(veth_of "$n")" 2>/dev/null
    return 0
  fi
  end "$n" KILL
  for p in $(job_pids "$n"); do              # the tasks, and the slurmstepd above each
    local pp; pp=$(awk '/^PPid/{print $2}' "/proc/$p/status" 2>/dev/null)
    case $(cat "/proc/$pp/comm" 2>/dev/null) in slurmstepd*) kill -9 "$pp" 2>/dev/null;; esac
    kill -9 "$p" 2>/dev/null
  done
  return 0
}

# --- configuration -----------------------------------------------------------
write_conf() {
  local me; me=$(id -un)
  local host; host=$(hostname -s 2>/dev/null || hostname)   # of this side
  local i n gpuline="" nodegres=""
  { echo "127.0.0.1 localhost"; echo "$(ctl_ip) ctl"; [ "$MODE" = netns ] && echo "$NET.$ID.253 $host"; for n in $(names); do echo "$(ip_of "$n") $n"; done; } >"$D/hosts"
  { grep -v '^hosts:' /etc/nsswitch.conf 2>/dev/null; echo "hosts: files"; } >"$D/nsswitch.conf"; : >"$D/resolv.conf"
  : >"$D/gres.conf"
  if [ "$GPUS" -gt 0 ]; then
    # Slurm wants character devices: with plain files it starts, but sets no CUDA_VISIBLE_DEVICES.
    # A node of /dev/null's kind does (mknod); unprivileged, any existing ones do.
    mkdir -p "$D/dev"; local ok=1
    for i in $(seq 0 $((GPUS-1))); do [ -c "$D/dev/gpu$i" ] || mknod "$D/dev/gpu$i" c 1 3 2>/dev/null || ok=0; done
    local range="[0-$((GPUS-1))]"; [ "$GPUS" = 1 ] && range=0
    if [ $ok = 1 ]; then gpuline="$D/dev/gpu$range"
    elif [ -c /dev/tty0 ] && [ -c "/dev/tty$((GPUS-1))" ]; then gpuline="/dev/tty$range"
    else # /dev/null and its like: names without a number are counted from 0
      gpuline=$(ls /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/ptmx 2>/dev/null | head -n "$GPUS" | paste -sd,)
    fi
    printf 'AutoDetect=off\nName=gpu File=%s\n' "$gpuline" >"$D/gres.conf"
    nodegres="Gres=gpu:$GPUS"
  fi
  cat >"$D/slurm.conf" <<EOF
ClusterName=mini
SlurmctldHost=$(ctl_name)($(ctl_ip))
SlurmctldPort=$(ctl_port)
SlurmUser=$me
SlurmdUser=$me
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
# cred_expire is also how long a requeued job must wait before it starts again (default 120)
AuthInfo=socket=$D/munge/socket,cred_expire=$REQUEUE_DELAY
CredType=cred/munge
StateSaveLocation=$D/ctld
SlurmctldPidFile=$D/run/slurmctld.inner
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdSpoolDir=$D/spool/%n
SlurmdPidFile=$D/run/slurmd.%n.inner
SlurmdLogFile=$D/log/slurmd.%n.log
# believe the CPUs/RealMemory below, not the hardware
SlurmdParameters=config_overrides
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SwitchType=switch/none
# a node that comes back is used again at once, whatever took it down
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_window=1440
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=$SLURMD_TIMEOUT
MessageTimeout=5
TCPTimeout=2
KillWait=5
CompleteWait=0
MinJobAge=3600
MaxArraySize=1001
# every start has its own range of job ids: tools that keep results by job id (submitit, slurm-%j.out)
# would otherwise take an earlier cluster's for this one's
FirstJobId=$(( $(date +%s) % 900000 + 1000 ))
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
EOF
  for n in $(names); do
    echo "NodeName=$n NodeHostname=$n NodeAddr=$(ip_of "$n") Port=$(port_of "$n") CPUs=$CPUS RealMemory=$MEM $nodegres State=UNKNOWN"
  done >>"$D/slurm.conf"
  cat >>"$D/slurm.conf" <<EOF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
${MINISLURM_EXTRA:-}
EOF
  # 22.05's slurmd sets the cgroup plugin up even when nothing uses it, and `autodetect` ends it on cgroup v2
  # and where there are no cgroups. With the v1 plugin named outright it starts in all of these (tried with
  # 22.05 only); the manual has `disabled` from 24.05 on (not tried).
  local cg=cgroup/v1
  if [ "$PROCTRACK" != cgroup ]; then
    case $(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1) in 1?.*|20.*|21.*|22.*|23.*) ;; *) cg=disabled;; esac
  fi
  printf 'CgroupPlugin=%s\nCgroupMountpoint=/sys/fs/cgroup\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n' "$cg" >"$D/cgroup.conf"
  cat >"$D/env.sh" <<EOF
export SLURM_CONF=$D/slurm.conf
export MINISLURM_DIR=$D
export MINISLURM_MODE=$MODE
export MINISLURM_HOSTS=$D/hosts
EOF
}

# --- daemons -----------------------------------------------------------------
munge_start() {
  mkdir -p "$D/munge"; chmod 755 "$D/munge"
  [ -s "$D/munge/key" ] || (umask 077; head -c 128 /dev/urandom >"$D/munge/key")
  rm -f "$D/munge/socket" "$D/munge/socket.lock"
  launch munged munged --foreground --force --key-file="$D/munge/key" --socket="$D/munge/socket" \
    --pid-file="$D/run/munged.inner" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" --num-threads=2
  wait_for 10 test -S "$D/munge/socket" || { cat "$D/log/munged.out" >&2; die "munged did not start"; }
}
ctld_start() { launch slurmctld $(on_ctl) slurmctld -D -f "$D/slurm.conf" "$@"; }
ctld_up()    { scontrol ping 2>/dev/null | grep -q 'is UP'; }
nodes_up()   { [ "$(sinfo -h -N -p main -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ]; }
no_jobs()    { [ -z "$(squeue -h -t all -o %T 2>/dev/null | grep -E 'RUNNING|COMPLETING|SUSPENDED|CONFIGURING')" ]; }

cgroup_gone() { find "/sys/fs/cgroup/freezer/ms$ID" -depth -type d -exec rmdir {} + 2>/dev/null; [ ! -d "/sys/fs/cgroup/freezer/ms$ID" ]; }

do_stop() {
  load_settings || true
  export SLURM_CONF="$D/slurm.conf"
  local n p
  if [ "$MODE" = loop ] && recall slurmctld >/dev/null && ctld_up; then      # let Slurm end the jobs
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel -f 2>/dev/null
    wait_for 8 no_jobs || note "jobs left; killing them"
  fi
  end slurmctld
  for n in $(names); do
    if [ "$MODE" = netns ]; then end "$n" KILL; rm -f "$D/run/$n.outer"; else end "$n"; fi
  done
  if [ "$MODE" = loop ]; then
    for p in $(stepd_pids) $(job_pids); do kill -9 "$p" 2>/dev/null; done
  fi
  if [ "$MODE" = netns ] && [ -n "$ID" ] && [ -d "/sys/fs/cgroup/freezer/ms$ID" ]; then
    wait_for 3 cgroup_gone || note "left: /sys/fs/cgroup/freezer/ms$ID"
  fi
  end munged; end ctl; rm -f "$D/run/ctl.outer"
  net_down
  rm -f "$D"/run/*.inner "$D"/run/settings "$D"/run/starting "$D/env.sh"
}
do_start() {
  if load_settings && recall slurmctld >/dev/null && recall munged >/dev/null; then
    export SLURM_CONF="$D/slurm.conf"
    if wait_for 5 ctld_up && wait_for 15 nodes_up; then note "already running ($MODE)"; cat "$D/env.sh"; return 0; fi
    note "found it half alive; restarting"
  fi
  local m=$MODE_WANTED t0 t1; t0=$(date +%s%N)
  do_stop
  MODE=$m NODES=${MINISLURM_NODES:-4} CPUS=${MINISLURM_CPUS:-4} MEM=${MINISLURM_MEM:-4000} GPUS=${MINISLURM_GPUS:-2} \
    PROCTRACK=${MINISLURM_PROCTRACK:-auto} SLURMD_TIMEOUT=${MINISLURM_SLURMD_TIMEOUT:-10} PRIVATE=${MINISLURM_PRIVATE-/dev/shm /tmp/ray} ID=""
  install_packages
  case $MODE in auto) if can_netns; then MODE=netns; else MODE=loop; fi;;
    netns) can_netns || die "network namespaces cannot be made here: try MINISLURM_MODE=loop";; loop) ;; *) die "MINISLURM_MODE?";; esac
  if [ "$PROCTRACK" = auto ]; then
    if [ "$MODE" = netns ] && [ -w /sys/fs/cgroup/freezer/cgroup.procs ]; then PROCTRACK=cgroup; else PROCTRACK=linuxproc; fi
  fi
  rm -rf "$D/ctld" "$D/spool" "$D/log" "$D/nodes" "$D/munge"
  mkdir -p "$D/ctld" "$D/log" "$D/run" "$D/nodes"
  local n; for n in $(names); do mkdir -p "$D/spool/$n" "$D/nodes/$n"; done
  trap 'die interrupted' INT TERM HUP
  STARTING=1; : >"$D/run/starting"              # from here on, a failure undoes it all
  net_up; save_settings; write_conf
  export SLURM_CONF="$D/slurm.conf"
  munge_start
  if [ "$MODE" = netns ]; then node_boot ctl; fi
  ctld_start -c
  for n in $(names); do node_boot "$n"; done
  wait_for "$WAIT" ctld_up  || { tail -n 10 "$D/log/slurmctld.out" >&2; die "slurmctld did not come up"; }
  wait_for "$WAIT" nodes_up || { sinfo -N -l >&2; tail -n 5 "$D"/log/slurmd.*.log >&2; die "nodes did not become idle"; }
  t1=$(date +%s%N); STARTING=""; rm -f "$D/run/starting"
  note "$(slurmctld -V), $NODES nodes, $MODE, proctrack/$PROCTRACK, up in $(( (t1-t0)/1000000 )) ms; logs in $D/log"
  cat "$D/env.sh"
}

# --- commands ----------------------------------------------------------------
cmd=${1:-}; shift || true
ID=""; MODE_WANTED=$MODE
[ "$cmd" = install ] && { install_packages; exit; }
[ "$cmd" = __init ] && { ID=$INIT_ID PROCTRACK=$INIT_PROCTRACK PRIVATE=$INIT_PRIVATE D=$1 NODE=$2; node_init; exit; }
case $cmd in start|stop|status|env|run|node-kill|node-start|slurmd-kill|slurmd-start|ctld-kill|ctld-start|link-down|link-up|node-exec) ;;
  *) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$SELF"; exit 2;; esac
[ -n "${1:-}" ] || die "$cmd: which state directory?"
D=$1; shift
case $cmd in
  start) # what is in DIR gets deleted: only ever in a directory of our own
    if [ -n "$(ls -A "$D" 2>/dev/null)" ] && [ ! -e "$D/.minislurm" ]; then die "$D is not empty, and no state directory of mine"; fi
    mkdir -p "$D/run" && : >"$D/.minislurm" || die "cannot write $D";; *) [ -d "$D/run" ] || { [ "$cmd" = stop ] && exit 0; die "no cluster in $D"; };; esac
D=$(cd "$D" && pwd -P)
[ ${#D} -le 85 ] || die "state directory's path is too long for a unix socket: $D"
case $cmd in run|env|status|node-exec) ;; *) exec 9>"$D/run/lock"; flock -w 120 9 || die "another minislurm holds $D";; esac
case $cmd in start) do_start; exit;; stop) do_stop; exit;; esac
load_settings || { [ "$cmd" = status ] && { echo "stopped"; exit 3; }; die "not running in $D"; }
export SLURM_CONF="$D/slurm.conf"
known() { names | grep -qx "${1:-}" || die "no node '${1:-}'"; }
case $cmd in
  env) cat "$D/env.sh";;
  run) set -a; . "$D/env.sh"; set +a; exec "$@";;
  status)
    bad=0
    for n in ctl munged slurmctld $(names); do
      case $n in ctl) [ "$MODE" = netns ] || continue;; esac
      if p=$(recall "$n"); then echo "$n pid $p"; else echo "$n not running"; bad=1; fi
    done
    if ctld_up; then sinfo -N -o '%N %T %c %m %G %E' -p main; squeue; nodes_up || bad=1; else bad=1; fi
    exit $bad;;
  node-kill) known "$1"; node_kill "$1";;
  node-start) known "$1"; recall "$1" >/dev/null || node_boot "$1";;
  slurmd-kill) known "$1"; slurmd_kill "$1";;
  slurmd-start) known "$1"; slurmd_start "$1";;
  ctld-kill) end slurmctld KILL;;
  ctld-start) recall slurmctld >/dev/null || ctld_start; wait_for "$WAIT" ctld_up;;
  link-down) [ "$1" = ctl ] || known "$1"; [ "$MODE" = netns ] || die "netns mode only"; ip link set "$(veth_of "$1")" down;;
  link-up)   [ "$1" = ctl ] || known "$1"; [ "$MODE" = netns ] || die "netns mode only"; ip link set "$(veth_of "$1")" up;;
  node-exec) known "$1"; n=$1; shift; in_node "$n" "$@";;
esac
