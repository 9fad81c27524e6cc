#!/usr/bin/env bash
# One volume of a store: stock nginx that serves DIR, takes PUT and DELETE, and lists folders as JSON.
#
#   PORT=3001 ./volume.sh DIR     in the foreground, until Ctrl-C or SIGTERM
#
#   DIR      /tmp/volume1/        BIND     address to listen on (default: all, IPv4 and IPv6)
#   PORT     3001                 AUTH     htpasswd file: basic authentication for everything
#                                 WORKERS  nginx workers (default: 1; from four cores on half of them, at most 8)
#
# DIR/.nginx is nginx's own: nginx.conf, nginx.pid, lock, temp/. An upload is written to temp/ and published by rename,
# which needs one disk, so each svXX folder that is there at start has its own: after mounting a disk, start anew.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # an ordinary user's PATH lacks Debian's nginx
umask 022
dir=${1:-/tmp/volume1/} port=${PORT:-3001} bind=${BIND:-} auth=${AUTH:-} me=$(id -un 2>/dev/null || id -u)

die() {
  printf 'volume.sh: %s\n' "$*" >&2
  exit 1
}
for tool in nginx curl flock setpriv; do
  command -v "$tool" >/dev/null || die "$tool is missing: apt-get install nginx curl util-linux"
done
if ! [[ $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then die "PORT=$port is no port: 1 to 65535"; fi
mkdir -p -- "$dir" 2>/dev/null || die "$me may not make $dir: make it and chown it to $me, or name another folder"
dir=$(cd -- "$dir" 2>/dev/null && pwd -P) || die "$me may not enter $dir: chown it to $me, or name another folder"
if [ -n "$auth" ]; then
  [ -f "$auth" ] || die "AUTH=$auth is no file: make it with htpasswd -B -c '$auth' USER"
  auth=$(realpath -- "$auth")
fi
case $dir$auth in *[\"\\\$]* | *$'\n'*) die "nginx takes no \", \\, \$ or newline in a path: rename $dir $auth" ;; esac

disks=("$dir") # the folders that get a temporary folder
for sub in "$dir"/sv*/; do
  if [[ ${sub%/} =~ /sv[0-9A-F]{2,}$ ]]; then disks+=("${sub%/}"); fi
done

# Whose rights nginx's workers have: an ordinary user's own; root's are given away wherever that can be.
worker=$me
as_worker() {
  if [ "$me" = root ]; then set -- setpriv --reuid="$worker" --regid="$(id -g "$worker")" --init-groups -- "$@"; fi
  "$@"
}
closed() { # prints the topmost folder above a disk that the worker may not enter, if there is one
  local disk at found
  for disk in "${disks[@]}"; do
    at=$(realpath -- "$disk") found=
    while [ "$at" != / ]; do
      at=$(dirname -- "$at")
      as_worker test -x "$at" || found=$at
    done
    if [ -n "$found" ]; then printf '%s\n' "$found" && return; fi
  done
}
if [ "$me" = root ]; then
  # A store goes on as the owner of its blobs; a new one as the folder's owner, or else as nginx's usual user.
  blobs=$(find -H "${disks[@]}" -mindepth 1 -maxdepth 1 -type d -name '[0-9a-f][0-9a-f]' -print -quit)
  worker=$(stat -c %U -- "${blobs:-$dir}")
  if [ -z "$blobs" ] && [ "$worker" = root ]; then
    for worker in www-data nginx nobody; do if id "$worker" >/dev/null 2>&1; then break; fi; done
  fi
  id "$worker" >/dev/null 2>&1 || die "the owner of ${blobs:-$dir} has no name here: chown -R www-data '$dir'"
  way=$(closed)
  if [ -n "$way" ]; then # a clone in /root or in a user's home: that user's rights are the least that will do
    printf 'volume.sh: %s may not enter %s, so its owner runs nginx'\''s workers\n' "$worker" "$way" >&2
    worker=$(stat -c %U -- "$way")
  fi
fi
way=$(closed)
[ -z "$way" ] || die "nginx's worker ($worker) may not enter $way: chmod o+x '$way', or name another folder"

for disk in "${disks[@]}"; do
  own=$disk/.nginx
  mkdir -p -- "$own" 2>/dev/null || die "$me may not write in $disk: chown -R $me '$disk', or mount it read-write"
  # Root follows no link that a worker may have planted there.
  if [ -L "$own" ] || ! [ -O "$own" ]; then die "$own is not $me's: start as $(stat -c %U -- "$own"), or rm -r '$own'"; fi
done
touch -- "$dir/.nginx/lock"
exec 9<"$dir/.nginx/lock" # nginx inherits it: held until its last process is gone
if ! flock -w 3 9 2>/dev/null && { exec 9>>"$dir/.nginx/lock" && ! flock -n 9; }; then # NFS wants it open for writing
  who=$(exec 9>&- && find -L /proc/[0-9]*/fd -samefile "$dir/.nginx/lock" 2>/dev/null | cut -d/ -f3 | grep -vx "$$" | sort -u | xargs) || true
  die "$dir is served already${who:+ (by process $who)}: stop that volume, or name another folder"
fi
for disk in "${disks[@]}"; do
  temp=$disk/.nginx/temp
  mkdir -p -- "$temp"
  find -H "$disk" -maxdepth 1 -type f -name '.probe-*' -delete
  find "$temp" -type f -delete
  # ext4 places a file near its folder, stepping over what was deleted there in the last seconds: the more folders, and
  # the farther apart (+T), the faster files come and go. Other file systems have neither that habit nor the flag.
  chattr +T "$temp" 2>/dev/null || true
  if [ "$me" = root ]; then
    find "$temp" -type d -exec chown -h -- "$worker:" {} +
    # The worker is given a new folder or a store's, never one that holds other things.
    other=$(find -H "$disk" -mindepth 1 -maxdepth 1 ! -name '.*' ! -name 'sv[0-9A-F]*' ! -name '[0-9a-f][0-9a-f]' \
      ! -name 'lost+found' -print -quit)
    if ! as_worker test -w "$disk"; then
      [ -z "$other" ] || die "$worker may not write in $disk, which holds $other: chown $worker '$disk', or name a folder of its own"
      chown -- "$worker:" "$disk" 2>/dev/null || true
    fi
  fi
  as_worker mkdir -p -- "$temp/"{0..9} 2>/dev/null || true # on a full disk nginx will do with those there are
  shut=$(as_worker find -H "$disk" -maxdepth 1 -type d ! -writable \( -samefile "$disk" -o -name '[0-9a-f][0-9a-f]' \) \
    -print -quit 2>/dev/null) || true
  [ -z "$shut" ] || die "nginx's worker ($worker) may not write in $shut: chown -R $worker '$disk', or mount it read-write"
done

cores=$(nproc) files=$(ulimit -Hn) secret=$(tr -d - </proc/sys/kernel/random/uuid)
if [ "$files" = unlimited ] || ((files > 65536)); then files=65536; fi
ulimit -n "$files"
if [[ $bind == *:* ]]; then bind="[${bind//[\[\]]/}]"; fi
listen=("${bind:+$bind:}$port")
if [ -z "$bind" ] && grep -q . /proc/net/if_inet6 2>/dev/null; then listen+=("[::]:$port"); fi
locations() { # one disk: its uploads, and the only name with a leading dot that is let through
  local path=${1#"$dir"}/ temp="client_body_temp_path \"$1/.nginx/temp\" 1;"
  printf 'location %s { %s } location = %s.probe-%s { %s auth_basic off; }\n' "$path" "$temp" "$path" "$secret" "$temp"
}
rm -f -- "$dir/.nginx/spare" # room for nginx.conf and nginx.pid on a disk that is full
(umask 077 && cat >"$dir/.nginx/nginx.conf") 2>/dev/null <<END || die "$dir/.nginx cannot be written: make room on its disk"
daemon off;
$(if [ "$me" = root ]; then echo "user $worker $(id -gn "$worker");"; fi)
pid "$dir/.nginx/nginx.pid";
error_log stderr crit; # a DELETE that finds nothing is routine, and an error to nginx
worker_processes ${WORKERS:-$((cores < 4 ? 1 : cores > 16 ? 8 : cores / 2))};
worker_shutdown_timeout 30s;
events { worker_connections $((files / 2)); }
http {
  access_log off; log_not_found off; server_tokens off;
  types { } default_type application/octet-stream;
  sendfile on; tcp_nopush on;
  # The master's connections stay open; dead peers are found by TCP's own keep-alive.
  keepalive_timeout 365d; keepalive_time 365d; keepalive_requests 1000000000; reset_timedout_connection on;
  client_max_body_size 0; client_body_buffer_size 256k;
  client_body_timeout 5m; # the master, with its 60 s, is the one who gives up on a stalled client
  $(printf '%s_temp_path "'"$dir/.nginx/temp"'" 1; ' client_body proxy fastcgi uwsgi scgi)
  server {
    $(printf 'listen %s backlog=4096 so_keepalive=10m::; ' "${listen[@]}")
    root "$dir"; merge_slashes off; absolute_redirect off;
    autoindex on; autoindex_format json; index .none; # no blob is taken for an index page
    dav_methods PUT DELETE; create_full_put_path on; dav_access user:rw group:r all:r;
    ${auth:+auth_basic volume; auth_basic_user_file \"$auth\";}
    location ~ /\. { return 404; }     # no part of a blob's name begins with a dot; listings hide those that do
    location ~ /$ { dav_methods off; } # DELETE of a folder would take all that is in it
    $(for disk in "${disks[@]}"; do locations "$disk"; done)
  }
}
END
run=(nginx -e stderr -p "$dir/.nginx/" -c "$dir/.nginx/nginx.conf")
said=$("${run[@]}" -t -q 2>&1 | head -n 1) || die "nginx will not start: ${said#*#*: }"
for host in "${bind:-127.0.0.1}" "${bind:-::1}"; do # nginx itself would try for 2.5 s and say it in six lines
  if (exec 3<>"/dev/tcp/${host//[\[\]]/}/$port") 2>/dev/null; then
    die "port $port is in use: stop what listens there (ss -ltnp 'sport = :$port'), or set PORT"
  fi
done

stop() { # nginx, and the workers that a killed nginx has left
  trap '' TERM INT HUP
  kill -TERM "$nginx" 2>/dev/null || true
  wait "$nginx" || true
  for pid in ${children:-}; do
    if grep -qsx nginx "/proc/$pid/comm"; then kill -KILL "$pid" 2>/dev/null || true; fi
  done
}
setpriv --pdeathsig TERM -- "${run[@]}" </dev/null & # should this script be killed, the kernel stops nginx
nginx=$!
trap stop EXIT
trap 'exit 0' TERM INT HUP

# A real PUT, GET and DELETE on each disk, of an empty file: a full disk may still serve what it holds.
ask() { # PATH [curl's options]: prints the body and the status; the secret stays out of the list of processes
  curl -q -s --noproxy '*' --max-time 20 -w '%{http_code} ' -K - "${@:2}" <<<"url = \"http://${bind:-127.0.0.1}:$port$1\""
}
until ask "/.probe-$secret" >/dev/null; do
  kill -0 "$nginx" 2>/dev/null || die "nginx has ended, for the reason it gave above"
  sleep 0.05
done
for disk in "${disks[@]}"; do
  probe=${disk#"$dir"}/.probe-$secret
  got=$(ask "$probe" -X PUT -H 'Content-Length: 0' && ask "$probe" && ask "$probe" -X DELETE) || true
  [ "$got" = '201 200 204 ' ] || die "PUT, GET, DELETE in $disk gave $got, not 201 200 204: see that $worker may write there"
done
if [ -n "$auth" ] && [ "$(ask / -o /dev/null -u "$secret:")" != '401 ' ]; then
  die "nginx's worker ($worker) cannot read $auth: chmod o+r '$auth', and o+x the folders it is in"
fi
head -c 64K /dev/zero 2>/dev/null >"$dir/.nginx/spare" || true
children=$(grep -lsx "PPid:[[:space:]]*$nginx" /proc/[0-9]*/status | cut -d/ -f3 || true)
printf 'volume on %s:%s serves %s\n' "${bind:-*}" "$port" "$dir"

status=0
while kill -0 "$nginx" 2>/dev/null; do status=0 && wait "$nginx" || status=$?; done
[ "$status" = 0 ] || die "nginx has ended by itself, with status $status"
