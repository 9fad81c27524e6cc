#!/usr/bin/env bash
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
usage="A whole store on this machine: installs what is missing, builds, starts volumes and a master; Ctrl-C stops them.

./bringup.sh [options] [-- master's flags]

  -d, --data DIR           where index and volumes lie (default: $here/data)
  -n, --volumes N          how many volumes (default: 3); each value goes to three of them, or to all where they are fewer
  -p, --port PORT          the master's port (default: 3000)
      --volume-port PORT   the first volume's port (default: 3001); the others follow
      --bind ADDR          address to listen on (default: 127.0.0.1); redirects name it, so clients must reach it"
# shellcheck source=tools.sh
source "$here/tools.sh"
umask 022 # nginx's worker may be another user

data=$here/data count=3 port=3000 first=3001 bind=127.0.0.1
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) printf '%s\n' "$usage" && exit ;;
    --) shift && break ;;
    -d | --data | -n | --volumes | -p | --port | --volume-port | --bind) [ -n "${2:-}" ] || fail "$1 needs a value" ;;&
    -d | --data) data=$2 ;;
    -n | --volumes) count=$2 ;;
    -p | --port) port=$2 ;;
    --volume-port) first=$2 ;;
    --bind) bind=$2 ;;
    *) fail "$1 is not known: see ./bringup.sh --help" ;;
  esac
  shift 2
done
for number in "$count" "$port" "$first"; do
  if ! [[ $number =~ ^[1-9][0-9]{0,4}$ ]] || ((number > 65535)); then fail "$number: a number from 1 to 65535 is needed"; fi
done
last=$((first + count - 1))
if ((last > 65535 || (first <= port && port <= last))); then
  fail "the volumes' ports, $first to $last, hold the master's or pass 65535: set --port or --volume-port"
fi
case $bind in
  0.0.0.0 | :: | '[::]' | '*') fail "--bind $bind: redirects carry this address, so name one that clients can reach" ;;
  *:*) bind="[${bind//[\[\]]/}]" ;;
esac

install_tools build
for ((i = -1; i < count; i++)); do # before a build that takes long
  busy=$((i < 0 ? port : first + i))
  if (exec 3<>"/dev/tcp/${bind//[\[\]]/}/$busy") 2>/dev/null; then
    fail "port $busy is in use: stop what listens there (ss -ltnp 'sport = :$busy'), or see --port and --volume-port"
  fi
done
mkdir -p -- "$data" 2>/dev/null || fail "cannot make $data: name a folder of your own with --data"
data=$(realpath -- "$data")

# Each child gets a session of its own, so that Ctrl-C reaches only this script, and a SIGTERM should this script be killed.
pids=() ready=$(mktemp)
declare -A names
start() { # NAME COMMAND…
  setsid setpriv --pdeathsig TERM -- "${@:2}" </dev/null &
  pids+=("$!")
  names[$!]=$1
}
# shellcheck disable=SC2317 # the trap calls it
stop() { # the last one started first: the master, when it has finished its requests, before its volumes
  local i pid
  trap 'kill -KILL -- "-$pid" 2>/dev/null || true' INT TERM HUP # asked a second time
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    pid=${pids[i]}
    for signal in TERM CONT; do kill "-$signal" -- "-$pid" 2>/dev/null || kill "-$signal" "$pid" 2>/dev/null || true; done
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  done
  rm -f -- "$ready"
}
trap stop EXIT
trap 'exit 0' INT TERM HUP

start build "$here/mkv" -version >/dev/null
wait "${pids[0]}" || fail "the master could not be built, for the reason above"
pids=()
volumes=
for ((i = 0; i < count; i++)); do
  address=$bind:$((first + i))
  volumes+=${volumes:+,}$address
  start "the volume on $address" env PORT="$((first + i))" BIND="$bind" "$here/volume.sh" "$data/volume$((i + 1))" >"$ready"
  until [ -s "$ready" ]; do
    kill -0 "$!" 2>/dev/null || exit 1 # it has said why
    sleep 0.05
  done
  cat "$ready" && : >"$ready"
done
start "the master" "$here/mkv" server -db "$data/index" -volumes "$volumes" -replicas "$((count < 3 ? count : 3))" \
  -host "${bind//[\[\]]/}" -port "$port" "$@"
until curl -q -s --noproxy '*' -o /dev/null --max-time 5 "http://$bind:$port/?list&limit=1"; do
  kill -0 "$!" 2>/dev/null || fail "the master has ended, for the reason it gave above"
  sleep 0.1
done
cat <<END
master on $bind:$port keeps its index in $data/index

  curl -L -X PUT -d bigswag http://$bind:$port/wehave
  curl -L http://$bind:$port/wehave

Ctrl-C stops the store; its data stay in $data
END
wait -n -p ended "${pids[@]}" || true
fail "${names[$ended]} has ended by itself: the store is stopped"
