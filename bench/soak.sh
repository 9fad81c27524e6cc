#!/usr/bin/env bash
# A soak: 32 clients write, read and delete values of 100 bytes to 4 MiB, while one of three volumes is restarted
# every minute. Prints the master's memory, threads and descriptors, before, meanwhile and SECONDS after; what grows with
# the minutes is a leak. Ends with `verify -deep`, and with 1 where that or the master's end is not as it should be.
#
#   bench/soak.sh [MINUTES [SECONDS]]     20, 90
#
# What a restarted volume gave no answer to may yet be done, so the cleaner's threads look at it for an hour: with 3,700
# seconds all is as it was.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
minutes=${1:-20} rest=${2:-90}
PATH=$PATH:/usr/sbin:/sbin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
bin=${BIN:-$CARGO_TARGET_DIR/release}
[ -n "${BIN:-}" ] || (cd "$here" && cargo build -q --release --workspace)
work=$(mktemp -d /tmp/mkv-soak-XXXXXX)
chmod 755 "$work"
master='' load='' volumes=()
end() { # PID…: stops processes of ours and waits until they are gone
  for pid in "$@"; do kill "$pid" 2>/dev/null || true; done
  for pid in "$@"; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done
}
stop() {
  touch "$work/over"
  # shellcheck disable=SC2086 # empty where it was not started
  end "${volumes[@]}" $master $load
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
volume() { # N: starts it, again too
  BIND=127.0.0.1 PORT=${ports[$1]} "$here/volume.sh" "$work/volume$1" >>"$work/volume$1.log" 2>&1 &
  volumes[$1]=$!
  until curl -s -o /dev/null "http://127.0.0.1:${ports[$1]}/"; do sleep 0.05; done
}
figures() { # WHEN
  awk -v when="$1" -v fds="$(find "/proc/$master/fd" | wc -l)" \
    -v debris="$(curl -s "$url/?writing" | grep -o '"/' | wc -l)" '
    /^VmRSS|^VmHWM/ {kib[$1] = $2} /^Threads/ {threads = $2}
    END {printf "%-16s %4d MiB (peak %d), %3d threads, %3d descriptors, %4d keys with debris\n", when,
         kib["VmRSS:"] / 1024, kib["VmHWM:"] / 1024, threads, fds, debris}' "/proc/$master/status"
}

ports=("$(port)" "$(port)" "$(port)" "$(port)")
for n in 0 1 2; do mkdir "$work/volume$n" && volume $n; done
flags=(-db "$work/db" -volumes "127.0.0.1:${ports[0]},127.0.0.1:${ports[1]},127.0.0.1:${ports[2]}" -replicas 2)
"$bin/mkv" "${flags[@]}" -host 127.0.0.1 -port "${ports[3]}" server >"$work/master.log" 2>&1 &
master=$!
url=http://127.0.0.1:${ports[3]}
until curl -s -o /dev/null "$url/"; do sleep 0.1; done
"$bin/thrasher" --url "$url" --threads 32 --count 1000 >/dev/null
sleep 15
figures 'at the start'
(
  while [ ! -e "$work/over" ]; do
    # What meets a volume that is down fails; it is told, and the next round goes on.
    "$bin/thrasher" --url "$url" --threads 32 --count 4000 --size 100-4M --reads 0.3 >>"$work/load.log" 2>&1 || true
  done
) &
load=$!
for minute in $(seq "$minutes"); do
  sleep 58
  end "${volumes[minute % 3]}"
  sleep 1
  volume $((minute % 3))
  figures "minute $minute"
done
touch "$work/over"
wait "$load" || true
load=''
figures 'load over'
sleep "$rest"
figures "$rest s later"
awk '/^thats/ {sub("/sec", "", $2); sum += $2; n++} END {print n " rounds of 4,000 cycles, mean " sum / n "/s"}' "$work/load.log"
"$bin/mkv" "${flags[@]}" verify -deep | tail -n 3
kill "$master"
status=0
wait "$master" || status=$?
master=''
echo "the master ended with $status"
[ "$status" = 0 ]
