# shellcheck shell=bash
# What minislurm.sh needs of the machine: addresses, the network, and nodes that can be powered off.
#
# netns: the controller has a network of its own, a node also its own processes, host name, /dev/shm and /tmp/ray. SIGKILL
#        of a node's first process takes the node, its jobs and its cable with it.
# loop:  plain daemons on ports of 127.77.x.y; nodes are told apart by the environment of their processes.

can_netns() {
  [ "$(id -u)" = 0 ] && command -v ip >/dev/null && command -v nsenter >/dev/null || return 1
  local t="mst$$" rc
  unshare --mount --net --pid --fork --uts --ipc --propagation private true 2>/dev/null || return 1
  ip link add "$t" type bridge 2>/dev/null || return 1
  ip link add "${t}a" type veth peer name "${t}b" 2>/dev/null
  rc=$?
  ip link del "${t}a" 2>/dev/null
  ip link del "$t" 2>/dev/null
  return $rc
}

# --- addresses; ID is the number of this cluster -------------------------------
is_netns() { [ "$MODE" = netns ]; }
ip_of() { if is_netns; then echo "10.77.$ID.${1#node}"; else echo "127.77.$ID.${1#node}"; fi; }
ctl_ip() { if is_netns; then echo "10.77.$ID.254"; else echo 127.0.0.1; fi; }
ctl_name() { if is_netns; then echo ctl; else echo localhost; fi; }
# below those that the runs' jobs take for Ray
ctl_port() { if is_netns; then echo 6817; else echo $((3000 + ID * 10)); fi; }
port_of() { if is_netns; then echo 6818; else echo $((3000 + ID * 10 + ${1#node})); fi; }
veth_of() { echo "ms${ID}${1/node/n}"; }
port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# --- network -------------------------------------------------------------------
claim() { # this ID's ports, against another start at the same moment
  local c=/tmp/.minislurm.$ID o=""
  mkdir "$c" 2>/dev/null && { echo "$D" >"$c/dir"; return 0; }
  sleep 0.1
  { o=$(<"$c/dir"); } 2>/dev/null
  if [ "$o" != "$D" ] && { [ -e "$o/run/settings" ] || [ -e "$o/run/starting" ]; }; then return 1; fi # in use
  rm -rf "$c" 2>/dev/null
  mkdir "$c" 2>/dev/null && echo "$D" >"$c/dir" # left behind
}
unclaim() {
  if [ "$(cat "/tmp/.minislurm.$ID/dir" 2>/dev/null)" = "$D" ]; then rm -rf "/tmp/.minislurm.$ID"; fi
}
free_ports() {
  local port node
  for port in $(ctl_port) $(for node in "${NODES[@]}"; do port_of "$node"; done); do
    if port_taken "$port"; then return 1; fi
  done
}
net_up() { # picks a free ID
  for ID in {1..250}; do
    if is_netns; then
      ip link add "ms$ID" type bridge 2>/dev/null && break
    elif claim; then
      free_ports && return
      unclaim
    fi
    [ "$ID" != 250 ] || { ID=""; die "no free number"; }
  done
  ip link set "ms$ID" alias "minislurm $D"
  sysctl -qw "net.ipv6.conf.ms$ID.disable_ipv6=1" 2>/dev/null
  ip addr add "10.77.$ID.253/24" dev "ms$ID" # this side, from which jobs are submitted
  ip link set "ms$ID" up
  # should the bridge vanish, nothing meant for it leaves this machine
  ip route add blackhole "10.77.$ID.0/24" metric 4000 2>/dev/null
}
net_down() {
  is_netns || { [ -z "$ID" ] || unclaim; return 0; }
  local b v
  # ours, however it was left: the alias names the state directory
  for b in /sys/class/net/ms*; do
    [ "$(cat "$b/ifalias" 2>/dev/null)" = "minislurm $D" ] || continue
    for v in "$b"/brif/*; do ip link del "${v##*/}" 2>/dev/null; done
    b=${b##*/}
    ip link del "$b" 2>/dev/null
    ip route del blackhole "10.77.${b#ms}.0/24" metric 4000 2>/dev/null
  done
}

# --- nodes -----------------------------------------------------------------------
node_init() { # first process of a node, or of the controller
  local node=$1 pid _
  read -r pid _ </proc/self/stat # /proc is still the outer one: this is our pid outside
  echo "$pid" >"$D/run/$node.outer.tmp"
  hostname "$node"
  mount --bind "$D/hosts" /etc/hosts
  # names come from that file only: a DNS query would wait 5 s for an answer that cannot come
  [ -e /etc/nsswitch.conf ] && mount --bind "$D/nsswitch.conf" /etc/nsswitch.conf
  [ -e /etc/resolv.conf ] && mount --bind "$D/resolv.conf" /etc/resolv.conf
  if [ "$node" != ctl ]; then
    mount -t proc proc /proc
    if [ "$PROCTRACK" = cgroup ]; then # a part of the tree for this cluster alone
      mkdir -p "/sys/fs/cgroup/freezer/ms$ID"
      mount --bind "/sys/fs/cgroup/freezer/ms$ID" /sys/fs/cgroup/freezer
    fi
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mkdir -p /tmp/ray "$D/nodes/$node/tmp/ray"
    chmod 1777 "$D/nodes/$node/tmp/ray"
    mount --bind "$D/nodes/$node/tmp/ray" /tmp/ray
  fi
  mv "$D/run/$node.outer.tmp" "$D/run/$node.outer"
  trap 'exit 0' TERM
  while :; do sleep 3600 & wait $!; done # bash reaps whatever is orphaned here
}
node_boot() {
  local n=$1 pid v own=(--ipc --pid --fork --kill-child)
  is_netns || { slurmd_start "$n"; return; }
  [ "$n" = ctl ] && own=()
  rm -f "$D/run/$n.outer"
  setsid unshare --mount --net --uts "${own[@]}" --propagation private \
    "$SELF" __init "$D" "$n" </dev/null >>"$D/log/$n.out" 2>&1 9>&- &
  wait_for 10 test -s "$D/run/$n.outer" || { cat "$D/log/$n.out" >&2; die "$n did not boot"; }
  pid=$(<"$D/run/$n.outer")
  remember "$n" "$pid"
  v=$(veth_of "$n")
  ip link del "$v" 2>/dev/null
  ip link add "$v" type veth peer name eth0 netns "$pid" || die "no veth for $n"
  ip link set "$v" master "ms$ID" up
  sysctl -qw "net.ipv6.conf.$v.disable_ipv6=1" 2>/dev/null
  local address
  address=$(if [ "$n" = ctl ]; then ctl_ip; else ip_of "$n"; fi)
  nsenter -t "$pid" -n sh -c "
    sysctl -qw net.ipv6.conf.all.disable_ipv6=1 2>/dev/null
    ip link set lo up; ip addr add $address/24 dev eth0; ip link set eth0 up
    # a default route that leads nowhere: programs that ask the kernel for 'my address'
    # by connecting a UDP socket to some public address get the node's own; nothing leaves
    ip link add sink type bridge && ip link set sink up && ip route add default dev sink src $address" ||
    die "no network for $n"
  [ "$n" = ctl ] || slurmd_start "$n"
}
slurmd_start() {
  local n=$1 pid
  if is_netns; then
    pid=$(recall "$n")
    nsenter -t "$pid" -m -u -i -n -p -- env -i PATH="$PATH" HOME=/root slurmd -N "$n" -f "$D/slurm.conf" \
      >>"$D/log/$n.out" 2>&1 9>&- </dev/null || { tail -n 5 "$D/log/$n.out" "$D/log/slurmd.$n.log" >&2; die "slurmd of $n"; }
  else
    launch "$n" env -i PATH="$PATH" HOME="$HOME" slurmd -D -N "$n" -f "$D/slurm.conf"
  fi
}
job_pids() { # job processes of this cluster (on node $1), by their environment
  local e p
  for e in /proc/[0-9]*/environ; do
    p=${e#/proc/}
    p=${p%/environ}
    [ "$p" != $$ ] || continue
    { tr '\0' '\n' <"$e"; } 2>/dev/null | awk -v c="SLURM_CONF=$D/slurm.conf" -v n="SLURMD_NODENAME=${1:-}" -v any="${1:+0}" '
      $0==c {a=1} index($0,"SLURMD_NODENAME=")==1 {b = (any=="") || $0==n} END {exit !(a&&b)}' && echo "$p"
  done
}
stepd_pids() { # a slurmstepd's own environment has no SLURMD_NODENAME
  local e p
  for e in /proc/[0-9]*/comm; do
    p=${e#/proc/}
    p=${p%/comm}
    case $(cat "$e" 2>/dev/null) in slurmstepd*) ;; *) continue ;; esac
    { tr '\0' '\n' <"/proc/$p/environ"; } 2>/dev/null | grep -qx "SLURM_CONF=$D/slurm.conf" && echo "$p"
  done
}
node_kill() {
  local n=$1 p parent
  end "$n" KILL
  if is_netns; then
    rm -f "$D/run/$n.outer"
    ip link del "$(veth_of "$n")" 2>/dev/null
    return 0
  fi
  for p in $(job_pids "$n"); do # the tasks, and the slurmstepd above each
    parent=$(awk '/^PPid/{print $2}' "/proc/$p/status" 2>/dev/null)
    case $(cat "/proc/$parent/comm" 2>/dev/null) in slurmstepd*) kill -9 "$parent" 2>/dev/null ;; esac
    kill -9 "$p" 2>/dev/null
  done
  return 0
}
