#!/usr/bin/env bash
# Measures several masters on PostgreSQL beside one on RocksDB, in turns, and takes the median of several rounds.
#
#   bench/masters.sh [ROUNDS]          5; prints a table
#   bench/masters.sh night [ROUNDS]    100; runs the tests of masters that make random requests, each with another seed
#
#   BIN      folder of the binaries to measure; without it they are built
#   BEFORE   another mkv to measure on RocksDB in the same turns
#
# PostgreSQL, as bringup.sh installs it, runs beside the masters, with fsync and without a standby. Needs python3, wrk.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=tools.sh
source "$here/tools.sh"
# shellcheck source=bench/servers.sh
source "$here/bench/servers.sh"
keys=1000000

run_tests() {
  local round random='test(two_masters_serve) + test(nothing_acknowledged_is_lost) + test(crashes_loses_nothing)'
  for ((round = 1; round <= $1; round++)); do
    echo "round $round of $1"
    (cd "$here" && MKV_SEED=$RANDOM$RANDOM cargo nextest run --release --workspace --no-capture -E "$random" 2>&1) |
      grep -E 'MKV_SEED|acknowledged|no write for|FAIL|panicked|Summary'
  done
}

start_postgres() {
  local programs user=()
  programs=$(postgres_bin)
  if [ "$(id -u)" = 0 ]; then user=(setpriv --reuid=postgres --regid=postgres --clear-groups --); fi
  mkdir "$work/postgres"
  if [ "$(id -u)" = 0 ]; then chown postgres: "$work/postgres"; fi
  "${user[@]}" "$programs/initdb" -D "$work/postgres/data" -U mkv -A trust --locale=C -E UTF8 >/dev/null
  db_port=$(port)
  "${user[@]}" "$programs/postgres" -D "$work/postgres/data" -h 127.0.0.1 -p "$db_port" -k "$work/postgres" \
    -c shared_buffers=256MB -c max_connections=200 2>"$work/postgres.log" &
  psql=("$programs/psql" -XAtq -h 127.0.0.1 -p "$db_port" -U mkv -d)
  await "${psql[@]}" postgres -c 'SELECT 1'
  "${psql[@]}" postgres -c 'CREATE DATABASE mkv'
  "${psql[@]}" postgres -c 'CREATE DATABASE keys'
  db=postgres://mkv@127.0.0.1:$db_port
}

pages() { wrk -t1 -c1 -d2 "$1/bench/?list&limit=1000&start=/bench/0000$((RANDOM % 90 + 10))0000" | awk '/Requests\/sec/{print $2}'; }

measure_size() {
  local bytes
  "$bin/mkv-bench" index "$work/keys" "$keys"
  "$bin/mkv" -db "$db/keys?sslmode=disable" import -index "$work/keys" >/dev/null
  bytes=$("${psql[@]}" keys -c 'VACUUM ANALYZE record' -c "SELECT pg_total_relation_size('record')")
  echo "bytes a key: RocksDB $(($(du -sb "$work/keys/index" | cut -f1) / keys)), PostgreSQL $((bytes / keys))"
}

measure_takeover() {
  local before killed
  start_master "$bin/mkv" "$db/mkv?sslmode=disable"
  (head -c 1000 /dev/zero; sleep 60) | curl -s -T - "$url/taken" >/dev/null &
  before=$!
  await eval "curl -s '$one/?writing' | grep -q taken"
  kill -KILL "$pid"
  killed=$EPOCHREALTIME
  await eval "curl -s -f -X PUT -d value $one/taken"
  awk -v from="$killed" -v to="$EPOCHREALTIME" 'BEGIN{printf "a key is free again %.1f s after its master was killed\n", to - from}'
  end "$before"
}

main() {
  local rocks before=() two each
  if [ "${1:-}" = night ]; then
    run_tests "${2:-100}"
    return
  fi
  rounds=${1:-5}
  prepare
  start_postgres
  start_volumes 3
  start_master "$bin/mkv" "$work/db"
  rocks=$url
  if [ -n "${BEFORE:-}" ]; then start_master "$BEFORE" "$work/db-before"; before=("$url"); fi
  start_master "$bin/mkv" "$db/mkv?sslmode=disable"
  one=$url
  start_master "$bin/mkv" "$db/mkv?sslmode=disable"
  two=$url
  for each in "$rocks" "$one" "${before[@]}"; do curl -s -o /dev/null -X PUT -d value "$each/there"; done
  echo "| measure | RocksDB | one master on PostgreSQL | two masters | ${BEFORE:+RocksDB, $BEFORE |}"
  echo "| --- | --- | --- | --- | ${BEFORE:+--- |}"
  compare 'GET of a missing key' "rate $rocks/missing" "rate $one/missing" "rate $one/missing $two/missing" ${before:+"rate ${before[0]}/missing"}
  compare 'GET of an existing key' "rate $rocks/there" "rate $one/there" "rate $one/there $two/there" ${before:+"rate ${before[0]}/there"}
  compare 'cycle of 25 bytes' "cycles $rocks" "cycles $one" "cycles $one $two" ${before:+"cycles ${before[0]}"}
  measure_size
  start_master "$bin/mkv" "$work/keys"
  rocks=$url
  start_master "$bin/mkv" "$db/keys?sslmode=disable"
  compare "page of 1,000 keys among $keys" "pages $rocks" "pages $url"
  measure_takeover
}

main "$@"
