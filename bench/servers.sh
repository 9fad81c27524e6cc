#!/usr/bin/env bash
# Servers for the benchmarks, and what is measured of them. Sourced; before that, `here` is the repository's folder, and
# before `compare`, `rounds` how often each of its commands runs.

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
bin=${BIN:-$CARGO_TARGET_DIR/release}
here=${here:?}
rounds=5

prepare() {
  if [ -z "${BIN:-}" ]; then (cd "$here" && cargo build -q --release --workspace); fi
  work=$(mktemp -d "${TMPDIR:-/tmp}/mkv-bench-XXXXXX")
  chmod 755 "$work"
  trap clean_up EXIT
  trap 'exit 130' INT TERM
}

clean_up() {
  # shellcheck disable=SC2046
  end $(jobs -pr)
  rm -rf "$work"
}

# end PID…: stops processes of this script and waits until they have ended.
end() {
  local pid
  for pid in "$@"; do kill "$pid" 2>/dev/null || true; done
  for pid in "$@"; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done
}

# Prints a free port.
port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }

await() { # COMMAND…
  until "$@" >/dev/null 2>&1; do sleep 0.1; done
}

# start_volumes COUNT: sets volumes.
start_volumes() {
  local n free
  volumes=
  for ((n = 1; n <= $1; n++)); do
    free=$(port)
    BIND=127.0.0.1 PORT=$free "$here/volume.sh" "$work/v$n" >/dev/null 2>"$work/v$n.log" &
    await curl -s -o /dev/null "http://127.0.0.1:$free/"
    volumes+=${volumes:+,}127.0.0.1:$free
  done
}

# start_master BINARY DB [FLAG…]: sets url and pid.
start_master() {
  local free
  free=$(port)
  "$1" -db "$2" -volumes "$volumes" -host 127.0.0.1 -port "$free" "${@:3}" server >"$work/master-$free.log" 2>&1 &
  pid=$! url=http://127.0.0.1:$free
  await curl -s -o /dev/null "$url/"
}

median() { sort -g | awk '{v[NR]=$1} END{print NR%2 ? v[(NR+1)/2] : (v[NR/2]+v[NR/2+1])/2}'; }

# rate URL…: requests a second, of all URLs at the same time, with 100 connections in all.
rate() {
  local each
  for each in "$@"; do wrk -t2 -c$((100 / $#)) -d3 "$each" & done | awk '/Requests\/sec/{sum += $2} END{print sum}'
}

# cycles URL…: write, read and delete of 25 bytes, 16 threads in all.
cycles() {
  local each
  for each in "$@"; do "$bin/thrasher" --url "$each" --threads $((16 / $#)) --count $((3000 / $#)) & done |
    awk '/^thats/{sub("/sec","",$2); sum += $2} END{print sum}'
}

# compare MEASURE COMMAND…: a row with the median of each command, and its ratio to the first one.
compare() {
  local commands=("${@:2}") figures=() round i row first value
  for ((round = 0; round < rounds; round++)); do
    for i in "${!commands[@]}"; do figures[i]="${figures[i]:-}$(eval "${commands[i]}")"$'\n'; done
  done
  row="| $1 |"
  for i in "${!commands[@]}"; do
    value=$(median <<<"${figures[i]%$'\n'}")
    if [ "$i" = 0 ]; then first=$value; fi
    row+=$(awk -v value="$value" -v first="$first" 'BEGIN{printf " %.0f/s (%.2f) |", value, value / first}')
  done
  echo "$row"
}
