#!/usr/bin/env bash
# The benchmarks: each measure is a ratio to a limit that is measured in turns with it, the median of
# several rounds. Prints a table and writes bench/RESULTS.md: bench/NOTES.md, and the table below it.
#
#   bench/run.sh [ROUNDS] [MEASURE…]     5 rounds; idle get cycles big latency index rebuild rebalance
#   PEER=/path/to/mkv                    another master with the same flags, measured too
#   PEER_VOLUME=/path/to/volume          the script that starts its volumes (without: mkv's own)
#   KEYS=50000000                        keys of the large index
#
# It wants a quiet machine and some 30 GB in ${TMPDIR:-/tmp}. Everything listens on 127.0.0.1.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
rounds=${1:-5}
measures=${*:2}
measures=${measures:-idle get cycles big latency index rebuild rebalance}
keys=${KEYS:-50000000}
PATH=$PATH:/usr/sbin:/sbin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
bin=$CARGO_TARGET_DIR/release
(cd "$here" && cargo build -q --release --workspace)
work=$(mktemp -d "${TMPDIR:-/tmp}/mkv-bench-XXXXXX")
chmod 755 "$work"
pids=()
end() { # PID…: stops processes of ours and waits until they are gone
  for pid in "$@"; do kill "$pid" 2>/dev/null || true; done
  for pid in "$@"; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done
}
stop() {
  end "${pids[@]}"
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

wanted() { [[ " $measures " == *" $1 "* ]]; }
port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
await() { # URL
  for _ in $(seq 100); do
    if curl -s -o /dev/null "$1"; then return; fi
    sleep 0.1
  done
  echo "bench: $1 does not answer" >&2
  tail -n 3 "$work"/*.log >&2
  exit 1
}
volume() { # SCRIPT FOLDER PORT
  mkdir -p "$2"
  BIND=127.0.0.1 PORT=$3 "$1" "$2" >"$work/volume-$3.log" 2>&1 &
  pids+=($!)
  await "http://127.0.0.1:$3/"
}
volumes() { # SCRIPT NAME COUNT: sets `names`
  names=()
  for n in $(seq "$3"); do
    local at
    at=$(port)
    volume "$1" "$work/$2-$n" "$at"
    names+=("127.0.0.1:$at")
  done
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
rate() { wrk -t2 -c100 -d3 "$@" | awk '/Requests\/sec/{print $2}'; }
cycles() { "$bin/thrasher" "$@" | awk '/^thats/{sub("/sec","",$2); print $2}'; }
peak() { awk '/VmHWM/{print int($2/1024)}' "/proc/$1/status"; }
seconds() {
  local at=$EPOCHREALTIME
  "$@" >/dev/null 2>&1
  awk -v a="$at" -v b="$EPOCHREALTIME" 'BEGIN{printf "%.3f", b-a}'
}
cpu() { # PID COMMAND…: hundredths of a second that the process took meanwhile
  local before after
  before=$(awk '{print $14+$15}' "/proc/$1/stat")
  "${@:2}" >/dev/null
  after=$(awk '{print $14+$15}' "/proc/$1/stat")
  echo $((after - before))
}

table=()
row() { # up|down NAME UNIT OURS LIMIT [PEER]: up: more is better
  local line
  line=$(awk -v better="$1" -v name="$2" -v unit="$3" -v ours="$4" -v limit="$5" -v peer="${6:--}" -v old="$here/bench/RESULTS.md" '
    BEGIN {
      ratio = limit > 0 ? ours / limit : 0; beside = peer + 0 > 0 ? sprintf("%.2f", ours / peer) : "-"
      FS = " *[|] *"
      while ((getline < old) > 0) if ($2 == name) was = $5
      worse = was + 0 > 0 && (better == "up" ? ratio < was * 0.9 : ratio > was * 1.1)
      printf "| %s | %s %s | %s %s | %.2f | %s | %s |%s", name, ours, unit, limit, unit, ratio, peer, beside, worse ? " worse, was " was : ""
    }')
  table+=("$line")
  echo "$line"
}
compare() { # up|down NAME UNIT, then commands: ours, the limit, the peer
  local ours=() limit=() other=()
  for _ in $(seq "$rounds"); do
    ours+=("$(eval "$4")") limit+=("$(eval "$5")")
    if [ -n "$peer" ] && [ -n "${6:-}" ]; then other+=("$(eval "$6")"); fi
  done
  row "$1" "$2" "$3" "$(printf '%s\n' "${ours[@]}" | median)" "$(printf '%s\n' "${limit[@]}" | median)" \
    "$([ ${#other[@]} -gt 0 ] && printf '%s\n' "${other[@]}" | median || echo -)"
}

volumes "$here/volume.sh" v 5
three=$(IFS=,; echo "${names[*]:0:3}")
five=$(IFS=,; echo "${names[*]}")
own=("${names[@]}")
direct=http://${three//,/,http://}
master "$bin/mkv" mkv "$three"
mkv=$url mkv_pid=$pid
peer=''
if [ -n "${PEER:-}" ]; then
  [ -z "${PEER_VOLUME:-}" ] || volumes "$PEER_VOLUME" peer 3
  master "$PEER" peer "$(IFS=,; echo "${names[*]:0:3}")"
  peer=$url peer_pid=$pid
fi
head -c 1073741824 /dev/urandom >"$work/gib"

if wanted idle; then
  compare down 'processor time of the idle master in 20 s (limit: 1 % of a core)' '/100 s' "cpu $mkv_pid sleep 20" 'echo 20'
  for at in "$mkv" "${names[@]/#/http://}"; do # of one address no more than 14,000 are kept
    if [ "$(awk '/^TCP:/{print $7}' /proc/net/sockstat)" -lt 22000 ]; then
      wrk -t2 -c100 -d4 -H 'Connection: close' "$at/missing" >/dev/null
    fi
  done
  sleep 10
  compare down 'the same in 5 s beside 20,000 sockets in TIME_WAIT (limit: 1 % of a core)' '/100 s' \
    "cpu $mkv_pid sleep 5" 'echo 5'
fi

if wanted get; then
  bare=$(port) # a bare nginx that answers 404: the limit of a lookup
  cat >"$work/bare.conf" <<END
daemon off; worker_processes 2; pid $work/bare.pid; error_log stderr crit;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 1000000000; server { listen 127.0.0.1:$bare; location / { return 404; } } }
END
  nginx -c "$work/bare.conf" 2>/dev/null &
  pids+=($!)
  await "http://127.0.0.1:$bare/"
  for at in $mkv $peer; do curl -s -o /dev/null -X PUT -d value "$at/there"; done
  blob=$(curl -s -o /dev/null -w '%{redirect_url}' "$mkv/there")
  compare up 'GET of a missing key (limit: nginx, return 404)' /s \
    "rate $mkv/missing" "rate http://127.0.0.1:$bare/" "rate $peer/missing"
  compare up 'GET of an existing key (limit: GET of its blob)' /s \
    "rate $mkv/there" "rate $blob" "rate $peer/there"
fi

if wanted cycles; then
  compare up 'write/read/delete of 25 bytes, 16 threads (limit: straight to the volumes)' /s \
    "cycles --url $mkv --count 4000" "cycles --direct --url $direct --count 4000" "cycles --url $peer --count 4000"
  # shellcheck disable=SC2016 # for eval, later
  compare down 'processor time of the master for 10,000 cycles (limit: 5.5 s)' '/100 s' \
    'cpu $mkv_pid "$bin/thrasher" --url $mkv' 'echo 550' 'cpu $peer_pid "$bin/thrasher" --url $peer'
  compare up 'write/read/delete of 1 MiB, 16 threads (limit: straight to the volumes)' /s \
    "cycles --url $mkv --count 300 --size 1M" "cycles --direct --url $direct --count 300 --size 1M" \
    "cycles --url $peer --count 300 --size 1M"
fi

if wanted big; then
  put() { curl -s -f -T "$work/gib" "$1/gib"; }
  puts() {
    local jobs=()
    for name in "${own[@]:0:3}"; do
      curl -s -f -T "$work/gib" "http://$name/aa/bb/gib" &
      jobs+=($!)
    done
    wait "${jobs[@]}"
  }
  clear() { # after each, so that none writes over another's blocks
    for at in "$mkv/gib" ${peer:+"$peer/gib"} "${own[@]/%//aa/bb/gib}"; do curl -s -o /dev/null -X DELETE "$at"; done
    sync
  }
  compare down 'PUT of 1 GiB, 3 replicas (limit: three curls)' s \
    "seconds put $mkv; clear" 'seconds puts; clear' "seconds put $peer; clear"
  row down 'peak memory of the master in all of the above (limit: 64 MiB)' MiB "$(peak "$mkv_pid")" 64 \
    "$([ -z "$peer" ] || peak "$peer_pid")"
fi

if wanted latency; then
  near=()
  for name in "${own[@]:0:3}"; do
    at=$(port)
    "$bin/mkv-bench" delay "$at" "${name#*:}" &
    pids+=($!)
    near+=("127.0.0.1:$at")
    await "http://127.0.0.1:$at/"
  done
  master "$bin/mkv" far "$(IFS=,; echo "${near[*]}")"
  p50() { "$bin/thrasher" --url "$1" --threads 1 --count 200 --json | python3 -c "import json,sys; print(json.load(sys.stdin)['$2']['p50_us'] / 1000)"; }
  trip() { wrk -t1 -c1 -d1 --latency "http://${near[0]}/missing" | awk '/ 50%/{print $2+0, $2}' | awk '{print $2 ~ /us/ ? $1/1000 : $1}'; }
  compare down 'PUT at 1 ms to each volume, p50 (limit: one round trip)' ms "p50 $url write" trip
  compare down 'DELETE at 1 ms to each volume, p50 (limit: one round trip)' ms "p50 $url delete" trip
  end "$pid"
fi

if wanted index; then
  cat >"$work/random.lua" <<'END'
local n, last
function init(arguments) n, last = tonumber(arguments[1]), arguments[2]; math.randomseed(os.time()) end
function request() return wrk.format("GET", string.format("/bench/%09d%s", math.random(0, n / 10 - 1), last)) end
END
  for n in 100000 "$keys"; do
    "$bin/mkv-bench" index "$work/db-$n" "$n"
    master "$bin/mkv" "$n" "$three"
    declare "url_$n=$url" "pid_$n=$pid" "bytes_$n=$(du -sb "$work/db-$n/index" | cut -f1)"
  done
  small=url_100000 large=url_$keys large_pid=pid_$keys bytes=bytes_$keys
  # Odd keys are unlinked: their record is read, and no volume asked. Letters follow no key.
  lookup() { rate -s "$work/random.lua" "$1" -- "$2" "$3"; }
  page() { # URL KEYS
    local start
    start=$(printf %010d $((RANDOM * 30000 % ($2 - 3000))))
    wrk -t1 -c1 -d2 "$1/bench/?list&limit=1000&start=/bench/$start" | awk '/Requests\/sec/{print $2}'
  }
  compare up "GET of a random missing key among $keys (limit: among 100,000)" /s \
    "lookup ${!large} $keys x" "lookup ${!small} 100000 x"
  compare up "GET of a random existing record among $keys (limit: among 100,000)" /s \
    "lookup ${!large} $keys 1" "lookup ${!small} 100000 1"
  compare up "?list&limit=1000 among $keys (limit: among 100,000)" /s "page ${!large} $keys" "page ${!small} 100000"
  row down "peak memory of the master with $keys keys (limit: 1 GiB)" MiB "$(peak "${!large_pid}")" 1024
  row down "index on disk, bytes a key (limit: 17 of key, 144 of record)" B "$((${!bytes} / keys))" 161
  end "${!large_pid}"
  rm -rf "$work/db-$keys"
fi

if wanted rebuild; then
  # 200,000 keys of 3 replicas, written straight into the volumes' folders, and nothing else in them:
  # what other measures left behind would be listed and not counted.
  rm -rf "$work"/v-*/sv*
  python3 - "$work"/v-{1,2,3} <<'END'
import base64, hashlib, os, sys
for n in range(200000):
    key = b"/bench/%d" % n
    md5 = hashlib.md5(key).hexdigest()
    name = base64.b64encode(key).decode()
    for volume in sys.argv[1:]:
        folder = f"{volume}/{md5[:2]}/{md5[2:4]}"
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/{name}", "w") as blob:
            blob.write("value")
END
  sync
  find "$work/v-1" -mindepth 2 -maxdepth 2 -type d -printf '/%P/\n' | shuf -n 20000 >"$work/folders"
  cat >"$work/folders.lua" <<END
local paths, n = {}, 0
function init() for line in io.lines("$work/folders") do paths[#paths + 1] = line end end
function request() n = n % #paths + 1; return wrk.format("GET", paths[n]) end
END
  folders=$(find "$work"/v-{1,2,3} -mindepth 2 -maxdepth 2 -type d | wc -l)
  rebuild() {
    rm -rf "$work/db-rebuilt"
    seconds "$bin/mkv" -db "$work/db-rebuilt" -volumes "$three" -subvolumes 1 rebuild
  }
  listings() { wrk -t2 -c16 -d3 -s "$work/folders.lua" "http://${own[0]}" | awk '/Requests\/sec/{print $2}'; }
  compare up 'rebuild of 200,000 keys of 3 replicas, listings a second (limit: wrk on listings)' /s \
    "rebuild | awk '{print $folders / \$1}'" listings
  rm -rf "$work"/v-{1,2,3}/??
fi

if wanted rebalance; then
  end "$mkv_pid"
  for at in "$work"/v-*; do find "$at" -mindepth 1 -maxdepth 1 -not -name '.*' -exec rm -rf {} +; done
  rm -rf "$work/db-mkv"
  master "$bin/mkv" mkv "$three"
  "$bin/thrasher" --url "$url" --count 2000 --size 1M --keep >/dev/null
  end "$pid"
  # Forth, measured, and back.
  rebalance() {
    per_second "$copies" "$bin/mkv" -db "$work/db-mkv" -volumes "$five" -settle 0s rebalance
    "$bin/mkv" -db "$work/db-mkv" -volumes "$three" -settle 0s rebalance >/dev/null 2>&1
  }
  copies=$("$bin/mkv" -db "$work/db-mkv" -volumes "$five" rebalance -dry-run | grep -oE '[0-9]+ copies' | head -n 1 | cut -d' ' -f1)
  find "$work/v-1" -type f -path '*/sv*' -printf '%P\n' | head -n "$copies" >"$work/blobs"
  # Pairs of curls, two pairs at a time, as rebalance has two threads on two cores.
  pairs() {
    # shellcheck disable=SC2016 # for the inner shell
    xargs -a "$work/blobs" -P "$(nproc)" -I{} sh -c 'curl -s "http://$1/$3" | curl -s -T - "http://$2/scratch/$3"' - "${own[0]}" "${own[4]}" {}
  }
  measured=$(wc -l <"$work/blobs")
  per_second() { awk -v n="$1" -v s="$(seconds "${@:2}")" 'BEGIN{printf "%.1f", n/s}'; }
  compare up 'rebalance 3 to 5 volumes, MiB a second (limit: pairs of curls)' /s rebalance "per_second $measured pairs"
fi

{
  cat "$here/bench/NOTES.md"
  printf '\n## %s, %s cores, %s, nginx %s, RocksDB of rust-rocksdb %s, median of %s\n\n' "$(date -u +%F)" "$(nproc)" \
    "$(uname -sr)" "$(nginx -v 2>&1 | cut -d/ -f2)" "$(awk -F'"' '/^rocksdb =/{print $2}' "$here/Cargo.toml")" "$rounds"
  printf '| measure | mkv | limit | ratio | peer | to the peer |\n| --- | --- | --- | --- | --- | --- |\n'
  printf '%s\n' "${table[@]}"
} >"$work/results"
mv "$work/results" "$here/bench/RESULTS.md"
