#!/usr/bin/env bash
# Runs real S3 clients against a store of its own, over http and, where a client can, through the front over TLS.
#
#   tests/s3/all.sh [CLIENT…]
#
#   CLIENT      boto3 awscli rclone pyarrow s3fs restic s3cmd duckdb polars minio awssdk litestream s5cmd fuse registry
#               (default: all)
#   ENDPOINT    URL of another S3 server, with KEY and SECRET; all its buckets are the tests'
#
# Prints a line for each client; the exit status says whether all passed. tools.sh installs what is missing.
set -euo pipefail
ALL_CLIENTS='boto3 awscli rclone pyarrow s3fs restic s3cmd duckdb polars minio awssdk litestream s5cmd fuse registry'
clients=${*:-$ALL_CLIENTS}
umask 022
work=$(mktemp -d "${TMPDIR:-/tmp}/mkv-s3.XXXXXX")
chmod 755 "$work"
tests=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tools.sh
source "$tests/../../tools.sh"
# shellcheck source=tests/s3/store.sh
source "$tests/store.sh"
# test.sh has installed these.
quick_clients='boto3 awscli rclone'
quick=$HOME/.cache/mkv/s3/bin long=$HOME/.cache/mkv/s3-long/bin node=$HOME/.cache/mkv/s3-node
trap 'fusermount -u "$work/mount" 2>/dev/null || true; stop_store; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

# ---- clients: each uses $url -----------------------------------------------------------------------------------------

client_boto3() { "$quick/python" "$tests/with_boto3.py" "$url"; }

client_awscli() {
  local bucket=s3://awscli-${url%%:*} started=$SECONDS
  aws mb "$bucket"
  make_files files
  find files -exec touch -d '1 minute ago' {} + # S3's times are whole seconds: a file of this second would be newer
  aws sync --no-progress files "$bucket/files"
  [ "$((SECONDS - started))" -lt 40 ] # an empty file stalls a client that is not told to continue
  aws sync --no-progress "$bucket/files" back
  diff -r files back
  [ -z "$(aws sync files "$bucket/files")" ]
  mkdir objects
  head -c 20000000 /dev/urandom >objects/large
  aws cp --no-progress objects/large "$bucket/objects/large"
  aws cp - "$bucket/objects/stream" <objects/large
  aws cp --no-progress "$bucket/objects/large" "$bucket/copy"
  aws mv --no-progress "$bucket/copy" "$bucket/objects/moved é+"
  cp objects/large objects/stream
  cp objects/large 'objects/moved é+'
  aws cp --no-progress --recursive "$bucket/objects" read
  diff -r objects read
  curl -q -sS -f --noproxy '*' ${AWS_CA_BUNDLE:+--cacert "$AWS_CA_BUNDLE"} "$(aws presign "$bucket/objects/moved é+")" | cmp - objects/large
  aws ls "$bucket/" | grep 'PRE files/'
  aws rm --quiet --recursive "$bucket"
  aws rb "$bucket"
}
aws() { "$quick/aws" --endpoint-url "$url" s3 "$@"; }

client_rclone() {
  local remote=m:rclone-${url%%:*}
  export RCLONE_CONFIG=/dev/null RCLONE_CONFIG_M_TYPE=s3 RCLONE_CONFIG_M_PROVIDER=Other RCLONE_CONFIG_M_ENDPOINT=$url
  export RCLONE_CONFIG_M_ENV_AUTH=true RCLONE_CA_CERT=${AWS_CA_BUNDLE:-} RCLONE_RETRIES=1
  make_files files
  head -c 20000000 /dev/urandom >files/large
  rclone mkdir "$remote"
  rclone sync files "$remote/dir" --s3-upload-cutoff 8M
  rclone check files "$remote/dir" --download
  rclone sync files "$remote/dir" -v >again 2>&1
  ! grep -i copied again || return 1
  touch -d 2020-01-01 files/a
  rclone sync files "$remote/dir"
  [ "$(rclone lsf --format t "$remote/dir/a" | cut -c1-10)" = 2020-01-01 ]
  rclone copyto "$remote/dir/large" "$remote/copy"
  rclone moveto "$remote/copy" "$remote/moved"
  rclone cat "$remote/moved" | cmp - files/large
  rclone sync "$remote/dir" back
  diff -r files back
  rclone purge "$remote"
}
rclone() { "$quick/rclone" "$@"; }

client_pyarrow() { "$long/python" "$tests/with_pyarrow.py" "$url"; }

client_s3fs() { "$long/python" "$tests/with_s3fs.py" "$url"; }

client_restic() {
  export RESTIC_REPOSITORY=s3:$url/restic/repository RESTIC_PASSWORD=password RESTIC_CACHE_DIR=$PWD/cache
  make_files files
  head -c 30000000 /dev/urandom >files/large
  restic init
  restic backup files
  echo more >>files/a
  restic backup files
  restic check --read-data
  restic restore latest --target back
  diff -r files back/files
  restic forget --keep-last 1 --prune
  restic check
}

client_s3cmd() {
  local s3=("$long/s3cmd" --access_key="$KEY" --secret_key="$SECRET" --host="${url#*//}" --host-bucket="${url#*//}" --no-ssl --config=/dev/null --no-progress)
  make_files files
  "${s3[@]}" mb s3://s3cmd-bucket
  "${s3[@]}" sync files/ s3://s3cmd-bucket/files/
  "${s3[@]}" sync s3://s3cmd-bucket/files/ back/
  diff -r files back
  head -c 20000000 /dev/urandom >large
  "${s3[@]}" put --multipart-chunk-size-mb=5 large 's3://s3cmd-bucket/la rge é+'
  "${s3[@]}" cp 's3://s3cmd-bucket/la rge é+' s3://s3cmd-bucket/copy
  "${s3[@]}" get s3://s3cmd-bucket/copy copy
  cmp large copy
  "${s3[@]}" mv s3://s3cmd-bucket/copy s3://s3cmd-bucket/moved
  "${s3[@]}" info s3://s3cmd-bucket/moved | grep 20000000
  "${s3[@]}" ls s3://s3cmd-bucket/ | grep files/
  "${s3[@]}" del --recursive --force s3://s3cmd-bucket
  "${s3[@]}" rb s3://s3cmd-bucket
}

client_duckdb() {
  make_bucket duckdb
  "$long/python" "$tests/with_duckdb.py" "$url" "$KEY" "$SECRET"
}

client_polars() {
  make_bucket polars
  "$long/python" "$tests/with_polars.py" "$url"
}

client_minio() { "$long/python" "$tests/with_minio.py" "$url"; }

client_awssdk() { node "$tests/with_aws_sdk.mjs" "$url" "$node"; }

client_litestream() {
  make_bucket litestream
  printf 'dbs:\n  - path: %s/db\n    replica:\n      type: s3\n      bucket: litestream\n      path: db\n      endpoint: %s\n      force-path-style: true\n      region: us-east-1\n' "$PWD" "$url" >litestream.yml
  sql db 'CREATE TABLE t (n)' 'PRAGMA journal_mode=wal'
  for n in 1 2 3; do
    sql db "INSERT INTO t WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 10000) SELECT n FROM c"
    "$long/litestream" replicate -config litestream.yml -once
  done
  "$long/litestream" restore -config litestream.yml -o restored "$PWD/db"
  [ "$(sql restored 'SELECT count(*) FROM t')" = 30000 ]
}
sql() { # FILE STATEMENT…: prints the last answer
  python3 -c 'import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as db: rows = [db.execute(s).fetchall() for s in sys.argv[2:]]
for row in rows[-1]: print(*row)' "$@"
}

client_s5cmd() {
  local s3=("$long/s5cmd" --endpoint-url "$url")
  make_files files
  "${s3[@]}" mb s3://s5cmd-bucket
  "${s3[@]}" cp files/ s3://s5cmd-bucket/files/
  "${s3[@]}" sync s3://s5cmd-bucket/files/* back/
  diff -r files back
  head -c 20000000 /dev/urandom >large
  "${s3[@]}" cp --part-size 5 large s3://s5cmd-bucket/large
  "${s3[@]}" cat s3://s5cmd-bucket/large | cmp - large
  "${s3[@]}" cp s3://s5cmd-bucket/large s3://s5cmd-bucket/copy
  "${s3[@]}" mv s3://s5cmd-bucket/copy s3://s5cmd-bucket/moved
  "${s3[@]}" ls 's3://s5cmd-bucket/*' | grep moved
  "${s3[@]}" rm 's3://s5cmd-bucket/*'
  "${s3[@]}" rb s3://s5cmd-bucket
}

client_fuse() {
  make_bucket fuse-bucket
  printf '%s:%s\n' "$KEY" "$SECRET" >password
  chmod 600 password
  mkdir -p "$work/mount"
  s3fs fuse-bucket "$work/mount" -o "url=$url,use_path_request_style,passwd_file=$PWD/password,use_cache="
  make_files files
  cp -r files "$work/mount/files"
  head -c 30000000 /dev/urandom >large
  cp large "$work/mount/large"
  mv "$work/mount/large" "$work/mount/moved"
  touch -d 2020-01-01 "$work/mount/moved"
  fusermount -u "$work/mount"
  s3fs fuse-bucket "$work/mount" -o "url=$url,use_path_request_style,passwd_file=$PWD/password"
  cmp large "$work/mount/moved"
  [ "$(date -r "$work/mount/moved" +%Y)" = 2020 ]
  diff -r files "$work/mount/files"
  rm -r "$work/mount/files"
  [ "$(ls "$work/mount")" = moved ]
  fusermount -u "$work/mount"
}

client_registry() {
  local port
  make_bucket registry
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  cat >registry.yml <<END
version: 0.1
storage:
  s3: {accesskey: $KEY, secretkey: $SECRET, region: us-east-1, regionendpoint: $url, bucket: registry, secure: false, v4auth: true, chunksize: 5242880}
  delete: {enabled: true}
http: {addr: "127.0.0.1:$port", secret: secret}
END
  docker-registry serve registry.yml >registry.log 2>&1 &
  echo $! >registry.pid
  await "http://127.0.0.1:$port/v2/"
  "$long/python" "$tests/with_registry.py" "http://127.0.0.1:$port" || { tail -n 20 registry.log && return 1; }
  kill "$(cat registry.pid)"
}

# ---- what they share -------------------------------------------------------------------------------------------------

make_bucket() { "$quick/aws" --endpoint-url "$url" s3 mb "s3://$1" >/dev/null; }

make_files() { # FOLDER: files as people have them
  local n
  mkdir -p "$1/dir/deep er"
  for n in a 'b c' 'é+' '100%' "it's"; do printf 'file %s\n' "$n" >"$1/$n"; done
  for n in {1..20}; do printf '%s\n' "$n" >"$1/dir/$n"; done
  : >"$1/empty"
  head -c 300000 /dev/urandom >"$1/dir/deep er/medium"
}

run() { # CLIENT URL
  local started=$EPOCHREALTIME url=$2 status=0
  mkdir -p "$work/$1-${2%%:*}"
  # set -e does not work in a function that is part of a condition.
  (
    cd "$work/$1-${2%%:*}"
    set -euxo pipefail
    unset AWS_CA_BUNDLE
    if [ "${url%%:*}" = https ]; then export AWS_CA_BUNDLE=$work/front/pem; fi
    "client_$1"
  ) >"$work/log" 2>&1 </dev/null &
  wait $! || status=$?
  if [ -e "$work/$1-${2%%:*}/registry.pid" ]; then kill "$(cat "$work/$1-${2%%:*}/registry.pid")" 2>/dev/null || true; fi
  if [ "$status" = 0 ]; then
    awk -v name="$1" -v scheme="${2%%:*}" -v from="$started" -v to="$EPOCHREALTIME" 'BEGIN{printf "ok      %-10s %-5s %5.1f s\n", name, scheme, to - from}'
  else
    failed+=("$1")
    printf 'FAILED  %-10s %s\n' "$1" "${2%%:*}"
    tail -n 25 "$work/log" | cut -c1-300 | sed 's/^/          /'
  fi
}

failed=()
for client in $clients; do [[ " $ALL_CLIENTS " == *" $client "* ]] || { echo "all.sh: unknown client $client" >&2; exit 2; }; done
for client in $clients; do
  if [[ " $quick_clients " != *" $client "* ]]; then
    install_tools s3
    break
  fi
done
start_store
for client in $clients; do
  run "$client" "$http"
  # The others take no certificate of our own.
  if [ -n "$https" ] && [[ " $quick_clients " == *" $client "* ]]; then run "$client" "$https"; fi
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'all.sh: FAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf 'all.sh: every client works, in %d s\n' "$SECONDS"
