#!/usr/bin/env bash
# Runs a whole store on this machine. USAGE below describes the options.
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=tools.sh
source "$here/tools.sh"
umask 022 # nginx's workers may run as another user

USAGE="Runs a whole store on this machine: installs what is missing, builds mkv, and starts volumes and a master. Ctrl-C
stops them. The volumes answer only what the master has signed with the secret in the data folder.

./bringup.sh [options] [-- flags for the master]

  -d, --data DIR           folder for the index and the volumes (default: $here/data)
  -n, --volumes N          number of volumes (default: 3); each value is stored on three of them, or on all if there
                           are fewer than three
  -m, --masters N          number of masters (default: 1); several share an index in a PostgreSQL of their own, and an
                           nginx before them listens on the port; they and PostgreSQL use the ports from 100 above it
  -p, --port PORT          port of the master (default: 3000)
      --volume-port PORT   port of the first volume (default: 3001); the others use the ports after it
      --bind ADDR          address to listen on (default: 127.0.0.1); clients must be able to reach it, because the
                           master's redirects contain it"

# Sets data, count, masters, port, first_port, bind and master_flags.
read_options() {
  data=$here/data count=3 masters=1 port=3000 first_port=3001 bind=127.0.0.1
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) printf '%s\n' "$USAGE" && exit ;;
      --) shift && break ;;
      -d | --data | -n | --volumes | -m | --masters | -p | --port | --volume-port | --bind) [ -n "${2:-}" ] || fail "$1 needs a value" ;;&
      -d | --data) data=$2 ;;
      -n | --volumes) count=$2 ;;
      -m | --masters) masters=$2 ;;
      -p | --port) port=$2 ;;
      --volume-port) first_port=$2 ;;
      --bind) bind=$2 ;;
      *) fail "unknown option $1: see ./bringup.sh --help" ;;
    esac
    shift 2
  done
  master_flags=("$@")
}

check_options() {
  local number last_port
  for number in "$count" "$masters" "$port" "$first_port"; do
    if ! [[ $number =~ ^[1-9][0-9]{0,4}$ ]] || ((number > 65535)); then fail "$number is not a number from 1 to 65535"; fi
  done
  last_port=$((first_port + count - 1))
  if ((last_port > 65535 || (first_port <= port && port <= last_port))); then
    fail "the volumes' ports, $first_port to $last_port, include the master's or exceed 65535: set --port or --volume-port"
  fi
  case $bind in
    0.0.0.0 | :: | '[::]' | '*') fail "--bind $bind: redirects contain this address, so choose one that clients can reach" ;;
    *:*) bind="[${bind//[\[\]]/}]" ;;
  esac
}

# Runs before the build, which takes minutes.
check_ports() {
  local i tried ports=("$port")
  for ((i = 0; i < count; i++)); do ports+=($((first_port + i))); done
  if ((masters > 1)); then for ((i = 0; i <= masters; i++)); do ports+=($((port + 100 + i))); done; fi
  for tried in "${ports[@]}"; do
    if (exec 3<>"/dev/tcp/${bind//[\[\]]/}/$tried") 2>/dev/null; then
      fail "port $tried is in use: stop the process that uses it (ss -ltnp 'sport = :$tried'), or set --port or --volume-port"
    fi
  done
}

make_data_folder() {
  mkdir -p -- "$data" 2>/dev/null || fail "cannot create $data: choose another folder with --data"
  data=$(realpath -- "$data")
}

# From here on the script stops what it has started when it ends, in whatever way.
prepare_to_stop() {
  pids=()
  declare -gA names # pid: what the process is, for the last message
  ready=$(mktemp)
  trap stop EXIT
  trap 'exit 0' INT TERM HUP
}

# start NAME COMMAND…: starts a child in a session of its own, so that Ctrl-C reaches only this script. If this script is
# killed, the kernel sends the child a SIGTERM.
start() {
  setsid setpriv --pdeathsig TERM -- "${@:2}" </dev/null &
  pids+=("$!")
  names[$!]=$1
}

# Stops the children in reverse order: the master completes its requests before its volumes stop. A second Ctrl-C or
# SIGTERM kills the child that is being stopped.
# shellcheck disable=SC2317 # the trap calls it
stop() {
  local i pid signal
  trap 'kill -KILL -- "-$pid" 2>/dev/null || true' INT TERM HUP
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    pid=${pids[i]}
    for signal in TERM CONT; do kill "-$signal" -- "-$pid" 2>/dev/null || kill "-$signal" "$pid" 2>/dev/null || true; done
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  done
  rm -f -- "$ready"
}

# Builds mkv in a child, so that Ctrl-C stops the build as well.
build() {
  start "the build" "$here/mkv" -version >/dev/null
  wait "${pids[0]}" || fail "the build has failed; the reason is above"
  pids=()
}

# The volumes answer only requests that are signed with it.
make_secret() {
  [ -e "$data/secret" ] || "$here/mkv" secret "$data/secret" || exit 1
}

# Sets volumes, the list for the master.
start_volumes() {
  local i address
  volumes=
  for ((i = 0; i < count; i++)); do
    address=$bind:$((first_port + i))
    volumes+=${volumes:+,}$address
    start "the volume on $address" env PORT="$((first_port + i))" BIND="$bind" SECRET="$data/secret" \
      "$here/volume.sh" "$data/volume$((i + 1))" >"$ready"
    until [ -s "$ready" ]; do
      kill -0 "$!" 2>/dev/null || exit 1 # volume.sh has printed the reason
      sleep 0.05
    done
    cat "$ready" && : >"$ready"
  done
}

# Sets as_postgres, the command that runs a program as a user whom PostgreSQL accepts: it refuses root.
start_database() {
  local bin home=$data/postgres
  bin=$(postgres_bin)
  as_postgres=()
  if [ "$(id -u)" = 0 ]; then as_postgres=(setpriv --reuid=postgres --regid=postgres --clear-groups); fi
  if [ ! -e "$home/data/PG_VERSION" ]; then
    mkdir -p -- "$home"
    "$here/mkv" secret >"$home/password"
    chmod 600 "$home/password"
    if [ "$(id -u)" = 0 ]; then chown -R postgres: "$home"; fi
    "${as_postgres[@]}" "$bin/initdb" -D "$home/data" -U mkv -A scram-sha-256 --pwfile="$home/password" -E UTF8 --locale=C \
      >"$ready" || fail "PostgreSQL cannot use $home: choose a --data folder that the user postgres can enter"
    : >"$ready"
  fi
  PGPASSWORD=$(cat "$home/password")
  export PGPASSWORD
  start "the database" setpriv "${as_postgres[@]:1}" --pdeathsig INT -- "$bin/postgres" -D "$home/data" -k "$home" \
    -h "${bind//[\[\]]/}" -p "$((port + 100))" -c log_min_messages=fatal
  until "$bin/pg_isready" -q -U mkv -h "${bind//[\[\]]/}" -p "$((port + 100))"; do
    kill -0 "$!" 2>/dev/null || fail "PostgreSQL has ended; the reason is above"
    sleep 0.1
  done
  "$bin/psql" -q -h "${bind//[\[\]]/}" -p "$((port + 100))" -U mkv -d postgres -c 'CREATE DATABASE mkv' 2>/dev/null || true
}

# start_master NAME PORT DB
start_master() {
  start "$1" "$here/mkv" server -db "$3" -volumes "$volumes" -replicas "$((count < 3 ? count : 3))" \
    -secret "$data/secret" -host "${bind//[\[\]]/}" -port "$2" "${master_flags[@]}"
  until curl -q -s --noproxy '*' -o /dev/null --max-time 5 "http://$bind:$2/?list&limit=1"; do
    kill -0 "$!" 2>/dev/null || fail "$1 has ended; the reason is above"
    sleep 0.1
  done
}

start_masters() {
  local i
  for ((i = 1; i <= masters; i++)); do
    start_master "master $i" "$((port + 100 + i))" "postgres://mkv@$bind:$((port + 100))/mkv?sslmode=disable"
  done
}

# A read goes to the next master where one does not answer; a write is never sent twice.
start_front() {
  local i servers=
  mkdir -p -- "$data/front"
  for ((i = 1; i <= masters; i++)); do servers+="server $bind:$((port + 100 + i)); "; done
  cat >"$data/front/nginx.conf" <<END
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
daemon off;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
  upstream masters { ${servers}keepalive 16; }
  map \$request_method \$read { GET 1; HEAD 1; default 0; }
  server {
    listen $bind:$port;
    merge_slashes off;
    client_max_body_size 0;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host \$http_host;
    proxy_request_buffering off;
    proxy_redirect off;
    proxy_connect_timeout 1s;
    proxy_read_timeout 300s;
    location / {
      error_page 418 = @read;
      if (\$read) { return 418; }
      proxy_pass http://masters;
      proxy_next_upstream off;
    }
    location @read {
      proxy_pass http://masters;
      proxy_next_upstream error timeout http_503;
    }
  }
}
END
  start "the nginx before the masters" nginx -p "$data/front" -e stderr -c "$data/front/nginx.conf"
  until curl -q -s -f --noproxy '*' -o /dev/null --max-time 5 "http://$bind:$port/?ready"; do
    kill -0 "$!" 2>/dev/null || fail "nginx has ended; the reason is above"
    sleep 0.1
  done
}

print_example() {
  if ((masters > 1)); then
    echo "$masters masters behind $bind:$port keep their index in a PostgreSQL in $data/postgres"
  else
    echo "master on $bind:$port keeps its index in $data/index"
  fi
  cat <<END

  curl -L -X PUT -d bigswag http://$bind:$port/wehave
  curl -L http://$bind:$port/wehave

Ctrl-C stops the store; its data stays in $data. Other commands of mkv need -secret $data/secret
END
}

wait_for_failure() {
  local ended=
  wait -n -p ended "${pids[@]}" || true
  fail "${names[$ended]} has ended unexpectedly; stopping the store"
}

main() {
  read_options "$@"
  check_options
  if ((masters > 1)); then install_tools masters; else install_tools build; fi
  check_ports
  make_data_folder
  prepare_to_stop
  build
  make_secret
  if ((masters > 1)); then start_database; fi
  start_volumes
  if ((masters > 1)); then
    start_masters
    start_front
  else
    start_master "the master" "$port" "$data/index"
  fi
  print_example
  wait_for_failure
}

main "$@"
