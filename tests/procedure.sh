#!/usr/bin/env bash
# The acceptance test of the original minikeyvalue, with ./mkv, ./volume.sh, curl and diff only: fill the store, rebuild
# into another index, rebalance from five volumes to three and back, rebuild again. Each step must preserve the index
# and the values.
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/..
umask 022 # nginx's workers may run as another user
dir=$(mktemp -d "${TMPDIR:-/tmp}/mkv-procedure.XXXXXX")
chmod 755 "$dir"
# A random loopback address, so that all its ports are free.
host=127.$((RANDOM % 200 + 20)).$((RANDOM % 256)).$((RANDOM % 254 + 1))
five=$host:3001,$host:3002,$host:3003,$host:3004,$host:3005
three=${five%,*,*}
url=http://$host:3000
pids=() step=

stop() { # in reverse order: the master before its volumes
  local i pid
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    pid=${pids[i]}
    kill -TERM "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  done
  pids=()
}
# shellcheck disable=SC2317 # called by the trap
leave() {
  local status=$?
  if [ "$status" != 0 ]; then
    printf 'procedure.sh: FAILED: %s\n' "$step" >&2
    tail -n 20 "$dir"/*.log >&2 || true
  fi
  stop
  rm -rf -- "$dir"
  exit "$status"
}
trap leave EXIT
trap 'exit 1' INT TERM HUP

await() { # COMMAND…: retries the command for up to 20 s
  local n
  for ((n = 0; n < 400; n++)); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.05
  done
  return 1
}
mkv=("$here/mkv" -replicas 2 -subvolumes 3)
get() { curl -q -sS -f --noproxy '*' --max-time 20 --path-as-is "$@"; }

start_volumes() {
  local n
  for n in 1 2 3 4 5; do
    BIND=$host PORT=$((3000 + n)) "$here/volume.sh" "$dir/volume$n" >"$dir/volume$n.log" 2>&1 &
    pids+=("$!")
  done
  for n in 1 2 3 4 5; do await grep -q ' serves ' "$dir/volume$n.log"; done
}
start_master() { # VOLUMES
  "${mkv[@]}" -db "$dir/index" -volumes "$1" -host "$host" -port 3000 server >"$dir/master.log" 2>&1 &
  pids+=("$!")
  await get -o "$dir/list" "$url/?list&limit=1"
}
stop_master() {
  await cleaned
  kill -TERM "${pids[-1]}"
  wait "${pids[-1]}"
  unset 'pids[-1]'
}
cleaned() { [ "$(get "$url/?writing")" = '{"next":"","keys":[]}' ]; }
dump() { "${mkv[@]}" -db "$1" dump >"$2"; }

# Prints a curl config with one request for each key.
requests() { # SETTINGS for each request, with @N for the number of the key
  local n=0 key
  while read -r key; do
    n=$((n + 1))
    if ((n > 1)); then echo next; fi
    printf 'url = "%s%s"\n%s\n' "$url" "$key" "${1//@N/$n}"
  done <"$dir/keys"
}
all() { # STATUS SETTINGS: sends a request for each key and checks that every answer has this status
  requests "$2"$'\nwrite-out = "%{http_code}\\n"\npath-as-is\nsilent\nshow-error\nnoproxy = "*"\nmax-time = 20' >"$dir/curl"
  curl -q -K "$dir/curl" >"$dir/answers"
  if grep -vnx "$1" "$dir/answers"; then return 1; fi
  [ "$(wc -l <"$dir/answers")" = "$(wc -l <"$dir/keys")" ]
}
values_are_right() {
  rm -rf -- "$dir/read"
  mkdir "$dir/read"
  all 200 "location"$'\n'"output = \"$dir/read/@N\""
  diff -r "$dir/values" "$dir/read"
}

step='build'
"${mkv[@]}" -version >"$dir/build.log"
step='create plain and unusual keys'
for ((n = 0; n < 300; n++)); do printf '/plain/%03d\n' "$n"; done >"$dir/keys"
{
  for ((n = 0; n < 20; n++)); do printf '/%%C3%%A9t%%C3%%A9/%%E6%%97%%A5%%E6%%9C%%AC%d\n' "$n"; done # UTF-8
  for ((n = 0; n < 20; n++)); do printf '/%%ff%%FE%%00%d%%3F%%3f\n' "$n"; done # not UTF-8; base64 with slashes
  printf '/%0*d\n' 100 0 170 0 178 0 179 0 1000 0 1023 0 # long keys
  printf '%s\n' / // //double//slash// /.. /../../etc /a/./b /%20 /with%20space /%25 /%2525 /a%3Fb=c /a+b '/a%22%5Cb' \
    /foo/%C3%A9t%C3%A9 /~ /~x /sv00 /.nginx /DELETED /HASH /a,b /x%0Ay '/%F0%9F%A6%80'
} >>"$dir/keys"
mkdir "$dir/values"
n=0
while read -r key; do
  n=$((n + 1))
  for ((i = n % 50; i >= 0; i--)); do printf 'the value of %s: ' "$key"; done >"$dir/values/$n"
done <"$dir/keys"

step='fill five volumes'
start_volumes
start_master "$five"
value="data-binary = \"@$dir/values/@N\"" # upload-file would append the file name to a URL that ends in a slash
all 201 "$value"$'\nrequest = "PUT"'
all 403 "$value"$'\nrequest = "PUT"\noutput = "/dev/null"'
all 201 "$value"$'\nrequest = "REPLACE"'
values_are_right
stop_master
dump "$dir/index" "$dir/before"
[ "$(wc -l <"$dir/before")" = "$(wc -l <"$dir/keys")" ]

step='rebuild into another index'
"${mkv[@]}" -db "$dir/another" -volumes "$five" -rehash rebuild >"$dir/rebuild.log"
dump "$dir/another" "$dir/after"
diff "$dir/before" "$dir/after"

step='rebalance five volumes to three'
"${mkv[@]}" -db "$dir/index" -volumes "$three" -settle 0s rebalance >"$dir/rebalance.log"
dump "$dir/index" "$dir/after"
if grep -e ":3004" -e ":3005" "$dir/after"; then exit 1; fi
[ -z "$(find "$dir/volume4" "$dir/volume5" -name .nginx -prune -o -type f -print -quit)" ]
"${mkv[@]}" -db "$dir/index" -volumes "$three" -deep verify >"$dir/verify.log"
start_master "$three"
values_are_right
stop_master

step='rebalance three volumes to five'
"${mkv[@]}" -db "$dir/index" -volumes "$five" -settle 0s rebalance >"$dir/rebalance.log"
dump "$dir/index" "$dir/after"
diff "$dir/before" "$dir/after"

step='rebuild again, with unlinked keys'
start_master "$five"
for key in /plain/007 /plain/100 /foo/%C3%A9t%C3%A9; do get -X UNLINK "$url$key"; done
stop_master
dump "$dir/index" "$dir/before"
[ "$(grep -c $'\tDELETED' "$dir/before")" = 3 ]
"${mkv[@]}" -db "$dir/third" -volumes "$five" -rehash -from "$dir/index" rebuild >"$dir/rebuild.log"
dump "$dir/third" "$dir/after"
diff "$dir/before" "$dir/after"
"${mkv[@]}" -db "$dir/index" -volumes "$five" rebuild >"$dir/rebuild.log"
dump "$dir/index" "$dir/after"
diff "$dir/before" "$dir/after"

step='read everything back'
start_master "$five"
for key in /plain/007 /plain/100 /foo/%C3%A9t%C3%A9; do get -X RELINK "$url$key"; done
values_are_right
stop_master
"${mkv[@]}" -db "$dir/index" -volumes "$five" -deep verify >"$dir/verify.log"
printf 'procedure.sh: passed with %d keys\n' "$(wc -l <"$dir/keys")"
