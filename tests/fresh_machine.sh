#!/usr/bin/env bash
# The README's two commands, typed on a machine that has nothing but Debian: it is made in a folder, entered with chroot.
help="usage: tests/fresh_machine.sh [OPTION ...] SUITE FOLDER [COMMAND ...]
Runs each COMMAND (by default 'make demo', then 'make test') in a fresh clone of this checkout's last commit, on a bare Debian.
SUITE   bookworm (Python 3.11), trixie (3.13), forky or testing (3.14)
FOLDER  where this Debian is, made if it is not there (400 MB; python3, python3-venv, make, git) and used again
  --no-name          the machine's own name does not resolve, as in a container without a network
  --no-venv          without python3-venv; takes a FOLDER of its own
  --offline          no network but the loopback device; with --keep, after an installation
  --user             as a normal user, not as root
  --path PATH        of the clone, beneath /srv; may hold spaces (clone)
  --keep             goes on in the clone that is there, as after an interruption
  --read-only-home   HOME cannot be written to
  --cpus N           on the first N CPUs only
  --cache DIR        pip's and uv's caches, kept there (none; not with --user)
Needs root, debootstrap, git, and 10 GB. Proxy, index and certificate variables hold inside too."
set -euo pipefail

fail() { echo "fresh_machine.sh: $1" >&2; exit 2; }

resolves=1 venv=,python3-venv user=root home=/root path=clone
keep='' read_only='' offline='' cpus='' cache=''
arguments=("$@")
while [[ "${1:-}" == -* ]]; do
  case $1 in
    --no-name) resolves= ;;
    --no-venv) venv= ;;
    --offline) offline=--net ;;
    --user) user=user home=/home/user ;;
    --keep) keep=1 ;;
    --read-only-home) read_only=1 ;;
    --path | --cpus | --cache)
      [ "${2:-}" ] || fail "$1 needs a value; --help lists the options"
      printf -v "${1#--}" %s "$2"
      shift ;;
    -h | --help) echo "$help"; exit ;;
    *) fail "no option $1; --help lists them" ;;
  esac
  shift
done
[ $# -ge 2 ] || fail "SUITE and FOLDER are needed; --help shows how"
suite=$1 folder=$2
shift 2
[ $# -gt 0 ] || set -- "make demo" "make test"
[[ -z "$cpus" || "$cpus" =~ ^[1-9][0-9]*$ ]] || fail "--cpus $cpus: a number from 1 on is needed"
[[ "/$path/" != */../* ]] || fail "--path $path: it lies beneath /srv, without .."
[ -z "$cache" ] || [ "$user" = root ] || fail "--cache belongs to root: leave out --user"
[ "$(id -u)" = 0 ] || fail "making a Debian in a folder needs root: sudo tests/fresh_machine.sh ..."
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"

# Mounts and the machine's name are this process's own: they end with it, however it ends
if [ -z "${FRESH_MACHINE:-}" ]; then
  exec env FRESH_MACHINE=1 unshare --mount --uts $offline "${BASH:-bash}" "${BASH_SOURCE[0]}" "${arguments[@]}"
fi
hostname fresh-machine
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ ! -e "$folder" ]; then
  echo "making Debian $suite in $folder; what it says goes to $folder.log"
  mkdir -p "$(dirname "$folder")"
  rm -rf "$folder.part"
  script=/usr/share/debootstrap/scripts/$suite
  [ -e "$script" ] || script=${script%/*}/sid  # a release newer than this debootstrap
  debootstrap --variant=minbase --include="python3$venv,make,git,ca-certificates,procps,iproute2" \
    "$suite" "$folder.part" http://deb.debian.org/debian "$script" >"$folder.log" 2>&1 \
    || { tail -n 5 "$folder.log" >&2; fail "debootstrap failed; all it said is in $folder.log"; }
  chroot "$folder.part" useradd --create-home user
  mv "$folder.part" "$folder"
fi
machine=$(realpath "$folder")
[ -x "$machine/usr/bin/make" ] || fail "$folder holds no Debian that was made here: name a folder that is not there yet"
grep -qw "$suite" "$machine/etc/apt/sources.list" || fail "$folder holds another release than $suite: name another folder"
ensurepip=$(compgen -G "$machine/usr/lib/python3*/ensurepip/__init__.py" || true)
[ "${venv:+with}" = "${ensurepip:+with}" ] || fail "$folder is ${ensurepip:+not }without python3-venv: name another folder"

mount --bind "$machine" "$machine"
mount --rbind /dev "$machine/dev"
mount --rbind /sys "$machine/sys"
mount -t proc proc "$machine/proc"
mount -t tmpfs -o mode=1777 tmpfs "$machine/dev/shm"
printf '127.0.0.1 localhost\n' >"$machine/etc/hosts"
[ -z "$resolves" ] || printf '127.0.1.1 fresh-machine\n' >>"$machine/etc/hosts"
[ ! -e /etc/resolv.conf ] || cp -L /etc/resolv.conf "$machine/etc/resolv.conf"
[ -z "$offline" ] || chroot "$machine" ip link set lo up

environment=(HOME="$home" USER="$user" PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 TERM="${TERM:-dumb}")
for variable in {http,https,all,no}_proxy {HTTP,HTTPS,ALL,NO}_PROXY {PIP,UV}_INDEX_URL PIP_EXTRA_INDEX_URL UV_DEFAULT_INDEX \
  PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT UV_HTTP_TIMEOUT SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO; do
  value=${!variable:-}
  [ -z "$value" ] || environment+=("$variable=$value")
  [[ "$value" != /* ]] || install -D -m 644 "$value" "$machine$value"
done

clone=/srv/$path
if [ -z "$keep" ]; then
  rm -rf "${machine:?}$clone"
  git clone -q --no-hardlinks "$checkout" "$machine$clone"
  chroot "$machine" chown -R "$user:" "$clone"
fi
[ -e "$machine$clone/Makefile" ] || fail "--keep: $folder$clone holds no clone yet: leave --keep out"
if [ "$cache" ]; then
  mkdir -p "$cache" "$machine$home/.cache"
  mount --bind "$cache" "$machine$home/.cache"
fi
[ -z "$read_only" ] || mount --bind -o ro "$machine$home" "$machine$home"
[ -z "$cpus" ] || taskset -cp "0-$((cpus - 1))" $$ >/dev/null

# shellcheck disable=SC2016  # these expand inside
inside() { chroot --userspec="$user:$user" "$machine" env -i "${environment[@]}" bash -c 'cd "$0" && eval "$1"' "$clone" "$1"; }
# shellcheck disable=SC2016
inside 'echo "Debian $(cat /etc/debian_version), $(python3 --version), $(nproc) CPUs, $(whoami) in $PWD"'
for command in "$@"; do
  echo "\$ $command"
  start=$SECONDS
  status=0
  inside "$command" || status=$?
  echo "fresh machine: status $status after $((SECONDS - start)) s: $command"
  [ "$status" = 0 ] || exit "$status"
done
