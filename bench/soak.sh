#!/usr/bin/env bash
# Soak test: 32 clients write, read and delete values of 100 bytes to 4 MiB, while every minute one of three volumes is
# restarted. Prints the master's memory, threads and descriptors at the start, every minute, and SECONDS after the load has
# ended. A figure that keeps growing is a leak. Ends with `verify -deep`. The exit status is 1 if the store is not whole or
# the master did not end with 0.
#
#   bench/soak.sh [MINUTES [SECONDS]]     20, 90
#
# A request that a restarted volume did not answer may still take effect, so the master's cleaner retries for an hour.
# After 3,700 SECONDS, the figures are those of the start again.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
minutes=${1:-20} rest=${2:-90}
PATH=$PATH:/usr/sbin:/sbin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
bin=${BIN:-$CARGO_TARGET_DIR/release}

prepare() {
  if [ -z "${BIN:-}" ]; then (cd "$here" && cargo build -q --release --workspace); fi
  work=$(mktemp -d /tmp/mkv-soak-XXXXXX)
  chmod 755 "$work"
  master='' load='' volumes=()
  trap clean_up EXIT
  trap 'exit 130' INT TERM
}

clean_up() {
  touch "$work/over"
  # shellcheck disable=SC2086 # empty if not started
  end "${volumes[@]}" $master $load
  rm -rf "$work"
}

# end PID…: stops processes of this script and waits until they have ended.
end() {
  local pid
  for pid in "$@"; do kill "$pid" 2>/dev/null || true; done
  for pid in "$@"; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done
}

# Prints a free port.
port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }

# start_volume N: starts or restarts it.
start_volume() {
  BIND=127.0.0.1 PORT=${ports[$1]} "$here/volume.sh" "$work/volume$1" >>"$work/volume$1.log" 2>&1 &
  volumes[$1]=$!
  until curl -s -o /dev/null "http://127.0.0.1:${ports[$1]}/"; do sleep 0.05; done
}

# Sets master, url, and flags for mkv.
start_store() {
  local n
  ports=("$(port)" "$(port)" "$(port)" "$(port)")
  for n in 0 1 2; do mkdir "$work/volume$n" && start_volume "$n"; done
  flags=(-db "$work/db" -volumes "127.0.0.1:${ports[0]},127.0.0.1:${ports[1]},127.0.0.1:${ports[2]}" -replicas 2)
  "$bin/mkv" "${flags[@]}" -host 127.0.0.1 -port "${ports[3]}" server >"$work/master.log" 2>&1 &
  master=$!
  url=http://127.0.0.1:${ports[3]}
  until curl -s -o /dev/null "$url/"; do sleep 0.1; done
  "$bin/thrasher" --url "$url" --threads 32 --count 1000 >/dev/null
  sleep 15
}

# print_figures WHEN
print_figures() {
  awk -v when="$1" -v fds="$(find "/proc/$master/fd" | wc -l)" \
    -v debris="$(curl -s "$url/?writing" | grep -o '"/' | wc -l)" '
    /^VmRSS|^VmHWM/ {kib[$1] = $2} /^Threads/ {threads = $2}
    END {printf "%-16s %4d MiB (peak %d), %3d threads, %3d descriptors, %4d keys with debris\n", when,
         kib["VmRSS:"] / 1024, kib["VmHWM:"] / 1024, threads, fds, debris}' "/proc/$master/status"
}

# Runs until $work/over exists. Requests to a volume that is down fail, so an unsuccessful round does not end the load.
run_load() {
  while [ ! -e "$work/over" ]; do
    "$bin/thrasher" --url "$url" --threads 32 --count 4000 --size 100-4M --reads 0.3 >>"$work/load.log" 2>&1 || true
  done
}

restart_volumes_under_load() {
  local minute
  run_load &
  load=$!
  for ((minute = 1; minute <= minutes; minute++)); do
    sleep 58
    end "${volumes[minute % 3]}"
    sleep 1
    start_volume $((minute % 3))
    print_figures "minute $minute"
  done
  touch "$work/over"
  wait "$load" || true
  load=''
}

stop_master() {
  local status=0
  kill "$master"
  wait "$master" || status=$?
  master=''
  echo "the master ended with $status"
  [ "$status" = 0 ]
}

main() {
  prepare
  start_store
  print_figures 'at the start'
  restart_volumes_under_load
  print_figures 'load over'
  sleep "$rest"
  print_figures "$rest s later"
  awk '/^thats/ {sub("/sec", "", $2); sum += $2; n++} END {print n " rounds of 4,000 cycles, mean " sum / n "/s"}' "$work/load.log"
  "$bin/mkv" "${flags[@]}" verify -deep | tail -n 3
  stop_master
}

main
