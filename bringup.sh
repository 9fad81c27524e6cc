#!/usr/bin/env bash
# Runs a whole store on this machine. USAGE below describes the options.
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=tools.sh
source "$here/tools.sh"
umask 022 # nginx's workers may run as another user

USAGE="Runs a whole store on this machine: installs what is missing, builds mkv, and starts volumes and a master. Ctrl-C
stops them. The volumes answer only what the master has signed with the secret in the data folder.

./bringup.sh [options] [-- flags for the master]

  -d, --data DIR           folder for the index and the volumes (default: $here/data)
  -n, --volumes N          number of volumes (default: 3); each value is stored on three of them, or on all if there
                           are fewer than three
  -p, --port PORT          port of the master (default: 3000)
      --volume-port PORT   port of the first volume (default: 3001); the others use the ports after it
      --bind ADDR          address to listen on (default: 127.0.0.1); clients must be able to reach it, because the
                           master's redirects contain it"

# Sets data, count, port, first_port, bind and master_flags.
read_options() {
  data=$here/data count=3 port=3000 first_port=3001 bind=127.0.0.1
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) printf '%s\n' "$USAGE" && exit ;;
      --) shift && break ;;
      -d | --data | -n | --volumes | -p | --port | --volume-port | --bind) [ -n "${2:-}" ] || fail "$1 needs a value" ;;&
      -d | --data) data=$2 ;;
      -n | --volumes) count=$2 ;;
      -p | --port) port=$2 ;;
      --volume-port) first_port=$2 ;;
      --bind) bind=$2 ;;
      *) fail "unknown option $1: see ./bringup.sh --help" ;;
    esac
    shift 2
  done
  master_flags=("$@")
}

check_options() {
  local number last_port
  for number in "$count" "$port" "$first_port"; do
    if ! [[ $number =~ ^[1-9][0-9]{0,4}$ ]] || ((number > 65535)); then fail "$number is not a number from 1 to 65535"; fi
  done
  last_port=$((first_port + count - 1))
  if ((last_port > 65535 || (first_port <= port && port <= last_port))); then
    fail "the volumes' ports, $first_port to $last_port, include the master's or exceed 65535: set --port or --volume-port"
  fi
  case $bind in
    0.0.0.0 | :: | '[::]' | '*') fail "--bind $bind: redirects contain this address, so choose one that clients can reach" ;;
    *:*) bind="[${bind//[\[\]]/}]" ;;
  esac
}

# Runs before the build, which takes minutes.
check_ports() {
  local i tried
  for ((i = -1; i < count; i++)); do
    tried=$((i < 0 ? port : first_port + i))
    if (exec 3<>"/dev/tcp/${bind//[\[\]]/}/$tried") 2>/dev/null; then
      fail "port $tried is in use: stop the process that uses it (ss -ltnp 'sport = :$tried'), or set --port or --volume-port"
    fi
  done
}

make_data_folder() {
  mkdir -p -- "$data" 2>/dev/null || fail "cannot create $data: choose another folder with --data"
  data=$(realpath -- "$data")
}

# From here on the script stops what it has started when it ends, in whatever way.
prepare_to_stop() {
  pids=()
  declare -gA names # pid: what the process is, for the last message
  ready=$(mktemp)
  trap stop EXIT
  trap 'exit 0' INT TERM HUP
}

# start NAME COMMAND…: starts a child in a session of its own, so that Ctrl-C reaches only this script. If this script is
# killed, the kernel sends the child a SIGTERM.
start() {
  setsid setpriv --pdeathsig TERM -- "${@:2}" </dev/null &
  pids+=("$!")
  names[$!]=$1
}

# Stops the children in reverse order: the master completes its requests before its volumes stop. A second Ctrl-C or
# SIGTERM kills the child that is being stopped.
# shellcheck disable=SC2317 # the trap calls it
stop() {
  local i pid signal
  trap 'kill -KILL -- "-$pid" 2>/dev/null || true' INT TERM HUP
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    pid=${pids[i]}
    for signal in TERM CONT; do kill "-$signal" -- "-$pid" 2>/dev/null || kill "-$signal" "$pid" 2>/dev/null || true; done
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  done
  rm -f -- "$ready"
}

# Builds mkv in a child, so that Ctrl-C stops the build as well.
build() {
  start "the build" "$here/mkv" -version >/dev/null
  wait "${pids[0]}" || fail "the build has failed; the reason is above"
  pids=()
}

# The volumes answer only requests that are signed with it.
make_secret() {
  [ -e "$data/secret" ] || "$here/mkv" secret "$data/secret" || exit 1
}

# Sets volumes, the list for the master.
start_volumes() {
  local i address
  volumes=
  for ((i = 0; i < count; i++)); do
    address=$bind:$((first_port + i))
    volumes+=${volumes:+,}$address
    start "the volume on $address" env PORT="$((first_port + i))" BIND="$bind" SECRET="$data/secret" \
      "$here/volume.sh" "$data/volume$((i + 1))" >"$ready"
    until [ -s "$ready" ]; do
      kill -0 "$!" 2>/dev/null || exit 1 # volume.sh has printed the reason
      sleep 0.05
    done
    cat "$ready" && : >"$ready"
  done
}

start_master() {
  start "the master" "$here/mkv" server -db "$data/index" -volumes "$volumes" -replicas "$((count < 3 ? count : 3))" \
    -secret "$data/secret" -host "${bind//[\[\]]/}" -port "$port" "${master_flags[@]}"
  until curl -q -s --noproxy '*' -o /dev/null --max-time 5 "http://$bind:$port/?list&limit=1"; do
    kill -0 "$!" 2>/dev/null || fail "the master has ended; the reason is above"
    sleep 0.1
  done
}

print_example() {
  cat <<END
master on $bind:$port keeps its index in $data/index

  curl -L -X PUT -d bigswag http://$bind:$port/wehave
  curl -L http://$bind:$port/wehave

Ctrl-C stops the store; its data stays in $data. Other commands of mkv need -secret $data/secret
END
}

wait_for_failure() {
  local ended=
  wait -n -p ended "${pids[@]}" || true
  fail "${names[$ended]} has ended unexpectedly; stopping the store"
}

main() {
  read_options "$@"
  check_options
  install_tools build
  check_ports
  make_data_folder
  prepare_to_stop
  build
  make_secret
  start_volumes
  start_master
  print_example
  wait_for_failure
}

main "$@"
