#!/usr/bin/env bash
# The benchmarks: each measure is a ratio to a limit that is measured in turns with it, the median of
# several rounds. Prints a table and writes bench/RESULTS.md below its notes.
#
#   bench/run.sh [ROUNDS]     ROUNDS: 5
#   PEER=/path/to/mkv PEER_VOLUME=/path/to/volume   another master with the same flags, measured too
#
# It wants a quiet machine. Everything listens on 127.0.0.1 and lies in a temporary folder.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
rounds=${1:-5}
PATH=$PATH:/usr/sbin:/sbin
bin=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}/release
work=$(mktemp -d /tmp/mkv-bench-XXXXXX)
chmod 755 "$work"
pids=()
stop() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; wait 2>/dev/null || true; rm -rf "$work"; }
trap stop EXIT

"$here/mkv" -version >/dev/null
[ -x "$bin/thrasher" ] || (cd "$here" && cargo build --release --workspace)

port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
await() { # URL
  for _ in $(seq 100); do
    if curl -s -o /dev/null "$1"; then return; fi
    sleep 0.1
  done
  echo "bench: $1 does not answer" >&2
  exit 1
}
volume() { # SCRIPT FOLDER PORT
  mkdir -p "$2"
  BIND=127.0.0.1 PORT=$3 "$1" "$2" >"$work/volume-$3.log" 2>&1 &
  pids+=($!)
  await "http://127.0.0.1:$3/"
}
master() { # BINARY NAME VOLUMES: sets `url` and `pid`
  local at
  at=$(port)
  "$1" -db "$work/db-$2" -volumes "$3" -port "$at" server >"$work/master-$2.log" 2>&1 &
  pid=$!
  pids+=("$pid")
  url=http://127.0.0.1:$at
  await "$url/"
}
median() { sort -g | awk '{v[NR]=$1} END{print NR%2 ? v[(NR+1)/2] : (v[NR/2]+v[NR/2+1])/2}'; }
rate() { wrk -t2 -c100 -d3 "$1" | awk '/Requests\/sec/{print $2}'; }
cycles() { "$bin/thrasher" "$@" | awk '/^thats/{sub("/sec","",$2); print $2}'; }
ticks() { awk '{print $14+$15}' "/proc/$1/stat"; }
seconds() { local at=$EPOCHREALTIME; "$@" >/dev/null 2>&1; awk -v a="$at" -v b="$EPOCHREALTIME" 'BEGIN{print b-a}'; }

names=() bases=()
for n in 1 2 3 4 5; do
  at=$(port)
  volume "$here/volume.sh" "$work/v$n" "$at"
  names+=("127.0.0.1:$at") bases+=("http://127.0.0.1:$at")
done
three=$(IFS=,; echo "${names[*]:0:3}")
direct=$(IFS=,; echo "${bases[*]:0:3}")
master "$bin/mkv" mkv "$three"
mkv=$url mkv_pid=$pid
peer=''
if [ -n "${PEER:-}" ]; then
  master "$PEER" peer "$three"
  peer=$url peer_pid=$pid
fi

# A bare nginx that answers 404: the limit of a lookup.
bare=$(port)
cat >"$work/bare.conf" <<END
daemon off; worker_processes 2; pid $work/bare.pid; error_log stderr crit;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 1000000000; server { listen 127.0.0.1:$bare; location / { return 404; } } }
END
nginx -c "$work/bare.conf" 2>/dev/null &
pids+=($!)
await "http://127.0.0.1:$bare/"

table=()
row() { # NAME UNIT OURS LIMIT [PEER]
  local ratio
  ratio=$(awk -v a="$3" -v b="$4" 'BEGIN{printf "%.2f", b>0 ? a/b : 0}')
  table+=("| $1 | $3 $2 | $4 $2 | $ratio | ${5:--} |")
  printf '%-44s %12s  limit %12s  ratio %s  peer %s\n' "$1" "$3" "$4" "$ratio" "${5:--}"
}
compare() { # NAME UNIT, then three commands: ours, the limit, the peer
  local ours=() limit=() other=()
  for _ in $(seq "$rounds"); do
    ours+=("$(eval "$3")") limit+=("$(eval "$4")")
    if [ -n "$peer" ] && [ -n "${5:-}" ]; then other+=("$(eval "$5")"); fi
  done
  row "$1" "$2" "$(printf '%s\n' "${ours[@]}" | median)" "$(printf '%s\n' "${limit[@]}" | median)" \
    "$([ ${#other[@]} -gt 0 ] && printf '%s\n' "${other[@]}" | median || echo -)"
}

curl -s -o /dev/null -X PUT -d value "$mkv/there"
[ -z "$peer" ] || curl -s -o /dev/null -X PUT -d value "$peer/there-too"
blob=$(curl -s -o /dev/null -w '%{redirect_url}' "$mkv/there")

compare 'GET of a missing key' '/s' "rate $mkv/missing" "rate http://127.0.0.1:$bare/" "rate $peer/missing"
compare 'GET of an existing key (limit: GET from nginx)' '/s' "rate $mkv/there" "rate $blob" "rate $peer/there-too"
compare 'write/read/delete, 25 bytes, 16 threads' '/s' \
  "cycles --url $mkv --count 5000" "cycles --direct --url $direct --count 5000" "cycles --url $peer --count 5000"
compare 'write/read/delete, 1 MiB, 16 threads' '/s' \
  "cycles --url $mkv --count 300 --size 1M" "cycles --direct --url $direct --count 300 --size 1M" \
  "cycles --url $peer --count 300 --size 1M"

before=$(ticks "$mkv_pid")
cycles --url "$mkv" --count 10000 >/dev/null
cpu=$(($(ticks "$mkv_pid") - before))
peers_cpu=-
if [ -n "$peer" ]; then
  before=$(ticks "$peer_pid")
  cycles --url "$peer" --count 10000 >/dev/null
  peers_cpu=$(($(ticks "$peer_pid") - before))
fi
row "the master's processor time for 10,000 cycles (limit: the Go master's 5.5 s)" '/100 s' "$cpu" 550 "$peers_cpu"

head -c 1073741824 /dev/urandom >"$work/gib"
put() { curl -s -o /dev/null -f -T "$work/gib" "$1/gib"; curl -s -o /dev/null -X DELETE "$1/gib"; }
puts() {
  local jobs=()
  for base in "${bases[@]:0:3}"; do
    curl -s -o /dev/null -f -T "$work/gib" "$base/aa/bb/gib" &
    jobs+=($!)
  done
  wait "${jobs[@]}"
  for base in "${bases[@]:0:3}"; do curl -s -o /dev/null -X DELETE "$base/aa/bb/gib"; done
}
compare 'PUT of 1 GiB, 3 replicas (limit: three curls)' 's' "seconds put $mkv" 'seconds puts' "seconds put $peer"
row "the master's peak memory after all this" 'MiB' "$(awk '/VmHWM/{print int($2/1024)}' "/proc/$mkv_pid/status")" 64 \
  "$([ -n "$peer" ] && awk '/VmHWM/{print int($2/1024)}' "/proc/$peer_pid/status" || echo -)"

# Rebuild and rebalance of their own.
"$bin/thrasher" --url "$mkv" --count 20000 --keep >/dev/null
kill "$mkv_pid"
while kill -0 "$mkv_pid" 2>/dev/null; do sleep 0.1; done
time=$(seconds "$bin/mkv" -db "$work/db-rebuilt" -volumes "$three" rebuild)
row 'rebuild, 20,000 keys of 3 replicas' 's' "$time" "$time"
five=$(IFS=,; echo "${names[*]}")
time=$(seconds "$bin/mkv" -db "$work/db-mkv" -volumes "$five" -settle 0s rebalance)
row 'rebalance 3 to 5 volumes, 20,000 small keys' 's' "$time" "$time"

{
  [ -f "$here/bench/NOTES.md" ] && cat "$here/bench/NOTES.md"
  printf '\n## %s, %s cores, %s, nginx %s, median of %s\n\n' "$(date -u +%F)" "$(nproc)" "$(uname -sr)" \
    "$(nginx -v 2>&1 | cut -d/ -f2)" "$rounds"
  printf '| measure | mkv | limit | ratio | peer |\n| --- | --- | --- | --- | --- |\n'
  printf '%s\n' "${table[@]}"
} >"$here/bench/RESULTS.md"
