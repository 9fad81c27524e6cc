#!/usr/bin/env bash
# What a container of deploy/Dockerfile runs, chosen by its command. The data are in /data.
#
#   volume         a volume on PORT (3001); AUTH and WORKERS as for volume.sh
#   master FLAGS   mkv server with these flags, on PORT (3000)
#   front          nginx with front.conf on PORT (8443), before the master at MASTER (127.0.0.1:3000); its certificate
#                  is /data/mkv.pem with /data/mkv.key, a self-signed one unless they are there
#   health         exits with 0 if the service of this container answers
#   other words    run as they are: mkv -db /data -volumes LIST verify
#
# BIND is the address to listen on (all).
# Outside a container, DATA and RUN name the folders that stand for /data and /tmp.
set -euo pipefail
data=${DATA:-/data} run=${RUN:-/tmp} bind=${BIND:-}
host=${BIND:-127.0.0.1} # for requests from inside

fail() {
  printf 'container.sh: %s\n' "$*" >&2
  exit 1
}

# A status under 500: a login that is asked for shows a service that works.
check_health() {
  local url status
  url=$(cat -- "$run/health" 2>/dev/null) || fail 'nothing runs here: start with volume, master or front'
  status=$(curl -q -s -k --noproxy '*' --max-time 4 -o /dev/null -w '%{http_code}' "$url") || fail "no answer from $url"
  ((status < 500)) || fail "$url answers $status: read the log of this container"
}

make_certificate() {
  if [ -e "$data/mkv.pem" ]; then return; fi
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=$host" \
    -keyout "$data/mkv.key" -out "$data/mkv.pem" 2>/dev/null ||
    fail "no certificate can be made in $data: make it writable, or put mkv.pem and mkv.key there"
  printf 'container.sh: the certificate is self-signed; replace %s with one that clients trust\n' "$data/mkv.pem" >&2
}

# front.conf with the lines marked HERE set for this container, and with temporary folders that nginx can make.
configure_front() { # PORT
  local conf=/usr/share/mkv/front.conf temp
  temp=$(printf '%s_temp_path %s/temp; ' client_body "$run" proxy "$run" fastcgi "$run" uwsgi "$run" scgi "$run")
  if [ ! -e "$conf" ]; then conf=$(dirname -- "${BASH_SOURCE[0]}")/front.conf; fi
  sed -e "s|server 127.0.0.1:3000;|server ${MASTER:-127.0.0.1:3000};|" -e "s|listen 443 |listen ${bind:+$bind:}$1 |" \
    -e "s|/etc/ssl/mkv\.|$data/mkv.|" \
    -e "s|^http {|http { $temp|" "$conf"
}

start_front() { # PORT
  make_certificate
  configure_front "$1" >"$run/front.conf"
  exec nginx -e stderr -c "$run/front.conf" -g "daemon off; pid $run/front.pid; error_log stderr;"
}

case ${1:-} in
  volume)
    printf 'http://%s:%s/' "$host" "${PORT:=3001}" >"$run/health"
    export PORT BIND=$bind
    exec mkv-volume "$data"
    ;;
  master)
    printf 'http://%s:%s/?list&limit=1' "$host" "${PORT:=3000}" >"$run/health"
    exec mkv server -db "$data" -host "$bind" -port "$PORT" "${@:2}"
    ;;
  front)
    printf 'https://%s:%s/?list&limit=1' "$host" "${PORT:=8443}" >"$run/health"
    start_front "$PORT"
    ;;
  health) check_health ;;
  '') fail 'say what to run: volume, master FLAGS, front, or a command such as mkv -help' ;;
  *) exec "$@" ;;
esac
