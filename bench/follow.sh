#!/usr/bin/env bash
# Measures a follower: its lag while its master takes 2,000 writes a second, and what following costs the master.
#
#   bench/follow.sh [ROUNDS]   5; prints lines for docs/scale.md
#
#   BIN    folder of the binaries to measure; without it they are built
#   RATE   writes a second that are asked for (2400, which gives some 2,000: clients also wait for answers)
#
# Master, follower, volumes and clients share this machine, so the follower's own work is measured, too. The cost is
# measured with another reader of the log as well, which only counts its bytes: that is the master's part.
# Needs python3, wrk.
set -euo pipefail
here=$(cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=bench/servers.sh
source "$here/bench/servers.sh"
rate=${RATE:-2400}
connections=20

# start_follower: sets follower and follower_pid.
start_follower() {
  local free
  free=$(port)
  "$bin/mkv" -db "$work/follower" -volumes "$volumes" -replicas 1 -host 127.0.0.1 -port "$free" -from "$url" follow \
    >"$work/follower.log" 2>&1 &
  follower_pid=$! follower=http://127.0.0.1:$free
  await curl -s -f -o /dev/null "$follower/?ready"
}

# load SECONDS: PUTs of new keys at this rate. Prints how many a second were answered with 201.
load() {
  cat >"$work/put.lua" <<LUA
local id, count = 0, 0
function setup(thread) thread:set("id", id); id = id + 1 end
function init() wrk.method = "PUT"; wrk.body = ("x"):rep(25) end
function delay() return $((1000 * connections / rate)) end
function request() count = count + 1; return wrk.format(nil, "/load/$RANDOM$RANDOM/" .. id .. "/" .. count) end
LUA
  wrk -t1 -c"$connections" -d"$1" -s "$work/put.lua" "$url" |
    awk '/Requests\/sec/{rate = $2} /Non-2xx/{refused = $NF} END{printf "%.0f writes a second, %d refused\n", rate, refused}'
}

# lag SECONDS: from the answer to a write until the follower finds the key. Prints milliseconds.
lag() {
  python3 - "${url#http://}" "${follower#http://}" "$1" <<'PYTHON'
import http.client, sys, time
master, follower = (http.client.HTTPConnection(address) for address in sys.argv[1:3])
def ask(connection, method, path, body=None):
    connection.request(method, path, body)
    response = connection.getresponse()
    response.read()
    return response.status
lags, end, run = [], time.monotonic() + float(sys.argv[3]), time.time_ns()
while time.monotonic() < end:
    key = f"/lag/{run}/{len(lags)}"
    assert ask(master, "PUT", key, "value") == 201
    begun = time.monotonic()
    while ask(follower, "GET", key) != 302:
        time.sleep(0.0005)
    lags.append(1000 * (time.monotonic() - begun))
    time.sleep(0.01)
lags.sort()
part = lambda p: lags[min(len(lags) - 1, int(len(lags) * p))]
print(f"lag in ms: p50 {part(.5):.1f}, p99 {part(.99):.1f}, most {lags[-1]:.1f}, of {len(lags)} writes")
PYTHON
}

measure_lag() {
  local round
  for ((round = 0; round < rounds; round++)); do
    load 10 >"$work/load" &
    sleep 1
    lag 8
    wait $!
    cat "$work/load"
  done
}

# The reader of the log that only counts its bytes. It goes on until it is ended.
read_log() {
  exec python3 - "${url#http://}" <<'PYTHON'
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1])
def ask(query):
    connection.request("GET", "/?log" + query)
    return connection.getresponse().read()
head = json.loads(ask(""))
while True:
    log = ask(f"&since={head['change']}&run={head['history'][-1]['id']}")
    head = json.loads(log[:log.index(b"\n")])
    assert head["continues"], head
PYTHON
}

# Processor time of the master, in milliseconds.
processor() { awk -v tick="$(getconf CLK_TCK)" '{print 1000 * ($14 + $15) / tick}' "/proc/$pid/stat"; }

# cost WHO: cycles a second, and the master's processor time for a cycle in microseconds, while WHO reads the log.
cost() {
  local reader='' before rate
  case $1 in
    follower) kill -CONT "$follower_pid" && sleep 1 ;;
    reader) read_log & reader=$! ;;
  esac
  before=$(processor)
  rate=$("$bin/thrasher" --url "$url" --threads 16 --count 5000 | awk '/^thats/{sub("/sec", "", $2); print $2}')
  echo "$rate $(awk -v from="$before" -v to="$(processor)" 'BEGIN{print 1000 * (to - from) / 5000}')"
  if [ -n "$reader" ]; then end "$reader"; fi
  kill -STOP "$follower_pid"
}

measure_cost() {
  local round who
  kill -STOP "$follower_pid"
  for ((round = 0; round < rounds; round++)); do
    for who in nobody reader follower; do cost "$who" >>"$work/cost-$who"; done
  done
  for who in nobody reader follower; do
    echo "$who reads the log: $(cut -d' ' -f1 "$work/cost-$who" | median) cycles a second," \
      "$(cut -d' ' -f2 "$work/cost-$who" | median) µs of the master's processor time for each"
  done
  kill -CONT "$follower_pid"
}

rounds=${1:-5}
prepare
start_volumes 1
start_master "$bin/mkv" "$work/db" -replicas 1
start_follower
measure_lag
measure_cost
