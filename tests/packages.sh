#!/usr/bin/env bash
# What mkv is installed, run and watched with: the manual page, the Debian package, the systemd units, the commands of
# the container image, the rules for Prometheus and the dashboard for Grafana.
#
# The package is installed below a temporary folder, and the store runs from there. A container engine and a running
# systemd are not needed; deploy/Dockerfile and deploy/compose.yaml are tried by hand.
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/..
umask 022 # nginx's workers may run as another user
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
unset AUTH WORKERS PORT BIND DATA RUN MASTER
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}
dir=$(mktemp -d "${TMPDIR:-/tmp}/mkv-packages.XXXXXX")
chmod 755 "$dir"
root=$dir/root deb=
# A random loopback address, so that all its ports are free.
host=127.$((RANDOM % 200 + 20)).$((RANDOM % 256)).$((RANDOM % 254 + 1))
url=http://$host:3000
pids=() step=

stop() { # in reverse order: the front and the master before the volumes
  local i pid
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    pid=${pids[i]}
    kill -TERM "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  done
  pids=()
}
# shellcheck disable=SC2317 # called by the trap
leave() {
  local status=$?
  if [ "$status" != 0 ]; then
    tail -n 20 "$dir"/*.log >&4 2>/dev/null || true
    printf 'packages.sh: FAILED: %s\n' "$step" >&4
  fi
  stop
  rm -rf -- "$dir"
  exit "$status"
}
exec 4>&2 # a check's own standard error goes to a file
trap leave EXIT
trap 'exit 1' INT TERM HUP

fail() {
  printf 'packages.sh: %s\n' "$*" >&2
  exit 1
}
check() { # NAME COMMAND…: runs the command, and shows its output only if it fails
  step=$1
  "${@:2}" >"$dir/check.log" 2>&1
}
await() { # COMMAND…: retries the command for up to 20 s
  local n
  for ((n = 0; n < 400; n++)); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.05
  done
  return 1
}
get() { curl -q -sS -k --noproxy '*' --max-time 20 "$@"; }

# ---- the Debian package ------------------------------------------------------------------------------------------

manual_is_current() {
  "$CARGO_TARGET_DIR/release/mkv" man | diff - "$here/deploy/mkv.1" || fail 'run: ./mkv man >deploy/mkv.1'
  man --warnings -l "$here/deploy/mkv.1" 2>&1 >/dev/null | (! grep .)
}

build_package() { # sets deb
  (cd -- "$here" && cargo deb --no-build --fast --quiet -o "$dir/") || return
  deb=$dir/mkv_$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml")_$(dpkg --print-architecture).deb
  [ -f "$deb" ] || fail "cargo deb made $(ls "$dir"/*.deb), not $deb"
}

# Without a chroot, so that this machine's dpkg and systemd-sysusers work on the folder.
dpkg_in_root() { dpkg --root="$root" --log="$dir/dpkg.log" --force-not-root,script-chrootless,depends "$@"; }

install_package() {
  mkdir -p "$root"/etc "$root"/var/lib/dpkg/{info,updates,triggers}
  : >"$root/var/lib/dpkg/status"
  dpkg_in_root -i "$deb"
  grep -q '^mkv:' "$root/etc/passwd" || fail 'the package creates no user mkv'
  [ -z "$(find "$root/etc/systemd" 2>/dev/null)" ] || fail 'the package enables a unit'
  "$root/usr/bin/mkv" -version && "$root/usr/bin/thrasher" --help
}

remove_package() {
  local left
  : >"$root/var/lib/mkv.data"
  dpkg_in_root -P mkv
  left=$(find "$root/usr" "$root/etc" -type f ! -path "$root/etc/*passwd*" ! -path "$root/etc/*group*" \
    ! -path "$root/etc/*shadow*" ! -path "$root/etc/.pwd.lock" 2>/dev/null) || true
  [ -z "$left" ] || fail "removing the package leaves $left"
  [ -e "$root/var/lib/mkv.data" ] || fail 'removing the package removes data'
}

check_package() { # cargo-deb chooses the changelog's name
  lintian --no-cfg --allow-root --fail-on error,warning \
    --suppress-tags wrong-name-for-changelog-of-native-package "$deb"
}

# The units as they are installed, beside this machine's targets.
check_units() {
  local unit output
  cp -r -- "$(dirname -- "$(readlink -f /lib/systemd/system/sysinit.target)")"/*.target "$root/usr/lib/systemd/system"
  output=$(systemd-analyze verify --root="$root" --man=no mkv.service mkv-volume@1.service 2>&1) || fail "$output"
  [ -z "$output" ] || fail "$output"
  for unit in mkv.service mkv-volume@.service; do # tenths: 100 is no protection at all, 15 is measured
    systemd-analyze security --no-pager --offline=true --threshold=20 "$root/usr/lib/systemd/system/$unit"
  done
  rm -- "$root"/usr/lib/systemd/system/*.target
}

# ---- the commands of the container image -------------------------------------------------------------------------

service() { # NAME PORT COMMAND…: starts what a container with this command runs, and waits until it is healthy
  mkdir -p "$dir/$1" "$dir/run/$1"
  env PATH="$root/usr/bin:$PATH" DATA="$dir/$1" RUN="$dir/run/$1" BIND="$host" PORT="$2" MASTER="$host:3000" \
    "$here/deploy/container.sh" "${@:3}" >"$dir/$1.log" 2>&1 &
  pids+=("$!")
  await healthy "$1" || fail "$1 is not healthy: $(healthy "$1" 2>&1)"
}
healthy() { RUN=$dir/run/$1 "$here/deploy/container.sh" health; }

start_store() {
  local n
  for n in 1 2 3; do service "volume$n" "300$n" volume; done
  service master 3000 master -volumes "$host:3001,$host:3002,$host:3003"
}


use_store() { # URL
  [ "$(get -o /dev/null -w '%{http_code}' -X PUT -d bigswag "$1/wehave")" = 201 ]
  [ "$(get -L "$1/wehave")" = bigswag ]
  [ "$(get -L -r 0-2 "$1/wehave")" = big ]
  [ "$(get "$1/?list")" = '{"next":"","keys":["/wehave"]}' ]
  [ "$(get -o /dev/null -w '%{http_code}' -X DELETE "$1/wehave")" = 204 ]
}

volume_is_found_dead() {
  kill -TERM "${pids[2]}"
  wait "${pids[2]}" || true
  if healthy volume3; then fail 'a volume that has ended is healthy'; fi
  [ "$(get -o /dev/null -w '%{http_code}' "$url/?health")" = 503 ]
  healthy master
}

# A path that deploy/Dockerfile copies must be there, and .dockerignore must let it through.
check_dockerfile() {
  local path
  grep -oP '^COPY (?!--)\K.*(?= \S+$)' "$here/deploy/Dockerfile" | tr ' ' '\n' >"$dir/copied"
  while IFS= read -r path; do
    [ -e "$here/$path" ] || fail "deploy/Dockerfile copies $path, which is not there"
    grep -qxE "!($path|${path%%/*})" "$here/.dockerignore" || fail ".dockerignore leaves out $path"
  done <"$dir/copied"
}

# ---- Prometheus and Grafana --------------------------------------------------------------------------------------

check_metrics() {
  get "$url/?metrics" >"$dir/metrics"
  grep -q '^mkv_volume_up{' "$dir/metrics"
  promtool check metrics <"$dir/metrics"
}

# A follower has metrics of its own.
check_follower() {
  "$root/usr/bin/mkv" follow -from "$url" -db "$dir/follower" -host "$host" -port 3010 \
    -volumes "$host:3001,$host:3002,$host:3003" >"$dir/follower.log" 2>&1 &
  pids+=("$!")
  await get -o /dev/null "http://$host:3010/?metrics"
  get "http://$host:3010/?metrics" >"$dir/follower-metrics"
  promtool check metrics <"$dir/follower-metrics"
  cat -- "$dir/follower-metrics" >>"$dir/metrics"
}

check_rules() {
  promtool check rules "$here/deploy/prometheus/mkv-rules.yml"
  promtool check config "$here/deploy/prometheus/prometheus.yml"
  cp -- "$here/deploy/prometheus/mkv-rules.yml" "$here/tests/prometheus.yml" "$dir"
  (cd -- "$dir" && promtool test rules prometheus.yml)
}

# Checks the dashboard, and prints its queries as recording rules for promtool.
read_dashboard() {
  python3 - "$here/deploy/grafana.json" <<'END'
import json, sys
board = json.load(open(sys.argv[1]))
assert board["id"] is None and board["uid"] and board["title"] and board["schemaVersion"] >= 36, "not importable as it is"
assert "__inputs" not in board, "the import would ask questions"
names = {variable["name"] for variable in board["templating"]["list"]}
assert names == {"datasource", "instance"}, names
ids, cells = set(), set()
print("groups: [{name: dashboard, rules: [")
for panel in board["panels"]:
    assert panel["id"] not in ids, f"two panels have the id {panel['id']}"
    ids.add(panel["id"])
    at = panel["gridPos"]
    for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
        assert cell not in cells and cell[0] < 24, f"{panel['title']} lies over another panel or outside"
        cells.add(cell)
    if panel["type"] == "row":
        continue
    assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
    for n, target in enumerate(panel["targets"]):
        query = target["expr"].replace("$__rate_interval", "1m")
        print("{record: panel_%d_%d, expr: %s}," % (panel["id"], n, json.dumps(query)))
print("]}]")
END
}

check_dashboard() {
  read_dashboard >"$dir/dashboard.yml"
  promtool check rules "$dir/dashboard.yml"
}

# Each metric that a rule, the dashboard or docs/operations.md names is one of a real master or follower.
check_names() {
  local name
  while IFS= read -r name; do
    grep -qE "^(# TYPE )?${name}[{ ]" "$dir/metrics" || fail "$name is named, but no master has it"
  done < <(grep -ohE '\bmkv_[a-z_]+' "$here"/deploy/prometheus/*.yml "$here/deploy/grafana.json" "$here/docs/operations.md" |
    sort -u)
}

check 'the manual page is current' manual_is_current
check 'the package is built' build_package
check 'lintian finds nothing in the package' check_package
check 'the package is installed' install_package
check 'systemd-analyze accepts the units' check_units
check 'deploy/Dockerfile copies what is there' check_dockerfile
check 'the image runs a store' start_store
check 'the image runs a front' service front 8443 front
check 'the store can be used' use_store "$url"
check 'the store can be used through the front' use_store "https://$host:8443"
check 'promtool accepts the metrics' check_metrics
check 'a follower follows, and promtool accepts its metrics' check_follower
check 'promtool accepts the rules, and each alert fires for its fault' check_rules
check 'promtool accepts the queries of the dashboard' check_dashboard
check 'the metrics exist that rules, dashboard and documents name' check_names
check 'a dead volume is found, and leaves the master healthy' volume_is_found_dead
stop
check 'the package is removed' remove_package
printf 'packages.sh: package, units, image and alerts work, in %d s\n' "$SECONDS"
