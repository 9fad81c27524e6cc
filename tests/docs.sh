#!/usr/bin/env bash
# Usage: tests/docs.sh [DOCUMENT…]
#
# Runs every command line of README.md and docs/*.md against a real store, and compares the output that they show.
# Each document has a folder set up like a reader's clone, and machines that are addresses of the loopback network.
#
# The kinds of fenced blocks; any other kind is a failure, so that no command line escapes:
#   sh      commands, run in order in one shell for each document, on the master's machine or on those that a line like
#           "# on vol1, vol2" names. "# exit status N" at the end of a command says how it ends.
#   output  the standard output of the block above it. … stands for any text, on a line of its own for any lines.
#   ini     a file, whose first line says where it goes: "# /etc/default/mkv on the master"
#   text, abnf, yaml    nothing to run
# A comment <!-- test: COMMANDS --> holds commands for this script: they make the damage that the next block repairs.
#
# Changed before a command runs: host names, folders such as /srv (each machine has its own), and how long rebalance
# waits. ./test.sh is not run. Functions replace commands that need a whole machine: systemctl runs the ExecStart=
# of a unit, mount empties a folder, apt-get, chattr, mkfs.ext4, umount, useradd, git, cargo and docker do nothing.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
release=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}/release
umask 022 # nginx's worker may be another user
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY AUTH SECRET WORKERS PORT
dir=$(mktemp -d "${TMPDIR:-/tmp}/mkv-docs.XXXXXX")
chmod 755 "$dir"
export CURL_HOME=$dir PATH=$HOME/.cache/mkv/s3/bin:$PATH:/usr/sbin:/sbin
export AWS_EC2_METADATA_DISABLED=true AWS_CONFIG_FILE=$dir/aws AWS_SHARED_CREDENTIALS_FILE=$dir/aws RCLONE_CONFIG=$dir/rclone.conf
net=127.$((RANDOM % 200 + 20)).$((RANDOM % 256)) # no other program uses this network: all its ports are free
machine=master at='the start' finished=
declare -A services=() # MACHINE/NAME of those that run, and their process ids

# ---- services ------------------------------------------------------------------------------------------------------

# shellcheck disable=SC2317 # the trap calls it
leave() {
  local status=$?
  if [ -z "$finished" ]; then
    tail -n 30 "$dir"/{command,stdout,stderr} "$dir"/*.log >&4 2>/dev/null || true
    printf 'docs.sh: FAILED at %s\n' "$at" >&4
    if [ "$status" = 0 ]; then status=1; fi
  fi
  stop_all
  rm -rf -- "$dir"
  exit "$status"
}
exec 4>&2 # a command's own standard error goes elsewhere
trap leave EXIT
trap 'exit 1' INT TERM HUP

fail() {
  printf 'docs.sh: %s\n' "$*" >&4
  exit 1
}

await() { # COMMAND…: until it succeeds, for 20 s
  local n
  for ((n = 0; n < 400; n++)); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.05
  done
  fail "no success in 20 s: $*"
}

background() { # NAME COMMAND…: starts a service of this machine and waits until it can be used
  local name=$machine/$1 log=$dir/$machine-$1.log
  stop "$name"
  : >"$log"
  (exec "${@:2}") >>"$log" 2>&1 </dev/null 3<&- 4>&- &
  services[$name]=$!
  case $1 in
    mkv-volume*) await grep -q ' serves ' "$log" ;;
    *) await curl -q -s -o "$dir/list" "http://$(address master):3000/?list&limit=1" ;;
  esac
}

stop() { # MACHINE/NAME
  local pid=${services[$1]:-}
  if [ -z "$pid" ]; then return; fi
  unset "services[$1]"
  kill -TERM "$pid" 2>/dev/null || true
  wait "$pid" || true
}

stop_all() { # the masters before their volumes
  local name
  for name in "${!services[@]}"; do if [[ $name != */mkv-volume* ]]; then stop "$name"; fi; done
  for name in "${!services[@]}"; do stop "$name"; done
}

# ---- commands that need a whole machine ----------------------------------------------------------------------------

sudo() {
  if [ "$1" = -u ]; then shift 2; fi
  "$@"
}
apt-get() { :; }
chattr() { :; }
mkfs.ext4() { :; }
umount() { :; }
useradd() { :; }
git() { :; }
cargo() { :; }
docker() { :; }
install() { # without -o: the user is not there
  local words=()
  while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then shift; else words+=("$1"); fi
    shift
  done
  command install "${words[@]}"
}
mount() { find "$1" -mindepth 1 -delete; } # an empty disk

nginx() { # -t: checks the configuration that was installed
  local conf=$dir/front/nginx.conf
  mkdir -p "$dir/front"
  openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=mkv -keyout "$dir/front/key" -out "$dir/front/pem" 2>/dev/null
  sed -e "s|/etc/ssl/mkv\.|$dir/front/|" -e "s|listen 443|listen $(address "$machine"):4443|" "$(root "$machine")/etc/nginx/nginx.conf" >"$conf"
  command nginx -q -e stderr -p "$dir/front" -c "$conf" -g "pid $dir/front/pid;" "$@"
}

systemctl() { # VERB [--now] [UNIT [MACHINE]]
  local verb=$1 machine=$machine
  shift
  if [ "${1:-}" = --now ]; then shift; fi
  machine=${2:-$machine}
  case $verb:${1:-} in
    daemon-reload: | *:nginx | *:prometheus) ;;
    enable:* | start:* | restart:*) run_unit "$1" ;;
    stop:*) stop "$machine/$1" ;;
    *) fail "systemctl $verb is not known here" ;;
  esac
}

run_unit() { # UNIT: its Environment=, EnvironmentFile= and ExecStart=
  local unit line file script=
  unit=$(root "$machine")/etc/systemd/system/$1.service
  if [ ! -e "$unit" ]; then install_package_unit "$1" "$unit"; fi
  while IFS= read -r line; do
    case $line in
      Environment=*) script+="export ${line#*=}"$'\n' ;;
      EnvironmentFile=*)
        file=${line#*=}
        script+="set -a; if [ -f ${file#-} ]; then . ${file#-}; fi"$'\n'
        ;;
      ExecStart=*) script+="exec ${line#*=}" ;;
    esac
  done <"$unit"
  background "$1" env BIND="$(address "$machine")" bash -c "$script"
}

install_package_unit() { # UNIT FILE: the unit of the Debian package, for this machine
  local template=$here/deploy/$1.service
  if [[ $1 == *@* ]]; then template=$here/deploy/${1%@*}@.service; fi
  translate "$machine" "$(sed -e "s|%i|${1#*@}|" -e "s|/usr/bin/mkv-volume|$here/volume.sh|" -e "s|/usr/bin/mkv |$dir/bin/mkv |" "$template")" >"$2"
}

run_cron() { # runs all lines of the master's crontab
  local line
  while IFS= read -r line; do
    sh -c "$(cut -d' ' -f7- <<<"$line")" </dev/null >"$dir/cron"
  done < <(grep -v '^#' "$(root master)"/etc/cron.d/*)
}

save() { # the machines as they were set up, without an index
  rm -rf -- "$dir/saved"
  cp -a -- "$dir/machines" "$dir/saved"
  rm -rf -- "$dir"/saved/master/var/lib/mkv/*
}

restore() { # the machines as they were saved, and their services
  local unit
  stop_all
  rm -rf -- "$dir/machines"
  cp -a -- "$dir/saved" "$dir/machines"
  for unit in "$dir"/machines/*/etc/systemd/system/mkv-volume.service; do
    systemctl start mkv-volume "$(cut -d/ -f1 <<<"${unit#"$dir/machines/"}")"
  done
  systemctl start mkv master
  # shellcheck source=/dev/null
  . "$(root master)/etc/default/mkv"
}

fill() { # some values
  local n
  for n in {1..40}; do curl -q -sS -f -X PUT -d "value $n" "http://$(address master):3000/photos/$n"; done
}

new_machine() { # FROM TO: set up in the same way
  cp -r -- "$(root "$1")"/{etc,usr} "$(root "$2")"
  sed -i "s|$(root "$1")|$(root "$2")|g" "$(root "$2")"/etc/systemd/system/*
}

# ---- machines ------------------------------------------------------------------------------------------------------

address() { # MACHINE
  case $1 in
    master) printf '%s.1' "$net" ;;
    vol[1-9]) printf '%s.1%s' "$net" "${1#vol}" ;;
    *) fail "no machine is called $1" ;;
  esac
}

root() { # MACHINE: the folder that stands for its /
  local root=$dir/machines/$1
  mkdir -p "$root"/{etc/{default,cron.d,nginx,prometheus,systemd/system},srv,usr/local/bin,var/lib}
  printf '%s' "$root"
}

translate() { # MACHINE TEXT: the text with the names of this test
  sed -E -e "s#(^|[^[:alnum:]_./)])/(srv|etc|var/lib|usr/local)/#\1$(root "$1")/\2/#g" \
    -e "s#vol([1-9]):#$net.1\1:#g" -e "s#(localhost|127\.0\.0\.1|\bmaster):([0-9])#$net.1:\2#g" \
    -e "s#~/\.cache/mkv/target/release/#$dir/bin/#g" <<<"$2"
}

reader() { # a reader's clone, and the binaries
  local file
  rm -rf -- "${dir:?}"/{machines,clone,bin,data}
  mkdir -p "$dir/clone" "$dir/bin"
  for file in "$here"/*; do ln -s -- "$file" "$dir/clone"; done
  rm -- "$dir/clone/mkv" "$dir/clone/bringup.sh"
  cat >"$dir/clone/mkv" <<END
#!/usr/bin/env bash
case " \$* " in
  *' server '*) set -- "\$@" -host $net.1 ;;
  *' rebalance '*) set -- "\$@" -settle 1s ;;
esac
exec "$here/mkv" "\$@"
END
  printf '#!/bin/sh\nexec "%s" --data "%s" --bind %s "$@"\n' "$here/bringup.sh" "$dir/data" "$net.1" >"$dir/clone/bringup.sh"
  chmod 755 "$dir/clone/mkv" "$dir/clone/bringup.sh"
  cp -- "$dir/clone/mkv" "$dir/bin"
  ln -s -- "$release/thrasher" "$dir/bin"
  cd -- "$dir/clone"
}

# ---- documents -----------------------------------------------------------------------------------------------------

names() { # "the master" or "vol1, vol2": the machines, in `machines`
  local text=${1//the /}
  read -ra machines <<<"${text//,/ }"
}

run_block() { # the commands in `body`
  local line command='' machines=(master)
  : >"$dir/stdout"
  while IFS= read -r line; do
    if [[ -z $command && $line == '# on '* ]]; then
      names "${line#'# on '}"
      continue
    fi
    command+=${command:+$'\n'}$line
    if [[ $line == *[\\\|] ]] || ! bash -n <<<"$command" 2>/dev/null; then continue; fi # it goes on
    for machine in "${machines[@]}"; do run_command "$command"; done
    machine=master command=''
  done <<<"$body"
  [ -z "$command" ] || fail "this command has no end: $command"
}

run_command() { # COMMAND, on `machine`
  local text expected=0 status
  text=$(translate "$machine" "$1")
  printf '%s: %s\n' "$machine" "$text" >"$dir/command"
  if [[ $1 =~ '# exit status '([0-9]+)$ ]]; then expected=${BASH_REMATCH[1]}; fi
  BIND=$(address "$machine")
  export BIND PATH="$dir/machines/$machine/usr/local/bin:${PATH#"$dir"/machines/*:}"
  case $1 in
    ./test.sh*) return ;;
    ./bringup.sh* | ./mkv*' server'*) eval "background master ${text%%#*}" && return ;;
    PORT=*./volume.sh*) eval "background mkv-volume env $text" && return ;;
  esac
  set +eu
  eval "$text" >"$dir/out" 2>"$dir/stderr" </dev/null 3<&-
  status=$?
  set -eu
  cat "$dir/out" >>"$dir/stdout"
  if [ -n "$(tail -c 1 "$dir/out")" ]; then echo >>"$dir/stdout"; fi # a prompt would stand here
  [ "$status" = "$expected" ] || fail "exit status $status, not $expected: $text"
}

compare() { # the text in `body` with the output of the block before
  local pattern actual special
  pattern=$(translate master "$body"; echo .)
  pattern=${pattern%.}
  if [ -z "$body" ]; then pattern=''; fi
  for special in \\ '[' ']' '*' '?'; do pattern=${pattern//"$special"/"\\$special"}; done
  pattern=${pattern//…$'\n'/*}
  actual=$(tr -d '\r' <"$dir/stdout"; echo .)
  # shellcheck disable=SC2053 # it is a pattern
  [[ ${actual%.} == ${pattern//…/*} ]] || fail "$(printf 'the document shows\n%s\nbut this was printed\n%s' "$body" "${actual%.}")"
}

write_file() { # the file in `body`
  local first=${body%%$'\n'*} machines machine
  [[ $first =~ ^'# '(/[^ ]+)' on '(.*)$ ]] || fail "an ini block begins with a line like: # /etc/default/mkv on the master"
  names "${BASH_REMATCH[2]}"
  for machine in "${machines[@]}"; do translate "$machine" "$body" >"$(root "$machine")${BASH_REMATCH[1]}"; done
  if [[ ${BASH_REMATCH[1]} == /etc/cron.d/* ]]; then run_cron; fi
}

run_document() { # FILE
  local line number=0 kind='' body='' last=''
  reader
  while IFS= read -r line <&3; do
    number=$((number + 1)) at=$1:$number
    if [ -n "$kind" ]; then
      if [ "$line" != '```' ]; then
        body+=${body:+$'\n'}$line
        continue
      fi
      case $kind in
        sh) run_block ;;
        output)
          [ "$last" = sh ] || fail 'an output block follows an sh block'
          compare
          ;;
        ini) write_file ;;
      esac
      last=$kind kind='' body=''
    elif [[ $line =~ ^'```'(sh|output|ini|text|abnf|yaml)$ ]]; then
      kind=${BASH_REMATCH[1]}
    elif [[ $line == *'```'* || $line == *'~~~'* || $line == '    '* ]]; then
      fail "a block of a kind that this script does not know: $line"
    elif [[ $line =~ ^'<!-- test: '(.*)' -->'$ ]]; then
      run_command "${BASH_REMATCH[1]}"
    fi
  done 3<"$here/$1"
  [ -z "$kind" ] || fail 'a block that does not end'
  stop_all
}

check_flags() { # FILE: mkv has each flag that stands in the text
  local flag
  while IFS= read -r flag; do
    grep -qE -- "(^| )$flag( |,|=|\$)" "$dir/help" || fail "mkv -help does not name $flag"
  done < <(grep -oE '`-[a-z][a-z0-9-]+' "$here/$1" | tr -d '`' | sort -u)
}

check_links() { # FILE: the files and headings that it links to are there
  local link target
  while IFS= read -r link; do
    target=$1
    if [[ $link != '#'* ]]; then target=$(realpath -m --relative-to="$here" "$here/$(dirname -- "$1")/${link%%#*}"); fi
    [ -e "$here/$target" ] || fail "it links to $link, which is not there"
    if [[ $link == *'#'* ]]; then
      grep -E '^#+ ' "$here/$target" | sed -E 's/^#+ //' | tr '[:upper:] ' '[:lower:]-' | sed 's/[^[:alnum:]_-]//g' |
        grep -qxF -- "${link#*#}" || fail "it links to $link, a heading that is not there"
    fi
  done < <(grep -oE '\]\([^)]+\)' "$here/$1" | sed -e 's/^](//' -e 's/)$//' | grep -v '^https\?:')
}

"$here/mkv" -help >"$dir/help"
documents=("$@")
if [ $# = 0 ]; then
  documents=(README.md)
  for file in "$here"/docs/*.md; do documents+=("docs/${file##*/}"); done
fi
for file in "${documents[@]}"; do
  at=$file
  check_flags "$file"
  check_links "$file"
done
for file in "${documents[@]}"; do run_document "$file"; done
finished=yes
printf 'docs.sh: every command line runs, in %d s\n' "$SECONDS"
