#!/usr/bin/env bash
# Installs what is missing, then runs all checks: format, lints, build, tests. CI runs only this.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
# shellcheck source=tools.sh
source tools.sh
shopt -s nullglob
umask 022       # nginx's workers may run as another user, who must be able to enter the tests' folders
exec </dev/null # a test that waits for input would hang
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/mkv/target}"

# Runs a command under a heading, and names it if it fails.
run() {
  step=$*
  printf '\n== %s\n' "$step"
  "$@"
  step=
}

report_failure() {
  if [ -n "$step" ]; then printf '\ntest.sh: FAILED: %s\n' "$step" >&2; fi
}

check_sources() {
  run cargo fmt --all --check
  run cargo clippy --release --workspace --all-targets -- -D warnings
  run shellcheck -x ./*.sh mkv .ci/run tests/*.sh tests/s3/*.sh bench/*.sh deploy/*.sh
}

# Everything uses the release profile, so that RocksDB is compiled only once.
build_and_test() {
  local script
  run cargo build --release --workspace
  if cargo nextest --version >/dev/null 2>&1; then
    run cargo nextest run --release --workspace --test-threads $(($(nproc) + 1)) # many tests only wait
    # The API on the other engine.
    run env MKV_ENGINE=postgres cargo nextest run --release --workspace -E 'test(/^(api|model|values|keys|lists|concurrency|s3_model|s3_multipart|s3_concurrency)::/)'
  else
    run cargo test --release --workspace
  fi
  for script in tests/*.sh; do run bash "$script"; done
}

main() {
  step=
  trap report_failure EXIT
  install_tools tests
  check_sources
  build_and_test
  printf '\ntest.sh: everything passed in %d:%02d minutes\n' "$((SECONDS / 60))" "$((SECONDS % 60))"
}

main
