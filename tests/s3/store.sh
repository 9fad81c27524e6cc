# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by tests/s3/all.sh. A store of three volumes, its S3 endpoint, and the front with TLS before it.
#
#   start_store    sets http and https, the URLs of both, and exports what S3 clients read from the environment
#   stop_store     stops what start_store has started
#
# With ENDPOINT, KEY and SECRET in the environment it uses that server, and there is no https. Needs $work, a folder.

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
release=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}/release
pids=()

start_store() {
  local n host names=
  https=
  if [ -n "${ENDPOINT:-}" ]; then
    http=$ENDPOINT
  else
    host=127.$((RANDOM % 200 + 20)).$((RANDOM % 256)).1 # no other program uses this address: all its ports are free
    for n in 1 2 3; do
      start BIND="$host" PORT=$((3000 + n)) "$here/volume.sh" "$work/volume$n"
      names+=${names:+,}$host:$((3000 + n))
    done
    for n in 1 2 3; do await "http://$host:$((3000 + n))/"; done
    "$release/mkv" s3key >"$work/keys"
    chmod 600 "$work/keys"
    read -r KEY SECRET <"$work/keys"
    http=http://$host:9000
    start "$release/mkv" -db "$work/db" -volumes "$names" -host "$host" -port 3000 -s3 9000 -s3keys "$work/keys" -accel server
    await "http://$host:3000/?ready"
    start_front "$host"
  fi
  export AWS_ACCESS_KEY_ID=$KEY AWS_SECRET_ACCESS_KEY=$SECRET AWS_DEFAULT_REGION=us-east-1 AWS_REGION=us-east-1
  export AWS_EC2_METADATA_DISABLED=true AWS_MAX_ATTEMPTS=1 AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null
  export no_proxy='*' HOME=$work
}

# start_front HOST: deploy/front.conf with its lines marked HERE and those of S3 filled in.
start_front() {
  local dir=$work/front
  mkdir "$dir"
  openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mkv -addext "subjectAltName=IP:$1" \
    -keyout "$dir/key" -out "$dir/pem" 2>/dev/null
  sed -e "s|/etc/ssl/mkv\.|$dir/|" -e "s|listen 443|listen $1:4443|" -e "s|# listen 9443|listen $1:9443|" -e "s|server 127.0.0.1:|server $1:|" \
    -e 's|^http {|&\n  client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;|' \
    "$here/deploy/front.conf" >"$dir/nginx.conf"
  start nginx -e stderr -p "$dir" -c "$dir/nginx.conf" -g "daemon off; pid $dir/pid;"
  https=https://$1:9443
  await "$https/" --cacert "$dir/pem"
}

start() { # [VARIABLE=VALUE…] COMMAND…
  env "$@" >>"$work/servers.log" 2>&1 </dev/null &
  pids+=($!)
}

await() { # URL [CURL OPTIONS]: until the server answers
  local n
  for ((n = 0; n < 300; n++)); do
    if curl -q -s --noproxy '*' -o "$work/answer" "$@"; then return; fi
    sleep 0.1
  done
  tail -n 20 "$work/servers.log" >&2
  printf 'tests/s3: %s does not answer\n' "$1" >&2
  exit 1
}

stop_store() {
  local pid
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" || true; done
  pids=()
}
