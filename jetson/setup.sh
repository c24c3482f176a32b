#!/usr/bin/env bash
# Make a Jetson ready for edgert: TensorRT's Python module, a virtual environment that sees it, and
# what else is asked for. Harmless to repeat: what is there already is left as it is.
#   jetson/setup.sh [options]          from a clone of edgert; as root, or with sudo installed
set -euo pipefail

usage() {
    cat <<'TEXT'
  --venv DIR          the virtual environment (default: /opt/edgert/venv)
  --jetpack 6|7|none  what to set up for (default: what /etc/nv_tegra_release says; none: CPU only)
  --tensorrt VERSION  exact version of TensorRT's packages (default: the newest of JetPack's sources)
  --swap GB           a swap file of so many GB, for building engines; kept over a restart
  --power-mode N      a power mode of `nvpmodel -q --verbose`; kept over a restart
  --service BUNDLE    install edgert.service, which keeps this bundle loaded; not started
  --dry-run           print the commands, run none
TEXT
}

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
usage_error() { say "error: $*"; usage >&2; exit 2; }

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=/opt/edgert/venv jetpack='' tensorrt='' swap='' power='' bundle='' dry=''
swap_file=/var/edgert.swap

while [ $# -gt 0 ]; do
    case $1 in
    --venv | --jetpack | --tensorrt | --swap | --power-mode | --service)
        [ -n "${2-}" ] || usage_error "$1 wants a value"
        ;;
    esac
    case $1 in
    --venv) venv=$2; shift ;;
    --jetpack) jetpack=$2; shift ;;
    --tensorrt) tensorrt=$2; shift ;;
    --swap) swap=$2; shift ;;
    --power-mode) power=$2; shift ;;
    --service) bundle=$2; shift ;;
    --dry-run) dry=yes ;;
    -h | --help) usage; exit 0 ;;
    *) usage_error "$1 is not known" ;;
    esac
    shift
done
[[ $swap =~ ^([1-9][0-9]?)?$ ]] || usage_error "--swap wants whole GB from 1 to 99, not $swap"
[[ $power =~ ^[0-9]{0,2}$ ]] || usage_error "--power-mode wants a number, not $power"
[[ $venv == /* ]] || usage_error "--venv wants an absolute path, not $venv"
if [ -n "$bundle" ] && [ ! -f "$bundle/manifest.json" ]; then fail "$bundle is not a bundle"; fi

sudo=()
if [ "$(id -u)" != 0 ] && [ -z "$dry" ]; then
    command -v sudo >/dev/null || fail "not root, and sudo is missing: run this as root"
    sudo=(sudo)
fi

run() {
    say "+$(printf ' %q' "$@")"
    if [ -z "$dry" ]; then "$@"; fi
}
as_root() { run "${sudo[@]}" "$@"; }

detect() { # 'R36 (release), REVISION: 4.3' is L4T 36.4.3, of JetPack 6
    local release major revision
    release=$(cat /etc/nv_tegra_release 2>/dev/null) || release=
    if [[ $release =~ R([0-9]+)\ \(release\),\ REVISION:\ ([0-9]+) ]]; then
        major=${BASH_REMATCH[1]} revision=${BASH_REMATCH[2]}
        say "note: L4T $major.$revision"
        if [ "$major" = 36 ] && [ "$revision" -ge 4 ]; then echo 6; return; fi
        if [ "$major" -ge 38 ]; then echo 7; return; fi
        fail "L4T $major.$revision is too old: update to JetPack 6.1 or newer, or give --jetpack none"
    fi
    say "note: not a Jetson: everything runs on the CPU"
    echo none
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

packages() {
    # g++ compiles edgert's own kernels as it is installed
    local wanted=(python3-venv libgomp1 g++) missing=() package
    if [ "$jetpack" != none ]; then
        # the Python module, and the libraries that must have its version
        for package in libnvinfer10 libnvinfer-plugin10 libnvonnxparsers10 python3-libnvinfer; do
            wanted+=("$package${tensorrt:+=$tensorrt}")
        done
    fi
    for package in "${wanted[@]}"; do
        installed "${package%%=*}" || missing+=("$package")
    done
    if [ ${#missing[@]} = 0 ]; then say "ok: packages are installed"; return; fi
    as_root apt-get update
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "${missing[@]}"
}

environment() {
    local extras=cpu,crypto constraint=()
    if [ "$jetpack" != none ]; then extras+=,tensorrt; fi
    # the bindings follow the device's CUDA: 12.6 on JetPack 6, 13 on JetPack 7
    if [ "$jetpack" = 6 ]; then constraint=('cuda-bindings>=12.6,<13'); fi
    if grep -qs '^include-system-site-packages = true' "$venv/pyvenv.cfg"; then
        say "ok: $venv is there"
    else
        as_root mkdir -p "$(dirname "$venv")"
        as_root /usr/bin/python3 -m venv --clear --system-site-packages "$venv"
    fi
    as_root "$venv/bin/python" -m pip install --disable-pip-version-check \
        "${home}[$extras]" "${constraint[@]}"
}

make_swap() {
    if [ -e "$swap_file" ]; then
        say "ok: $swap_file is there"
    else
        as_root fallocate -l "${swap}G" "$swap_file"
        as_root chmod 600 "$swap_file"
        as_root mkswap "$swap_file"
    fi
    if grep -qs "^$swap_file " /proc/swaps; then
        say "ok: it is in use"
    else
        as_root swapon "$swap_file"
    fi
    if grep -qs "^$swap_file " /etc/fstab; then
        say "ok: it is in /etc/fstab"
    else
        # a failed mount of it does not stop the start of the board
        as_root sh -c "echo '$swap_file none swap sw,nofail 0 0' >>/etc/fstab"
    fi
}

set_power() {
    command -v nvpmodel >/dev/null || [ -n "$dry" ] || fail "nvpmodel is missing: not a Jetson?"
    if [ -z "$dry" ] && [ "$("${sudo[@]}" nvpmodel -q 2>/dev/null | tail -n 1)" = "$power" ]; then
        say "ok: power mode $power is set"
        return
    fi
    # some modes ask for a restart; with no answer nvpmodel does not restart by itself
    as_root nvpmodel -m "$power" </dev/null || say "note: the mode may need a restart of the board"
}

service() {
    local to=/opt/edgert
    if ! getent passwd edgert >/dev/null; then
        as_root useradd --system --user-group --home-dir /nonexistent --shell /usr/sbin/nologin edgert
    fi
    for group in video render; do # whose members may use the GPU
        if getent group "$group" >/dev/null; then as_root usermod --append --groups "$group" edgert; fi
    done
    as_root install -D -m 644 "$home/jetson/resident.py" "$to/resident.py"
    as_root ln -sfn "$(realpath "$bundle")" "$to/bundle"
    if [ "$venv" != "$to/venv" ]; then as_root ln -sfn "$venv" "$to/venv"; fi
    as_root install -D -m 644 "$home/jetson/edgert.service" /etc/systemd/system/edgert.service
    say "note: start it with  systemctl daemon-reload && systemctl enable --now edgert"
}

if [ -z "$jetpack" ]; then jetpack=$(detect); fi
case $jetpack in
6 | 7 | none) say "setting up for ${jetpack/#[67]/JetPack $jetpack}" ;;
*) usage_error "--jetpack wants 6, 7 or none, not $jetpack" ;;
esac
packages
environment
if [ -n "$swap" ]; then make_swap; fi
if [ -n "$power" ]; then set_power; fi
if [ -n "$bundle" ]; then service; fi
run "$venv/bin/edgert" doctor
