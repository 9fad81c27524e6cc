#!/usr/bin/env bash
# Runs one volume of a store: a stock nginx that serves DIR, accepts PUT and DELETE, and lists folders as JSON.
#
#   PORT=3001 ./volume.sh DIR     runs in the foreground until Ctrl-C or SIGTERM
#
#   DIR      the folder to serve (default: /tmp/volume1/)
#   PORT     the port to listen on (default: 3001)
#   BIND     the address to listen on (default: all addresses, IPv4 and IPv6)
#   AUTH     an htpasswd file; every request then needs basic authentication
#   SECRET   a file of one or two secrets, newest first (mkv secret FILE makes it); every request then needs a signature
#            by one of them, and AUTH only decides about logins
#   WORKERS  the number of nginx workers (default: 1, or half of the cores if there are four or more, at most 8)
#
# nginx writes an upload to a temporary file and renames it once it is complete. A rename works only within one disk, so
# DIR and each DIR/svXX that exists at start get their own .nginx/temp folder. Restart this script after mounting a disk.
# DIR/.nginx also holds nginx.conf, nginx.pid, the lock, and space.json: how full the disks are, every 10 s anew, which
# the master reads at /.space.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # Debian installs nginx in /usr/sbin, which is not in an ordinary user's PATH
umask 022

die() {
  printf 'volume.sh: %s\n' "$*" >&2
  exit 1
}

check_tools() {
  local tool
  for tool in nginx curl flock setpriv; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install nginx curl util-linux"
  done
}

# Sets me, dir, port, bind, auth and secrets.
read_settings() {
  me=$(id -un 2>/dev/null || id -u)
  dir=${1:-/tmp/volume1/} port=${PORT:-3001} bind=${BIND:-} auth=${AUTH:-}
  if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then die "PORT=$port is not a port from 1 to 65535"; fi
  if [[ $bind == *:* ]]; then bind="[${bind//[\[\]]/}]"; fi
  mkdir -p -- "$dir" 2>/dev/null || die "$me cannot create $dir: create it and chown it to $me, or choose another folder"
  dir=$(cd -- "$dir" 2>/dev/null && pwd -P) || die "$me cannot enter $dir: chown it to $me, or choose another folder"
  if [ -n "$auth" ]; then
    [ -f "$auth" ] || die "AUTH=$auth is not a file: create it with htpasswd -B -c '$auth' USER"
    auth=$(realpath -- "$auth")
  fi
  read_secrets
  case $dir$auth in
    *[\"\\\$]* | *$'\n'*) die "nginx accepts no \", \\, \$ or newline in a path: rename $dir $auth" ;;
  esac
}

# Sets secrets, which has no elements without SECRET.
read_secrets() {
  local secret
  secrets=()
  if [ -z "${SECRET:-}" ]; then return; fi
  [ -r "$SECRET" ] || die "$me cannot read SECRET=$SECRET: create it with mkv secret '$SECRET', or chown it to $me"
  (((8#$(stat -Lc %a -- "$SECRET") & 7) == 0)) || die "SECRET=$SECRET is open to every user: chmod 600 '$SECRET'"
  mapfile -t secrets <"$SECRET"
  if ((${#secrets[@]} < 1 || ${#secrets[@]} > 2)); then die "SECRET=$SECRET must have one or two lines: mkv secret makes one"; fi
  for secret in "${secrets[@]}"; do
    [[ $secret =~ ^[A-Za-z0-9+/_=-]{32,256}$ ]] ||
      die "SECRET=$SECRET must have 32 to 256 of A-Z a-z 0-9 + / - _ = on each line: mkv secret makes such a line"
  done
}

# Sets disks: the folders that get a temporary folder.
find_disks() {
  local folder
  disks=("$dir")
  for folder in "$dir"/sv*/; do
    if [[ ${folder%/} =~ /sv[0-9A-F]{2,}$ ]]; then disks+=("${folder%/}"); fi
  done
}

# Sets worker: the user that nginx's workers run as. For an ordinary user, that is the user itself. For root, it is the
# owner of the blobs; in a new store, the owner of the folder, or nginx's usual user if root owns the folder.
choose_worker() {
  local blobs closed
  worker=$me
  if [ "$me" = root ]; then
    blobs=$(find -H "${disks[@]}" -mindepth 1 -maxdepth 1 -type d -name '[0-9a-f][0-9a-f]' -print -quit)
    worker=$(stat -c %U -- "${blobs:-$dir}")
    if [ -z "$blobs" ] && [ "$worker" = root ]; then
      for worker in www-data nginx nobody; do if id "$worker" >/dev/null 2>&1; then break; fi; done
    fi
    id "$worker" >/dev/null 2>&1 || die "the owner of ${blobs:-$dir} has no name on this machine: chown -R www-data '$dir'"
    closed=$(find_closed_folder)
    if [ -n "$closed" ]; then # DIR is in /root or in a user's home: its owner is the least privileged user that works
      printf 'volume.sh: %s cannot enter %s, so nginx'\''s workers run as its owner\n' "$worker" "$closed" >&2
      worker=$(stat -c %U -- "$closed")
    fi
  fi
  closed=$(find_closed_folder)
  [ -z "$closed" ] || die "nginx's worker ($worker) cannot enter $closed: chmod o+x '$closed', or choose another folder"
}

# Runs a command with the worker's rights.
as_worker() {
  if [ "$me" = root ]; then set -- setpriv --reuid="$worker" --regid="$(id -g "$worker")" --init-groups -- "$@"; fi
  "$@"
}

# worker_cannot TEST PATH…: prints the paths for which a test, such as -x, fails with the worker's rights. One process
# tests all of them, since a process for each would make the start slow.
worker_cannot() {
  # shellcheck disable=SC2016
  as_worker bash -c 'for path in "${@:2}"; do test "$1" "$path" || printf "%s\n" "$path"; done' - "$@"
}

# Prints the topmost folder above a disk that the worker cannot enter, if there is one.
find_closed_folder() {
  local folder folders=()
  while read -r -d '' folder; do
    while [ "$folder" != / ]; do
      folder=${folder%/*} folder=${folder:-/}
      folders+=("$folder")
    done
  done < <(realpath -z -- "${disks[@]}")
  mapfile -d '' -t folders < <(printf '%s\0' "${folders[@]}" | LC_ALL=C sort -zu)
  worker_cannot -x "${folders[@]}" | head -n 1
}

make_private_folders() {
  local disk own
  for disk in "${disks[@]}"; do
    own=$disk/.nginx
    [ -d "$own" ] || mkdir -p -- "$own" 2>/dev/null ||
      die "$me cannot write in $disk: chown -R $me '$disk', or mount it read-write"
    # A worker could have put a link here; root must not follow it.
    if [ -L "$own" ] || ! [ -O "$own" ]; then
      die "$own does not belong to $me: start as $(stat -c %U -- "$own"), or rm -r '$own'"
    fi
  done
}

# nginx inherits descriptor 9, so the lock is held until the last nginx process has ended.
take_lock() {
  local holders
  touch -- "$dir/.nginx/lock"
  exec 9<"$dir/.nginx/lock"
  if flock -w 3 9 2>/dev/null; then return; fi
  if exec 9>>"$dir/.nginx/lock" && flock -n 9; then return; fi # NFS locks only a file that is open for writing
  holders=$(exec 9>&- && find -L /proc/[0-9]*/fd -samefile "$dir/.nginx/lock" 2>/dev/null |
    cut -d/ -f3 | grep -vx "$$" | sort -u | xargs) || true
  die "$dir is already being served${holders:+ (by process $holders)}: stop that volume, or choose another folder"
}

prepare_disks() {
  local disk number closed temps numbered=()
  temps=("${disks[@]/%//.nginx/temp}")
  mkdir -p -- "${temps[@]}"
  find -H "${disks[@]}" -maxdepth 1 -type f -name '.probe-*' -delete
  find "${temps[@]}" -type f -delete
  # ext4 puts a file near its folder and skips the inodes of files deleted within the last seconds. Several temporary
  # folders, kept apart by +T, make that search short. Other file systems have neither the search nor the flag.
  chattr +T "${temps[@]}" 2>/dev/null || true
  if [ "$me" = root ]; then
    find "${temps[@]}" -type d -exec chown -h -- "$worker:" {} +
    while read -r disk; do give_to_worker "$disk"; done < <(worker_cannot -w "${disks[@]}")
  fi
  for number in {0..9}; do numbered+=("${temps[@]/%//$number}"); done
  as_worker mkdir -p -- "${numbered[@]}" 2>/dev/null || true # on a full disk, nginx uses the folders that exist
  closed=$(worker_cannot -w "${disks[@]}" | head -n 1)
  [ -n "$closed" ] || closed=$(as_worker find -H "${disks[@]}" -mindepth 1 -maxdepth 1 -type d ! -writable \
    -name '[0-9a-f][0-9a-f]' -print -quit 2>/dev/null) || true
  [ -z "$closed" ] || die "nginx's worker ($worker) cannot write in $closed: chown -R $worker '$closed', or mount it read-write"
}

# Makes the worker the owner of a disk that is new or holds a store. A folder that holds anything else keeps its owner.
give_to_worker() {
  local disk=$1 other
  other=$(find -H "$disk" -mindepth 1 -maxdepth 1 ! -name '.*' ! -name 'sv[0-9A-F]*' ! -name '[0-9a-f][0-9a-f]' \
    ! -name 'lost+found' -print -quit)
  [ -z "$other" ] || die "$worker cannot write in $disk, which holds $other: chown $worker '$disk', or choose an empty folder"
  chown -- "$worker:" "$disk" 2>/dev/null || true
}

# Sets max_files, which nginx's workers inherit.
raise_file_limit() {
  max_files=$(ulimit -Hn)
  if [ "$max_files" = unlimited ] || ((max_files > 65536)); then max_files=65536; fi
  ulimit -n "$max_files"
}

# Sets probe, which makes the names of the files that test_disks writes impossible to guess.
write_config() {
  local cores listen=("${bind:+$bind:}$port")
  probe=$(tr -d - </proc/sys/kernel/random/uuid)
  cores=$(nproc)
  if [ -z "$bind" ] && grep -q . /proc/net/if_inet6 2>/dev/null; then listen+=("[::]:$port"); fi
  rm -f -- "$dir/.nginx/spare" # makes room for nginx.conf and nginx.pid on a full disk
  (umask 077 && cat >"$dir/.nginx/nginx.conf") 2>/dev/null <<END || die "cannot write $dir/.nginx: free some space on its disk"
daemon off;
$(if [ "$me" = root ]; then echo "user $worker $(id -gn "$worker");"; fi)
pid "$dir/.nginx/nginx.pid";
error_log stderr crit; # nginx logs a DELETE of a missing file as an error, but here it is routine
worker_processes ${WORKERS:-$((cores < 4 ? 1 : cores > 16 ? 8 : cores / 2))};
worker_shutdown_timeout 30s;
events { worker_connections $((max_files / 2)); }
http {
  access_log off; log_not_found off; server_tokens off;
  types { } default_type application/octet-stream;
  sendfile on; tcp_nopush on;
  # The master keeps its connections open; TCP keep-alive finds dead peers.
  keepalive_timeout 365d; keepalive_time 365d; keepalive_requests 1000000000; reset_timedout_connection on;
  client_max_body_size 0; client_body_buffer_size 256k;
  client_body_timeout 5m; # longer than the 60 s after which the master gives up on a stalled client
  $(printf '%s_temp_path "'"$dir/.nginx/temp"'" 1; ' client_body proxy fastcgi uwsgi scgi)
  $(secret_maps)
  server {
    $(printf 'listen %s backlog=4096 so_keepalive=10m::; ' "${listen[@]}")
    root "$dir"; merge_slashes off; absolute_redirect off;
    autoindex on; autoindex_format json; index .none; # a blob must not be served as an index page
    dav_methods PUT DELETE; create_full_put_path on; dav_access user:rw group:r all:r;
    $(access_rules)
    location ~ /\. { return 404; }     # no part of a blob's name begins with a dot
    location = /.space { alias "$dir/.nginx/space.json"; default_type application/json; dav_methods off; }
    location ~ /$ { dav_methods off; } # a DELETE of a folder would delete everything in it
    $(for disk in "${disks[@]}"; do disk_locations "$disk"; done)
  }
}
END
}

# Prints what access_rules compares a request with: its class, and the secret that it names by the start of its md5.
secret_maps() {
  local secret id
  if [ ${#secrets[@]} = 0 ]; then return; fi
  # shellcheck disable=SC2016 # nginx's variables
  printf 'map $request_method $class { GET r; HEAD r; default w; } map $arg_k $secret { default "%s"; ' "${secrets[0]}"
  for secret in "${secrets[@]}"; do
    id=$(printf '%s' "$secret" | md5sum)
    printf '%s "%s"; ' "${id:0:8}" "$secret"
  done
  printf '}\n'
}

# Prints the rules that let a request in. Without a signature every request gets 403, whatever it asks for; with one, the
# master asks at /.login who a user is. `try_files` answers after the password was checked, which `return` would not.
access_rules() {
  local password=${auth:+auth_basic volume; auth_basic_user_file \"$auth\";}
  if [ ${#secrets[@]} = 0 ]; then
    printf '%s\n' "$password"
    return
  fi
  # shellcheck disable=SC2016 # nginx's variables
  printf '%s ' 'secure_link $arg_s,$arg_e; secure_link_md5 "$arg_e$class$uri $secret";' 'if ($secure_link != 1) { return 403; }'
  if [ -n "$auth" ]; then printf 'location = /.login { %s try_files /.nginx/none =204; }' "$password"; fi
}

# Prints one disk's location for uploads, and one for the test file: the only name with a leading dot that is let through.
disk_locations() {
  local path=${1#"$dir"}/ temp="client_body_temp_path \"$1/.nginx/temp\" 1;"
  printf 'location %s { %s } location = %s.probe-%s { %s auth_basic off; }\n' "$path" "$temp" "$path" "$probe" "$temp"
}

# Finds what would keep nginx from starting. nginx itself would retry a busy port for 2.5 s and report it in six lines.
check_config_and_port() {
  local host message
  nginx_command=(nginx -e stderr -p "$dir/.nginx/" -c "$dir/.nginx/nginx.conf")
  message=$("${nginx_command[@]}" -t -q 2>&1 | head -n 1) || die "nginx cannot start: ${message#*#*: }"
  for host in "${bind:-127.0.0.1}" "${bind:-::1}"; do
    if (exec 3<>"/dev/tcp/${host//[\[\]]/}/$port") 2>/dev/null; then
      die "port $port is in use: stop the process that uses it (ss -ltnp 'sport = :$port'), or set PORT"
    fi
  done
}

# Sets nginx, the process id. Leaving this script stops nginx; if this script is killed, the kernel stops nginx.
start_nginx() {
  local host=${bind:-127.0.0.1}
  setpriv --pdeathsig TERM -- "${nginx_command[@]}" </dev/null &
  nginx=$!
  trap stop_nginx EXIT
  trap 'exit 0' TERM INT HUP
  until (exec 3<>"/dev/tcp/${host//[\[\]]/}/$port") 2>/dev/null; do
    kill -0 "$nginx" 2>/dev/null || die "nginx has ended; the reason is above"
    sleep 0.05
  done
}

# Writes space.json: bytes of each disk and what is free for ordinary users. Folders with the same mount number share one
# disk; "." is DIR itself. Numbers have a fixed width, so that on a full disk the file can be overwritten in its place.
write_space() {
  local disks size free mount name list='' json=$dir/.nginx/space
  local -A mounts=()
  find_disks
  while read -r size free mount; do
    name=${mount##* } mount=${mount% *}
    if ! [[ $size/$free =~ ^[0-9]+/[0-9]+$ ]]; then continue; fi # the heading
    mounts[$mount]=${mounts[$mount]:-${#mounts[@]}}
    printf -v list '%s{"name":"%s","mount":%4d,"size":%16d,"free":%16d},' "$list" "$name" "${mounts[$mount]}" "$size" "$free"
  done < <(cd -- "$dir" && disks=("${disks[@]##*/}") && df -B1 --output=size,avail,target,file -- . "${disks[@]:1}")
  printf -v list '{"time":%d,"disks":[%s]}\n' "$EPOCHSECONDS" "${list%,}"
  if printf %s "$list" >"$json.new" && mv -f -- "$json.new" "$json.json"; then return; fi
  printf %s "$list" 1<>"$json.json"
} 2>/dev/null

# Writes space.json every 10 s until nginx has ended, also if this script is killed. `read` waits without a process.
publish_space() {
  exec 8<> <(:) 9>&- </dev/null >/dev/null 2>&1
  while kill -0 "$nginx"; do
    read -r -t 10 -u 8 || true
    write_space || true
  done
}

# Sets workers, the process ids for stop_nginx. nginx has started all of them by the time the tests have passed.
find_workers() {
  workers=$(grep -lsx "PPid:[[:space:]]*$nginx" /proc/[0-9]*/status | cut -d/ -f3 || true)
}

# Stops nginx, and the workers that are left if nginx's master process was killed.
stop_nginx() {
  local pid
  trap '' TERM INT HUP
  kill -TERM "$nginx" 2>/dev/null || true
  wait "$nginx" || true
  if [ -n "${publisher:-}" ]; then kill "$publisher" 2>/dev/null || true; fi
  for pid in ${workers:-}; do
    if grep -qsx nginx "/proc/$pid/comm"; then kill -KILL "$pid" 2>/dev/null || true; fi
  done
}

# Sets query, the signature that lets a request for this path through. docs/formats.md has the grammar.
sign() { # METHOD PATH
  local expires=$((EPOCHSECONDS + 3600)) class=w md5 n i
  local alphabet=ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_
  query=
  if [ ${#secrets[@]} = 0 ]; then return; fi
  if [[ $1 =~ ^(GET|HEAD)$ ]]; then class=r; fi
  md5=$(printf '%s' "$expires$class$2 ${secrets[0]}" | md5sum)
  md5=${md5%% *}0 # 33 hex digits make 22 characters of base64url
  for ((i = 0; i < 33; i += 3)); do
    n=$((16#${md5:i:3}))
    query+=${alphabet:n >> 6:1}${alphabet:n & 63:1}
  done
  query="?e=$expires&s=$query"
}

# Prints the status of each request that standard input lists as METHOD PATH. curl reads the URLs from its standard
# input, because the list of processes would show the names and signatures.
ask() {
  local method path query separator=
  while read -r method path; do
    sign "$method" "$path"
    printf '%surl = "http://%s:%s%s"\nrequest = %s\n' "$separator" "${bind:-127.0.0.1}" "$port" "$path$query" "$method"
    printf '%s\n' silent 'noproxy = *' 'max-time = 20' 'output = /dev/null' 'write-out = "%{http_code}\n"' "${@}"
    if [ "$method" = PUT ]; then printf 'header = "Content-Length: 0"\n'; fi
    separator=$'next\n'
  done | curl -q -K -
}

# PUTs, GETs and DELETEs an empty file on each disk. The file is empty because a full disk can still serve its blobs.
test_disks() {
  local disk n=0 statuses
  mapfile -t statuses < <(for disk in "${disks[@]}"; do
    printf '%s\n' {PUT,GET,DELETE}" ${disk#"$dir"}/.probe-$probe"
  done | ask)
  for disk in "${disks[@]}"; do
    [ "${statuses[*]:n:3}" = '201 200 204' ] ||
      die "PUT, GET, DELETE in $disk returned ${statuses[*]:n:3}, not 201 200 204: check that $worker can write there"
    n=$((n + 3))
  done
}

# nginx refuses an unknown user with 401, and answers 403 or 500 if it cannot read the file.
test_auth() {
  local place=/
  if [ ${#secrets[@]} != 0 ]; then place=/.login; fi
  if [ -n "$auth" ] && [ "$(ask "user = \"$probe:\"" <<<"GET $place")" != 401 ]; then
    die "nginx's worker ($worker) cannot read $auth: chmod o+r '$auth', and o+x the folders above it"
  fi
}

wait_for_nginx() {
  local status=0
  while kill -0 "$nginx" 2>/dev/null; do status=0 && wait "$nginx" || status=$?; done
  [ "$status" = 0 ] || die "nginx has ended unexpectedly, with status $status"
}

main() {
  check_tools
  read_settings "$@"
  find_disks
  choose_worker
  make_private_folders
  take_lock
  prepare_disks
  raise_file_limit
  write_config
  check_config_and_port
  start_nginx
  test_disks
  test_auth
  find_workers
  write_space || true
  publish_space &
  publisher=$!
  head -c 64K /dev/zero 2>/dev/null >"$dir/.nginx/spare" || true # reserves room for the next start on a full disk
  printf 'volume on %s:%s serves %s\n' "${bind:-*}" "$port" "$dir"
  wait_for_nginx
}

main "$@"
