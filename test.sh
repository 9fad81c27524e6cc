#!/usr/bin/env bash
# Every check there is: installs what is missing, then format, lints, build, all tests. CI runs this and nothing else.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=tools.sh
source tools.sh
shopt -s nullglob
umask 022        # nginx's worker may be another user, and has to enter the tests' folders
exec </dev/null  # no test may wait for a person
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}"

step=
trap '[ -z "$step" ] || printf "\ntest.sh: FAILED: %s\n" "$step" >&2' EXIT
run() {
  step=$*
  printf '\n== %s\n' "$step"
  "$@"
  step=
}

install_tools tests
# One profile throughout, the release one: RocksDB is compiled once.
run cargo fmt --all --check
run cargo clippy --release --workspace --all-targets -- -D warnings
run shellcheck -x ./*.sh mkv .ci/run tests/*.sh bench/*.sh
run cargo build --release --workspace
if cargo nextest --version >/dev/null 2>&1; then
  run cargo nextest run --release --workspace --test-threads $(($(nproc) + 1)) # many only wait
else
  run cargo test --release --workspace
fi
for script in tests/*.sh; do run bash "$script"; done
printf '\ntest.sh: everything passed in %d:%02d minutes\n' "$((SECONDS / 60))" "$((SECONDS % 60))"
