#!/usr/bin/env bash
# Measures mkv side by side with a limit, in turns, and takes the median of several rounds. bench/NOTES.md explains the
# measures.
#
#   bench/run.sh [ROUNDS] [MEASURE…]
#
#   ROUNDS        5
#   MEASURE       idle get cycles put latency index rebuild rebalance seaweedfs (default: all)
#   PEER          binary of another master with the same flags, such as the Go master, to be measured in turns as well
#   PEER_VOLUME   script that starts the peer's volumes (default: the peer uses mkv's volumes)
#   WEED          SeaweedFS's binary; without it, seaweedfs is skipped
#   KEYS          number of keys in the large index (default: 50000000)
#
# Prints a row for each measure. A run of all measures also writes bench/RESULTS.md. Needs a quiet machine and about 30 GB
# in ${TMPDIR:-/tmp}. All servers listen on 127.0.0.1.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
ALL_MEASURES='idle get cycles put latency index rebuild rebalance seaweedfs'
rounds=${1:-5}
measures=${*:2}
measures=${measures:-$ALL_MEASURES}
keys=${KEYS:-50000000}
PATH=$PATH:/usr/sbin:/sbin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
bin=$CARGO_TARGET_DIR/release

fail() {
  printf 'bench: %s\n' "$*" >&2
  exit 1
}

check_arguments() {
  local measure
  [[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "ROUNDS=$rounds is not a positive number"
  for measure in $measures; do
    [[ " $ALL_MEASURES " == *" $measure "* ]] || fail "unknown measure $measure: use some of $ALL_MEASURES"
  done
  if [ -n "${WEED:-}" ]; then WEED=$(realpath -e "$WEED"); fi
}

# Processes

prepare() {
  (cd "$here" && cargo build -q --release --workspace)
  work=$(mktemp -d "${TMPDIR:-/tmp}/mkv-bench-XXXXXX")
  chmod 755 "$work"
  weed_pids=()
  trap clean_up EXIT
  trap 'exit 130' INT TERM
}

# Asks bash for the processes that are still running: the process id of one that has ended may be in use again.
clean_up() {
  stop_seaweedfs
  # shellcheck disable=SC2046
  end $(jobs -pr)
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

# await URL [CURL OPTIONS]: waits until the request succeeds.
await() {
  local try
  for ((try = 0; try < 300; try++)); do
    if curl -s -o /dev/null "$@"; then return; fi
    sleep 0.1
  done
  tail -n 3 "$work"/*.log >&2
  fail "$1 does not answer"
}

# start_volumes SCRIPT NAME COUNT: sets names to the addresses of the volumes.
start_volumes() {
  local n free
  names=()
  for ((n = 1; n <= $3; n++)); do
    free=$(port)
    mkdir -p "$work/$2-$n"
    BIND=127.0.0.1 PORT=$free "$1" "$work/$2-$n" >"$work/volume-$free.log" 2>&1 &
    await "http://127.0.0.1:$free/"
    names+=("127.0.0.1:$free")
  done
}

# start_master BINARY NAME VOLUMES: sets url and pid.
start_master() {
  local free
  free=$(port)
  "$1" -db "$work/db-$2" -volumes "$3" -port "$free" server >"$work/master-$2.log" 2>&1 &
  pid=$!
  url=http://127.0.0.1:$free
  await "$url/"
}

# Sets own, five volumes of which the master `mkv` uses `three`, and `peer`, which is empty if there is none.
start_stores() {
  start_volumes "$here/volume.sh" v 5
  own=("${names[@]}")
  three=$(IFS=, && echo "${own[*]:0:3}")
  five=$(IFS=, && echo "${own[*]}")
  start_master "$bin/mkv" mkv "$three"
  mkv=$url mkv_pid=$pid
  peer=
  if [ -n "${PEER:-}" ]; then
    if [ -n "${PEER_VOLUME:-}" ]; then start_volumes "$PEER_VOLUME" peer 3; fi
    start_master "$PEER" peer "$(IFS=, && echo "${names[*]:0:3}")"
    peer=$url peer_pid=$pid
  fi
}

# Figures

median() { sort -g | awk '{v[NR]=$1} END{print NR%2 ? v[(NR+1)/2] : (v[NR/2]+v[NR/2+1])/2}'; }

# Prints the requests per second that wrk reports.
per_second() { wrk "$@" | awk '/Requests\/sec/{print $2}'; }

rate() { per_second -t2 -c100 -d3 "$@"; }

# Prints thrasher's cycles per second.
cycles() { "$bin/thrasher" "$@" | awk '/^thats/{sub("/sec","",$2); print $2}'; }

# Prints how long a command takes.
seconds() {
  local started=$EPOCHREALTIME
  "$@" >/dev/null 2>&1
  awk -v from="$started" -v to="$EPOCHREALTIME" 'BEGIN{printf "%.3f", to-from}'
}

# cpu PID COMMAND…: prints the processor time that the process uses while the command runs, in 1/100 s.
cpu() {
  local before after
  before=$(awk '{print $14+$15}' "/proc/$1/stat")
  "${@:2}" >/dev/null
  after=$(awk '{print $14+$15}' "/proc/$1/stat")
  echo $((after - before))
}

# Prints the peak memory of a process in MiB.
peak() { awk '/VmHWM/{print int($2/1024)}' "/proc/$1/status"; }

# Makes peak count from now on.
reset_peak() { echo 5 >"/proc/$1/clear_refs"; }

# Tables

rows=() seaweedfs_rows=()

# take_turns COMMAND…: runs the commands in turns, and sets medians to one figure for each of them.
take_turns() {
  local commands=("$@") figures=() round i
  for ((round = 0; round < rounds; round++)); do
    for i in "${!commands[@]}"; do figures[i]="${figures[i]:-}$(eval "${commands[i]}")"$'\n'; done
  done
  medians=()
  for i in "${!commands[@]}"; do medians[i]=$(median <<<"${figures[i]%$'\n'}"); done
}

# compare up|down NAME UNIT OURS LIMIT PEER: adds a row with the figures of three commands. "up" means that a higher
# figure is better. The peer's command is optional, and not run if there is no peer.
compare() {
  take_turns "${@:4:2}" ${peer:+"${@:6:1}"}
  add_row "${@:1:3}" "${medians[@]}"
}

# add_row up|down NAME UNIT OURS LIMIT [PEER]: marks a ratio that is more than 10 % worse than the one in RESULTS.md.
add_row() {
  local row
  row=$(awk -v better="$1" -v name="$2" -v unit="$3" -v ours="$4" -v limit="$5" -v peer="${6:--}" -v old="$here/bench/RESULTS.md" '
    BEGIN {
      ratio = limit > 0 ? ours / limit : 0; to_peer = peer + 0 > 0 ? sprintf("%.2f", ours / peer) : "-"
      FS = " *[|] *"
      while ((getline < old) > 0) if ($2 == name) was = $5
      worse = was + 0 > 0 && (better == "up" ? ratio < was * 0.9 : ratio > was * 1.1)
      printf "| %s | %s %s | %s %s | %.2f | %s | %s |%s", name, ours, unit, limit, unit, ratio, peer, to_peer, worse ? " worse, was " was : ""
    }')
  rows+=("$row")
  echo "$row"
}

# Measures

measure_idle() {
  compare down 'processor time of the idle master in 20 s (limit: 1 % of a core)' '/100 s' "cpu $mkv_pid sleep 20" 'echo 20'
  fill_time_wait
  sleep 10
  compare down 'processor time in 5 s beside 20,000 sockets in TIME_WAIT (limit: 1 % of a core)' '/100 s' \
    "cpu $mkv_pid sleep 5" 'echo 5'
}

# Linux keeps at most 14,000 sockets in TIME_WAIT for one address, so this uses several.
fill_time_wait() {
  local address
  for address in "$mkv" "${own[@]/#/http://}"; do
    if [ "$(awk '/^TCP:/{print $7}' /proc/net/sockstat)" -lt 22000 ]; then
      wrk -t2 -c100 -d4 -H 'Connection: close' "$address/missing" >/dev/null
    fi
  done
}

measure_get() {
  local store blob bare
  start_bare_nginx
  for store in $mkv $peer; do curl -s -o /dev/null -X PUT -d value "$store/there"; done
  blob=$(curl -s -o /dev/null -w '%{redirect_url}' "$mkv/there")
  compare up 'GET of a missing key (limit: nginx, return 404)' /s "rate $mkv/missing" "rate $bare/" "rate $peer/missing"
  compare up 'GET of an existing key (limit: GET of its blob)' /s "rate $mkv/there" "rate $blob" "rate $peer/there"
}

# Sets bare, the URL of an nginx that does nothing but answer 404: no lookup can be faster.
start_bare_nginx() {
  local free
  free=$(port)
  bare=http://127.0.0.1:$free
  cat >"$work/bare.conf" <<END
daemon off; worker_processes 2; pid $work/bare.pid; error_log stderr crit;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 1000000000; server { listen 127.0.0.1:$free; location / { return 404; } } }
END
  nginx -c "$work/bare.conf" 2>/dev/null &
  await "$bare/"
}

measure_cycles() {
  local direct=http://${three//,/,http://}
  reset_peaks
  compare up 'write/read/delete of 25 bytes, 16 threads (limit: straight to the volumes)' /s \
    "cycles --url $mkv --count 4000" "cycles --direct --url $direct --count 4000" "cycles --url $peer --count 4000"
  # shellcheck disable=SC2016 # take_turns expands them
  compare down 'processor time of the master for 10,000 cycles (limit: 5.5 s)' '/100 s' \
    'cpu $mkv_pid "$bin/thrasher" --url $mkv' 'echo 550' 'cpu $peer_pid "$bin/thrasher" --url $peer'
  compare up 'write/read/delete of 1 MiB, 16 threads (limit: straight to the volumes)' /s \
    "cycles --url $mkv --count 300 --size 1M" "cycles --direct --url $direct --count 300 --size 1M" \
    "cycles --url $peer --count 300 --size 1M"
  add_peak_row 'the cycles above'
}

measure_put() {
  local mib
  for mib in 512 1024; do
    head -c "${mib}M" /dev/urandom >"$work/value"
    reset_peaks
    compare down "PUT of $mib MiB, 3 replicas (limit: three curls)" s \
      "seconds put $mkv; delete_values" 'seconds put_to_volumes; delete_values' "seconds put $peer; delete_values"
    add_peak_row "PUT of $mib MiB"
  done
  rm "$work/value"
}

put() { curl -s -f -T "$work/value" "$1/value"; }

put_to_volumes() {
  local name curls=()
  for name in "${own[@]:0:3}"; do
    curl -s -f -T "$work/value" "http://$name/aa/bb/value" &
    curls+=($!)
  done
  wait "${curls[@]}"
}

# Runs after each PUT, so that no PUT has to wait for the write-back of another.
delete_values() {
  local address
  for address in "$mkv/value" ${peer:+"$peer/value"} "${own[@]/%//aa/bb/value}"; do curl -s -o /dev/null -X DELETE "$address"; done
  sync
}

reset_peaks() {
  reset_peak "$mkv_pid"
  if [ -n "$peer" ]; then reset_peak "$peer_pid"; fi
}

# add_peak_row MEASURE
add_peak_row() {
  add_row down "peak memory of the master in $1 (limit: 64 MiB)" MiB "$(peak "$mkv_pid")" 64 ${peer:+"$(peak "$peer_pid")"}
}

measure_latency() {
  local name free near=()
  for name in "${own[@]:0:3}"; do
    free=$(port)
    "$bin/mkv-bench" delay "$free" "${name#*:}" &
    near+=("127.0.0.1:$free")
    await "http://127.0.0.1:$free/"
  done
  start_master "$bin/mkv" far "$(IFS=, && echo "${near[*]}")"
  compare down 'PUT at 1 ms to each volume, p50 (limit: one round trip)' ms "p50 $url write" "round_trip ${near[0]}"
  compare down 'DELETE at 1 ms to each volume, p50 (limit: one round trip)' ms "p50 $url delete" "round_trip ${near[0]}"
  end "$pid"
}

# p50 URL OPERATION: prints milliseconds.
p50() {
  "$bin/thrasher" --url "$1" --threads 1 --count 200 --json |
    python3 -c "import json,sys; print(json.load(sys.stdin)['$2']['p50_us'] / 1000)"
}

# round_trip ADDRESS: prints milliseconds.
round_trip() {
  wrk -t1 -c1 -d1 --latency "http://$1/missing" | awk '/ 50%/{print $2 ~ /us/ ? $2/1000 : $2+0}'
}

measure_index() {
  local small large large_pid bytes
  write_lookup_script
  start_generated_index 100000
  small=$url
  start_generated_index "$keys"
  large=$url large_pid=$pid
  bytes=$(du -sb "$work/db-$keys/index" | cut -f1)
  # Records of odd keys are unlinked, so the master looks them up but asks no volume. No key ends in a letter.
  compare up "GET of a random missing key among $keys (limit: among 100,000)" /s \
    "look_up $large $keys x" "look_up $small 100000 x"
  compare up "GET of a random existing record among $keys (limit: among 100,000)" /s \
    "look_up $large $keys 1" "look_up $small 100000 1"
  compare up "?list&limit=1000 among $keys (limit: among 100,000)" /s "list_page $large $keys" "list_page $small 100000"
  add_row down "peak memory of the master with $keys keys (limit: 1 GiB)" MiB "$(peak "$large_pid")" 1024
  add_row down "index on disk, bytes per key (limit: 17 of key, 144 of record)" B "$((bytes / keys))" 161
  end "$large_pid"
  rm -rf "$work/db-$keys"
}

# start_generated_index KEYS: sets url and pid.
start_generated_index() {
  "$bin/mkv-bench" index "$work/db-$1" "$1"
  start_master "$bin/mkv" "$1" "$three"
}

write_lookup_script() {
  cat >"$work/random.lua" <<'END'
local n, last
function init(arguments) n, last = tonumber(arguments[1]), arguments[2]; math.randomseed(os.time()) end
function request() return wrk.format("GET", string.format("/bench/%09d%s", math.random(0, n / 10 - 1), last)) end
END
}

# look_up URL KEYS LAST_CHARACTER
look_up() { rate -s "$work/random.lua" "$1" -- "$2" "$3"; }

# list_page URL KEYS
list_page() {
  local start
  start=$(printf %010d $((RANDOM * 30000 % ($2 - 3000))))
  per_second -t1 -c1 -d2 "$1/bench/?list&limit=1000&start=/bench/$start"
}

measure_rebuild() {
  local folders
  rm -rf "$work"/v-*/sv* # values of other measures would be listed but not counted
  write_blobs "$work"/v-{1,2,3}
  sync
  write_listing_script
  folders=$(find "$work"/v-{1,2,3} -mindepth 2 -maxdepth 2 -type d | wc -l)
  compare up 'rebuild of 200,000 keys of 3 replicas, listings a second (limit: wrk on listings)' /s \
    "rebuild | awk '{print $folders / \$1}'" list_folders
  rm -rf "$work"/v-{1,2,3}/??
}

# write_blobs FOLDER…: writes 200,000 blobs into each volume's folder.
write_blobs() {
  python3 - "$@" <<'END'
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
}

write_listing_script() {
  find "$work/v-1" -mindepth 2 -maxdepth 2 -type d -printf '/%P/\n' | shuf -n 20000 >"$work/folders"
  cat >"$work/folders.lua" <<END
local paths, n = {}, 0
function init() for line in io.lines("$work/folders") do paths[#paths + 1] = line end end
function request() n = n % #paths + 1; return wrk.format("GET", paths[n]) end
END
}

# Prints seconds.
rebuild() {
  rm -rf "$work/db-rebuilt"
  seconds "$bin/mkv" -db "$work/db-rebuilt" -volumes "$three" -subvolumes 1 rebuild
}

list_folders() { per_second -t2 -c16 -d3 -s "$work/folders.lua" "http://${own[0]}"; }

measure_rebalance() {
  local copies blobs
  fill_three_volumes
  copies=$("$bin/mkv" -db "$work/db-mkv" -volumes "$five" rebalance -dry-run | grep -oE '[0-9]+ copies' | head -n 1 | cut -d' ' -f1)
  find "$work/v-1" -type f -path '*/sv*' -printf '%P\n' | head -n "$copies" >"$work/blobs"
  blobs=$(wc -l <"$work/blobs")
  compare up 'rebalance 3 to 5 volumes, MiB a second (limit: pairs of curls)' /s "rebalance $copies" "copy_with_curl $blobs"
}

# Restarts the main store with 2,000 values of 1 MiB.
fill_three_volumes() {
  local folder
  end "$mkv_pid"
  for folder in "$work"/v-*; do find "$folder" -mindepth 1 -maxdepth 1 -not -name '.*' -exec rm -rf {} +; done
  rm -rf "$work/db-mkv"
  start_master "$bin/mkv" mkv "$three"
  "$bin/thrasher" --url "$url" --count 2000 --size 1M --keep >/dev/null
  end "$pid"
}

# rebalance COPIES: rebalances to five volumes, prints the copies per second, and goes back to three.
rebalance() {
  copies_per_second "$1" "$bin/mkv" -db "$work/db-mkv" -volumes "$five" -settle 0s rebalance
  "$bin/mkv" -db "$work/db-mkv" -volumes "$three" -settle 0s rebalance >/dev/null 2>&1
}

copies_per_second() { awk -v n="$1" -v s="$(seconds "${@:2}")" 'BEGIN{printf "%.1f", n/s}'; }

# copy_with_curl BLOBS: as many at a time as rebalance has threads.
copy_with_curl() { copies_per_second "$1" copy_blobs; }

copy_blobs() {
  # shellcheck disable=SC2016 # for the inner shell
  xargs -a "$work/blobs" -P "$(nproc)" -I{} sh -c 'curl -s "http://$1/$3" | curl -s -T - "http://$2/scratch/$3"' - "${own[0]}" "${own[4]}" {}
}

# Uses stores of its own: measure_rebalance stops the main master, and SeaweedFS takes 12 GB for its files.
measure_seaweedfs() {
  local size count label mkv_store filer
  if [ -z "${WEED:-}" ]; then
    echo 'seaweedfs: skipped, because WEED does not name its binary'
    return
  fi
  start_seaweedfs
  start_volumes "$here/volume.sh" beside-seaweedfs 3
  start_master "$bin/mkv" beside-seaweedfs "$(IFS=, && echo "${names[*]}")"
  mkv_store=$url
  while read -r size count label; do
    take_turns "cycles --url $mkv_store --size $size --count $count" "cycles --filer --url $filer --size $size --count $count"
    add_seaweedfs_row "$label"
  done <<END
25 4000 25 bytes
64K 2000 64 KiB
1M 400 1 MiB
32M 24 32 MiB
END
  end "$pid"
  stop_seaweedfs
}

# After a SIGTERM its servers wait for each other, the filer for minutes.
stop_seaweedfs() {
  local pid
  for pid in "${weed_pids[@]}"; do
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  weed_pids=()
  rm -rf "$work/seaweedfs"
}

# Sets filer, the URL, and weed_pids. Copies 002: two more copies on other servers of the same rack.
start_seaweedfs() {
  local n master
  mkdir -p "$work/seaweedfs"/{master,1,2,3,filer}
  start_weed master -mdir=master -peers=none -defaultReplication=002 -volumeSizeLimitMB=1024 -telemetry=false
  master=$address
  for n in 1 2 3; do start_weed volume -dir="$n" -max=100 -master="$master"; done
  start_weed filer -master="$master" -defaultStoreDir=filer -localSocket="$work/seaweedfs/filer.sock"
  filer=http://${address%.*}
  await "$filer/ready" -f -X PUT -d value
}

# start_weed COMMAND FLAGS…: sets address to HOST:PORT.GRPC_PORT, as SeaweedFS writes it.
start_weed() {
  local port grpc
  port=$(port) grpc=$(port)
  (cd "$work/seaweedfs" && exec "$WEED" -logtostderr "$1" -ip=127.0.0.1 -port="$port" -port.grpc="$grpc" "${@:2}") \
    >"$work/weed-$1-$port.log" 2>&1 &
  weed_pids+=($!)
  address=127.0.0.1:$port.$grpc
}

# add_seaweedfs_row SIZE
add_seaweedfs_row() {
  local row
  row=$(printf '| write/read/delete of %s, 16 threads | %s /s | %s /s | %s |' "$1" "${medians[@]}" \
    "$(awk -v ours="${medians[0]}" -v theirs="${medians[1]}" 'BEGIN{printf "%.2f", ours/theirs}')")
  seaweedfs_rows+=("$row")
  echo "$row to SeaweedFS"
}

# shellcheck disable=SC2016 # the backquotes are Markdown
write_results() {
  {
    printf '# Benchmark results\n\n`bench/run.sh` writes this file; [NOTES.md](NOTES.md) explains the measures.\n\n'
    printf '%s, %s cores, %s, nginx %s, RocksDB of rust-rocksdb %s, median of %s rounds.\n\n' "$(date -u +%F)" "$(nproc)" \
      "$(uname -sr)" "$(nginx -v 2>&1 | cut -d/ -f2)" "$(awk -F'"' '/^rocksdb =/{print $2}' "$here/Cargo.toml")" "$rounds"
    printf '| measure | mkv | limit | ratio | peer | to the peer |\n| --- | --- | --- | --- | --- | --- |\n'
    printf '%s\n' "${rows[@]}"
    if [ ${#seaweedfs_rows[@]} -gt 0 ]; then
      printf '\nSeaweedFS %s, three copies:\n\n' "$("$WEED" version | awk 'NR==1{print $3}')"
      printf '| measure | mkv | SeaweedFS | to SeaweedFS |\n| --- | --- | --- | --- |\n'
      printf '%s\n' "${seaweedfs_rows[@]}"
    fi
  } >"$work/results"
  mv "$work/results" "$here/bench/RESULTS.md"
}

main() {
  local measure
  check_arguments
  prepare
  start_stores
  for measure in $ALL_MEASURES; do
    if [[ " $measures " == *" $measure "* ]]; then "measure_$measure"; fi
  done
  if [ "$measures" = "$ALL_MEASURES" ]; then write_results; fi
}

main
