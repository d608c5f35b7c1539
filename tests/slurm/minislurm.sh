#!/usr/bin/env bash
# minislurm.sh - a real, private Slurm of four nodes on one machine, for tests.
#
#   minislurm.sh install                installs the Debian/Ubuntu packages that are missing
#   minislurm.sh start  DIR             starts it afresh in DIR; prints the lines to eval
#   minislurm.sh stop   DIR             stops all of it, by pid; waits until it is gone
#   minislurm.sh node-kill  DIR NODE    powers node1 .. node4 off: SIGKILL for everything on it
#   minislurm.sh node-start DIR NODE    boots it again
#   minislurm.sh link-down  DIR NODE    cuts its cable (netns mode only)
#   minislurm.sh link-up    DIR NODE    plugs it in again
#   minislurm.sh ctld-kill  DIR         SIGKILL for slurmctld; jobs go on
#   minislurm.sh ctld-start DIR         starts it again, with its saved state
#
# MINISLURM_MODE=auto|netns|loop  netns: nodes with namespaces of their own (mininodes.sh; needs CAP_SYS_ADMIN and
#                                 CAP_NET_ADMIN); loop: plain daemons, needs no privilege at all
# MINISLURM_EXTRA=...             text appended to slurm.conf
# MINISLURM_INSTALL=1|0           0: never apt-get
# shellcheck disable=SC1090,SC1091,SC2015,SC2046,SC2086
set -u
umask 022
export PATH="$PATH:/usr/sbin:/sbin"
SELF=$(readlink -f "$0")
MODE=${MINISLURM_MODE:-auto} NODES=(node1 node2 node3 node4) ID="" PROCTRACK=linuxproc

die() {
  echo "minislurm: $*" >&2
  if [ -n "${STARTING:-}" ]; then STARTING="" && do_stop; fi
  exit 1
}
note() { echo "minislurm: $*" >&2; }
. "$(dirname "$SELF")/mininodes.sh"

# --- processes, by pid -----------------------------------------------------------
# A pid counts as alive only when it is no zombie: where PID 1 does not reap (containers), `kill -0` succeeds on a dead
# daemon for ever. It is remembered with its start time.
stat_of() {
  local s=""
  { s=$(<"/proc/$1/stat"); } 2>/dev/null
  [ -n "$s" ] || return 1
  set -- ${s##*) }
  echo "$1 ${20}"
}
alive() { local s; s=$(stat_of "$1") && [ "${s%% *}" != Z ] && [ "${s%% *}" != X ]; }
remember() { local s; s=$(stat_of "$2") && echo "$2 ${s#* }" >"$D/run/$1.pid"; }
recall() {
  local pid t s
  { read -r pid t <"$D/run/$1.pid"; } 2>/dev/null || return 1
  s=$(stat_of "$pid") && [ "${s#* }" = "$t" ] && [ "${s%% *}" != Z ] && echo "$pid"
}
wait_for() { # SECONDS CMD...
  local n=$(($1 * 20))
  shift
  while ! "$@"; do
    [ $((n--)) -gt 0 ] || return 1
    sleep 0.05
  done
}
gone() { ! alive "$1"; }
end() { # NAME [SIGNAL]: the remembered process; SIGKILL after 10 s
  local pid
  if pid=$(recall "$1"); then
    kill -"${2:-TERM}" "$pid" 2>/dev/null
    wait_for 10 gone "$pid" || { kill -KILL "$pid" 2>/dev/null; wait_for 5 gone "$pid"; }
  fi
  rm -f "$D/run/$1.pid"
}
launch() { # NAME CMD...: in the background, own session, nothing inherited but the environment
  local name=$1
  shift
  setsid "$@" </dev/null >>"$D/log/$name.out" 2>&1 9>&- &
  remember "$name" $!
}

# --- packages ----------------------------------------------------------------------
install_packages() {
  local pair missing="" sudo="" log
  for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge flock:util-linux ip:iproute2; do
    command -v "${pair%:*}" >/dev/null || missing="$missing ${pair#*:}"
  done
  [ -n "$missing" ] || return 0
  [ "${MINISLURM_INSTALL:-1}" = 1 ] || die "packages missing, and MINISLURM_INSTALL=0:$missing"
  command -v apt-get >/dev/null || die "packages missing, and there is no apt-get:$missing"
  if [ "$(id -u)" != 0 ]; then
    sudo="sudo -n"
    $sudo true 2>/dev/null || die "packages missing, and sudo asks for a password: apt-get install$missing"
  fi
  note "installing$missing"
  log=$(mktemp)
  local options="-q -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=60"
  { $sudo apt-get $options update &&
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get $options install -y --no-install-recommends $missing; } >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; rm -f "$log"; die "apt-get could not install$missing"; }
  rm -f "$log"
}

# --- configuration -------------------------------------------------------------------
write_conf() {
  local me host n
  me=$(id -un)
  host=$(hostname -s 2>/dev/null || hostname) # of this side
  {
    echo "127.0.0.1 localhost"
    echo "$(ctl_ip) ctl"
    if is_netns; then echo "10.77.$ID.253 $host"; fi
    for n in "${NODES[@]}"; do echo "$(ip_of "$n") $n"; done
  } >"$D/hosts"
  { grep -v '^hosts:' /etc/nsswitch.conf 2>/dev/null; echo "hosts: files"; } >"$D/nsswitch.conf"
  : >"$D/resolv.conf"
  cat >"$D/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$(ctl_name)($(ctl_ip))
SlurmctldPort=$(ctl_port)
SlurmUser=$me
SlurmdUser=$me
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
# cred_expire is also how long a requeued job must wait before it starts again (default 120; 2 acts as ~30)
AuthInfo=socket=$D/munge/socket,cred_expire=5
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
# until an unreachable node is DOWN and its jobs are requeued
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
CompleteWait=0
MinJobAge=3600
MaxArraySize=1001
# every start has its own range of job ids: what is kept by job id is not taken for an earlier cluster's
FirstJobId=$(($(date +%s) % 900000 + 1000))
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
$(for n in "${NODES[@]}"; do
    echo "NodeName=$n NodeHostname=$n NodeAddr=$(ip_of "$n") Port=$(port_of "$n") CPUs=4 RealMemory=4000 State=UNKNOWN"
  done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
${MINISLURM_EXTRA:-}
CONF
  # 22.05's slurmd sets the cgroup plugin up even when nothing uses it, and `autodetect` ends it on cgroup v2 and where
  # there are no cgroups. With the v1 plugin named outright it starts in all of these (tried with 22.05 only); the manual
  # has `disabled` from 24.05 on (not tried).
  local plugin=cgroup/v1
  if [ "$PROCTRACK" != cgroup ]; then
    case $(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1) in 1?.* | 20.* | 21.* | 22.* | 23.*) ;; *) plugin=disabled ;; esac
  fi
  printf '%s\n' "CgroupPlugin=$plugin" CgroupMountpoint=/sys/fs/cgroup \
    ConstrainCores=no ConstrainRAMSpace=no ConstrainDevices=no >"$D/cgroup.conf"
}

# --- daemons -----------------------------------------------------------------------
munge_start() {
  mkdir -p "$D/munge"
  (umask 077; head -c 128 /dev/urandom >"$D/munge/key")
  launch munged munged --foreground --force --key-file="$D/munge/key" --socket="$D/munge/socket" \
    --pid-file="$D/run/munged.inner" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" --num-threads=2
  wait_for 10 test -S "$D/munge/socket" || { cat "$D/log/munged.out" >&2; die "munged did not start"; }
}
ctld_start() { # in the controller's own namespaces, but for processes: pids stay ours
  local where=()
  if is_netns; then where=(nsenter -t "$(recall ctl)" -m -u -n --); fi
  launch slurmctld "${where[@]}" slurmctld -D -f "$D/slurm.conf" "$@"
}
ctld_up() { scontrol ping 2>/dev/null | grep -q 'is UP'; }
nodes_up() { [ "$(sinfo -h -N -p main -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l)" = ${#NODES[@]} ]; }
no_jobs() { ! squeue -h -t all -o %T 2>/dev/null | grep -qE 'RUNNING|COMPLETING|SUSPENDED|CONFIGURING'; }
cgroup_gone() {
  find "/sys/fs/cgroup/freezer/ms$ID" -depth -type d -exec rmdir {} + 2>/dev/null
  [ ! -d "/sys/fs/cgroup/freezer/ms$ID" ]
}
do_stop() {
  local n p
  load_settings
  if [ "$MODE" = loop ] && recall slurmctld >/dev/null && ctld_up; then # let Slurm end the jobs
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel -f 2>/dev/null
    wait_for 8 no_jobs || note "jobs left; killing them"
  fi
  end slurmctld
  for n in "${NODES[@]}"; do
    if is_netns; then end "$n" KILL; else end "$n"; fi
  done
  if [ "$MODE" = loop ]; then
    for p in $(stepd_pids) $(job_pids); do kill -9 "$p" 2>/dev/null; done
  fi
  if is_netns && [ -n "$ID" ] && [ -d "/sys/fs/cgroup/freezer/ms$ID" ]; then
    wait_for 3 cgroup_gone || note "left: /sys/fs/cgroup/freezer/ms$ID"
  fi
  end munged
  end ctl
  net_down
  rm -f "$D"/run/*.inner "$D"/run/*.outer "$D/run/settings" "$D/run/starting"
}
load_settings() { [ -r "$D/run/settings" ] && . "$D/run/settings"; }
do_start() {
  local wanted=$MODE n
  do_stop
  MODE=$wanted ID="" PROCTRACK=linuxproc
  install_packages
  case $MODE in
    auto) if can_netns; then MODE=netns; else MODE=loop; fi ;;
    netns) can_netns || die "network namespaces cannot be made here: try MINISLURM_MODE=loop" ;;
    loop) ;;
    *) die "MINISLURM_MODE=$MODE is none of auto, netns, loop" ;;
  esac
  # cgroup kills what a job daemonized, as real clusters do
  if is_netns && [ -w /sys/fs/cgroup/freezer/cgroup.procs ]; then PROCTRACK=cgroup; fi
  rm -rf "$D/ctld" "$D/spool" "$D/log" "$D/nodes" "$D/munge"
  mkdir -p "$D/ctld" "$D/log" "$D/run"
  for n in "${NODES[@]}"; do mkdir -p "$D/spool/$n" "$D/nodes/$n"; done
  trap 'die interrupted' INT TERM HUP
  STARTING=1 # from here on, a failure undoes it all
  : >"$D/run/starting"
  net_up
  echo "MODE=$MODE ID=$ID PROCTRACK=$PROCTRACK" >"$D/run/settings"
  write_conf
  munge_start
  if is_netns; then node_boot ctl; fi
  ctld_start -c
  for n in "${NODES[@]}"; do node_boot "$n"; done
  wait_for 60 ctld_up || { tail -n 10 "$D/log/slurmctld.out" >&2; die "slurmctld did not come up"; }
  wait_for 60 nodes_up || { sinfo -N -l >&2; tail -n 5 "$D"/log/slurmd.*.log >&2; die "nodes did not become idle"; }
  STARTING=""
  rm -f "$D/run/starting"
  note "$(slurmctld -V), $MODE, proctrack/$PROCTRACK, up after $SECONDS s; logs in $D/log"
  printf 'export %s\n' "SLURM_CONF=$D/slurm.conf" "MINISLURM_MODE=$MODE"
}

# --- commands ------------------------------------------------------------------------
cmd=${1:-} D=${2:-} node=${3:-}
case $cmd in
  install) install_packages; exit ;;
  start | stop | node-kill | node-start | link-down | link-up | ctld-kill | ctld-start | __init) ;;
  *) sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$SELF"; exit 2 ;;
esac
[ -n "$D" ] || die "$cmd: which state directory?"
if [ "$cmd" = start ]; then # what is in DIR gets deleted: only ever in a directory of our own
  if [ -n "$(ls -A "$D" 2>/dev/null)" ] && [ ! -e "$D/.minislurm" ]; then die "$D is not empty, and no state directory of mine"; fi
  mkdir -p "$D/run" && : >"$D/.minislurm" || die "cannot write $D"
fi
[ -d "$D/run" ] || { [ "$cmd" = stop ] && exit 0; die "no cluster in $D"; }
D=$(cd "$D" && pwd -P)
[ ${#D} -le 85 ] || die "state directory's path is too long for a unix socket: $D"
export SLURM_CONF="$D/slurm.conf"
if [ "$cmd" = __init ]; then
  load_settings
  node_init "$node"
fi
exec 9>"$D/run/lock"
flock -w 120 9 || die "another minislurm holds $D"
case $cmd in
  start) do_start; exit ;;
  stop) do_stop; exit ;;
esac
load_settings || die "not running in $D"
case $cmd in
  node-* | link-*) [[ " ${NODES[*]} " == *" $node "* ]] || die "no node '$node'" ;;
esac
case $cmd in
  link-*) is_netns || die "nodes have cables in netns mode only" ;;
esac
case $cmd in
  node-kill) node_kill "$node" ;;
  node-start) recall "$node" >/dev/null || node_boot "$node" ;;
  link-down) ip link set "$(veth_of "$node")" down ;;
  link-up) ip link set "$(veth_of "$node")" up ;;
  ctld-kill) end slurmctld KILL ;;
  ctld-start) recall slurmctld >/dev/null || ctld_start; wait_for 60 ctld_up ;;
esac
