#!/bin/bash
# The router between `edge` and `cloud`: reads a command a line and answers each with `DONE <status>`.
#   router.sh guest|kernel STATE
# `guest`: the first process of a User Mode Linux guest, whose root is the host's file system, read-only.
# `kernel`: a process in a network namespace of a kernel that has sch_netem.
# Ports: edge0 (10.77.1.0/24) and edge1 (10.77.3.0/24) to `edge`, cloud0 (10.77.2.0/24) to `cloud`.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
state=$2
iptables='iptables -w'
DIRECT=251 NOBODY=10.77.255.1  # the filter of what no mapping changes; an address that the edge does not have

if [[ $1 == guest ]]; then
  stty -echo
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  mount -t tmpfs tmpfs /tmp
  mkdir -p /tmp/lib
  ln -s /usr/lib/uml/modules /tmp/lib/modules
  modprobe -a -d /tmp sch_netem sch_tbf sch_ingress cls_flower act_nat iptable_nat iptable_filter xt_nat xt_conntrack \
    ipt_REJECT xt_hashlimit xt_connbytes || echo "a module is missing"
  ip link set vec0 name edge0
  ip link set vec1 name edge1
  ip link set vec2 name cloud0
  state=/tmp iptables='iptables-legacy -w'
  export XTABLES_LOCKFILE=/tmp/xtables.lock
fi
mkfifo "$state/never"
exec {never}<>"$state/never"

# micros SECONDS: with up to six decimals, as a whole number
micros() {
  local whole=${1%.*} part=
  [[ $1 != *.* ]] || part=${1#*.}
  part=${part}000000
  echo $((10#${whole:-0} * 1000000 + 10#${part:0:6}))
}

until_micros() {
  local left=$(($1 - ${EPOCHREALTIME/./}))
  ((left <= 0)) || read -r -t "$((left / 1000000)).$(printf '%06d' $((left % 1000000)))" -u "$never"
}

set_up() {
  ip link set lo up
  ip -batch - <<END || return
link set edge0 address 02:77:00:00:01:fe up
link set edge1 address 02:77:00:00:03:fe up
link set cloud0 address 02:77:00:00:02:fe up
address add 10.77.1.254/24 dev edge0
address add 10.77.3.254/24 dev edge1
address add 10.77.2.254/24 dev cloud0
address add 10.77.2.253/24 dev cloud0
neighbour replace 10.77.1.1 lladdr 02:77:00:00:01:01 dev edge0 nud permanent
neighbour replace 10.77.3.1 lladdr 02:77:00:00:03:01 dev edge1 nud permanent
neighbour replace 10.77.2.1 lladdr 02:77:00:00:02:01 dev cloud0 nud permanent
route add 10.78.0.0/16 via 10.77.1.1 dev edge0
route add 10.79.0.0/16 via 10.77.3.1 dev edge1
END
  tc qdisc add dev edge0 clsact && tc qdisc add dev edge1 clsact || return
  echo 1 >/proc/sys/net/netfilter/nf_conntrack_acct
  for chain in block throttle; do
    $iptables -N $chain && $iptables -A FORWARD -j $chain || return
  done
  $iptables -A INPUT -i cloud0 ! -p icmp -j DROP  # what no mapping takes vanishes
  $iptables -t nat -A POSTROUTING -o cloud0 -s 10.77.1.0/24,10.78.0.0/16 -j SNAT --to-source 10.77.2.254
  $iptables -t nat -A POSTROUTING -o cloud0 -s 10.77.3.0/24,10.79.0.0/16 -j SNAT --to-source 10.77.2.253
  echo 0 | tee "$state/generation" >"$state/mapping"  # the latest, and that in force: 0 for none
  forward 1
}

# shape "<netem toward the edge>" "<netem toward the cloud>"
shape() {
  stop "$trace"
  trace=
  tc qdisc replace dev edge0 root netem $1 && tc qdisc replace dev edge1 root netem $1 &&
    tc qdisc replace dev cloud0 root netem $2
}

# trace FILE "<netem toward the edge, but the rate>" "<… the cloud …>": FILE has `down up` in kbit/s for each 100 ms.
# netem decides when a packet leaves as it arrives, so a token bucket before it has the rate; netem's keeps the order.
trace() {
  stop "$trace"
  trace=
  local -a rates
  mapfile -t rates <"$1"
  bucket replace "${rates[0]}" | tc -batch - || return
  for port in edge0 edge1; do tc qdisc replace dev $port parent 1: netem $2 rate 1gbit || return; done
  tc qdisc replace dev cloud0 parent 1: netem $3 rate 1gbit || return
  {
    local next=${EPOCHREALTIME/./} at=0
    while true; do
      ((next += 100000))
      until_micros $next
      bucket change "${rates[++at % ${#rates[@]}]}"
    done
  } 2>&1 | tc -force -batch - &
  trace=$!
}

# bucket replace|change "<down> <up>": tc's commands
bucket() {
  local down=${2% *} up=${2#* }
  for port in edge0 edge1; do
    echo "qdisc $1 dev $port root handle 1: tbf rate ${down}kbit burst $((3000 + down / 4)) limit 1000000"
  done
  echo "qdisc $1 dev cloud0 root handle 1: tbf rate ${up}kbit burst $((3000 + up / 4)) limit 1000000"
}

stop() { [[ -z $1 ]] || kill "$1" 2>/dev/null; }

# schedule AT EVERY TIMES COMMAND…: the first after AT seconds; with 0 now, and its status is the answer
schedule() {
  local next=${EPOCHREALTIME/./} every left=$3
  every=$(micros "$2")
  if [[ $1 == 0 ]]; then
    "${@:4}" || return
    ((--left)) || return 0
    ((next += every))
  else
    ((next += $(micros "$1")))
  fi
  (
    until_micros $next
    while "${@:4}" && ((--left)); do
      ((next += every))
      until_micros $next
    done
  ) &
  jobs+=($!)
}

forward() { echo "$1" >/proc/sys/net/ipv4/ip_forward; }

# rebind [silent]: UDP from the edge gets a mapping with another port, since it comes from another address inside.
# What still comes to the old port is delivered, or with `silent` sent to nobody; all in one go, since each command
# takes a guest a tenth of a second.
rebind() {
  local old=$(<"$state/mapping") generation=$(($(<"$state/generation") % 250 + 1)) port inside outside before which
  echo $generation | tee "$state/generation" >"$state/mapping"
  for port in 0 1; do
    inside=10.$((78 + port)).$generation.1 outside=10.77.$((1 + 2 * port)).1
    echo "filter replace dev edge$port egress protocol ip prio $generation handle 1 flower dst_ip $inside \
      action nat ingress $inside/32 $outside"
    echo "filter replace dev edge$port ingress protocol ip prio 1 handle 1 flower ip_proto udp \
      action nat egress $outside/32 $inside"
    [[ -n $1 ]] || continue
    before=10.$((78 + port)).$old.1 which="prio $old handle 1 flower"
    ((old)) || before=$outside which="prio $DIRECT handle 1 flower ip_proto udp"
    echo "filter replace dev edge$port egress protocol ip $which dst_ip $before action nat ingress $before/32 $NOBODY"
  done | tc -batch -
}

# block_udp AFTER [icmp]: every flow's datagrams after so many, both ways together
block_udp() {
  $iptables -F block
  local -a which=(-p udp)
  (($1 == 0)) || which+=(-m connbytes --connbytes "$(($1 + 1)):" --connbytes-dir both --connbytes-mode packets)
  [[ -z $2 ]] || $iptables -A block "${which[@]}" -o cloud0 -j REJECT --reject-with icmp-admin-prohibited
  $iptables -A block "${which[@]}" -j DROP
}

# throttle_udp BYTES A SECOND: what is above is dropped, each way for itself; a second's worth may come at once
throttle_udp() {
  $iptables -F throttle
  for port in edge+ cloud0; do
    $iptables -A throttle -p udp -o "$port" -m hashlimit --hashlimit-above "$1b/s" --hashlimit-burst "$1b" \
      --hashlimit-name "udp${port%+}" -j DROP || return
  done
}

# mtu BYTES|"": of the path, with ICMP; none: as the ports are
mtu() {
  local lock=${1:+mtu lock $1}
  ip -batch - <<END
route replace 10.77.1.0/24 dev edge0 proto kernel scope link src 10.77.1.254 $lock
route replace 10.77.3.0/24 dev edge1 proto kernel scope link src 10.77.3.254 $lock
route replace 10.77.2.0/24 dev cloud0 proto kernel scope link src 10.77.2.254 $lock
route replace 10.78.0.0/16 via 10.77.1.1 dev edge0 $lock
route replace 10.79.0.0/16 via 10.77.3.1 dev edge1 $lock
END
}

restore() {
  local job chain port
  for job in "${jobs[@]}"; do stop "$job"; done
  jobs=()
  forward 1
  for chain in block throttle; do $iptables -F $chain; done
  for port in edge0 edge1; do
    tc filter del dev $port ingress 2>/dev/null
    tc filter del dev $port egress protocol ip prio $DIRECT 2>/dev/null
  done
  echo 0 >"$state/mapping"
  mtu ""
}

jobs=() trace=
set_up
echo "DONE $?"
while read -r line; do
  eval "$line"
  echo "DONE $?"
done
