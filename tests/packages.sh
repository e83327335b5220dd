#!/bin/sh
# Makes everything the tests need from Debian packages available. Safe to run again: it does only what is missing.
#
# Small tools are installed with apt-get. The two QEMUs and the two guest kernels are only unpacked, below
# tests/.cache, so that versions from different suites live side by side and the machine keeps its own.
# Backports are read through a private apt state in the same place: the machine's own sources stay as they are.
#
#   tests/packages.sh            everything
#   tests/packages.sh --check    says what is missing and changes nothing; status 1 if something is
#   tests/packages.sh --able     says why this machine cannot get what is missing, if so, and changes nothing
#
# Only the small tools need root, or a sudo that does not ask.
#
# Exit status 0 when all is there, 1 otherwise.
set -eu
umask 022

here=$(cd "$(dirname "$0")" && pwd)
cache=${IOTLBD_TEST_CACHE:-$here/.cache}
apt_state=$cache/apt
# The layout of the cache. A number, raised when a change here makes an older cache useless.
layout=1

say() { printf 'packages: %s\n' "$*"; }
die() {
    printf 'packages: error: %s\n' "$*" >&2
    exit 1
}

# program:package. The program tells whether the package has to be installed.
tools='ip:iproute2 iperf3:iperf3 ping:iputils-ping busybox:busybox-static xz:xz-utils dpkg-deb:dpkg ldd:libc-bin'

missing_packages() {
    for pair in $tools; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || printf '%s\n' "${pair#*:}"
    done
    # A dynamic busybox cannot be the guest's shell.
    if command -v busybox >/dev/null 2>&1 && ldd "$(command -v busybox)" 2>/dev/null | grep -q '=>'; then
        echo busybox-static
    fi
}

# name of the asset, one of its files that must be there
assets='qemu-7:usr/bin/qemu-system-x86_64 qemu-10:usr/bin/qemu-system-x86_64 linux-6.1:vmlinuz linux-6.12:vmlinuz'

missing_assets() {
    for pair in $assets; do
        name=${pair%%:*}
        [ -e "$cache/$name/${pair#*:}" ] && [ "$(cat "$cache/$name/.complete" 2>/dev/null)" = "$layout" ] ||
            printf '%s\n' "$name"
    done
}

need_packages=$(missing_packages)
need_assets=$(missing_assets)
if [ -z "$need_packages$need_assets" ]; then
    say 'all there'
    exit 0
fi
if [ "${1:-}" = --check ]; then
    [ -z "$need_packages" ] || say 'not installed:' $need_packages
    [ -z "$need_assets" ] || say "not below $cache:" $need_assets
    exit 1
fi

command -v apt-get >/dev/null 2>&1 ||
    die 'apt-get not found: this needs a Debian system. Missing:' $need_packages $need_assets
[ "$(dpkg --print-architecture)" = amd64 ] || die 'the guests are amd64 machines: run this on an amd64 Debian'
# The versions that are tested are this release's and its backports'; those of another one would be taken for them.
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -z "$need_assets" ] || [ "$codename" = bookworm ] ||
    die "the guests' QEMUs and kernels are those of Debian 12 (bookworm) and its backports, and this is" \
        "${codename:-a system without a VERSION_CODENAME in /etc/os-release}: run the guests on Debian 12." \
        "./tests/run --quick leaves them out"
[ -z "$need_packages" ] || [ "$(id -u)" = 0 ] || command -v sudo >/dev/null 2>&1 ||
    die "neither root nor sudo: install these by hand: $(echo $need_packages)"
if [ "${1:-}" = --able ]; then
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive

# One run at a time: two would unpack over each other.
mkdir -p "$cache"
exec 9>"$cache/.lock"
if command -v flock >/dev/null 2>&1; then
    flock 9
    need_packages=$(missing_packages)
    need_assets=$(missing_assets)
fi

# Runs a command and shows what it wrote only if it fails.
quietly() {
    if ! "$@" >"$cache/last-command.log" 2>&1; then
        tail -n 30 "$cache/last-command.log" >&2
        return 1
    fi
}

# As tests/run has it. sudo may forget the environment.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n env DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

if [ -n "$need_packages" ]; then
    say "installing" $need_packages
    # The lists of a fresh machine are empty or old; refresh them only when the first try fails.
    quietly as_root apt-get install -y -o DPkg::Lock::Timeout=300 --no-install-recommends $need_packages || {
        say 'trying again with fresh package lists'
        quietly as_root apt-get update || die 'apt-get update failed, see above'
        quietly as_root apt-get install -y -o DPkg::Lock::Timeout=300 --no-install-recommends $need_packages ||
            die "apt-get cannot install: $(echo $need_packages)"
    }
    [ -z "$(missing_packages)" ] || die "installed, but still not found: $(missing_packages | tr '\n' ' ')"
fi

# The archive's address is taken from the machine's own sources: the entry for the suite of this release's codename.
# Writes the URI and the Signed-By path of the machine's entry for $codename, separated by a blank.
machine_source() {
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk -v suite="$codename" '
            function flush() { if (uri != "" && hit) { print uri, key; exit } uri = key = ""; hit = 0 }
            /^[ \t]*$/ { flush(); next }
            /^URIs:/ { uri = $2 }
            /^Signed-By:/ { key = $2 }
            /^Suites:/ { for (i = 2; i <= NF; i++) if ($i == suite) hit = 1 }
            END { flush() }' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        awk -v suite="$codename" '
            $1 == "deb" {
                key = ""; n = 2
                if ($2 ~ /^\[/) {
                    for (; n <= NF; n++) {
                        option = $n; gsub(/[][]/, "", option)
                        if (option ~ /^signed-by=/) { key = option; sub(/^signed-by=/, "", key) }
                        if ($n ~ /\]$/) { n++; break }
                    }
                }
                if ($(n + 1) == suite) { print $n, key; exit }
            }' "$file"
    done
}

# apt-get over the private state: suites of this release and its backports, the machine's list of installed packages.
private_apt() {
    apt-get -o Dir::State::Status="$apt_state/status" -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt_state/sources" \
        -o Dir::State::Lists="$apt_state/lists" -o Dir::Cache="$apt_state/cache" -o Dir::Etc::Preferences=/dev/null \
        -o Dir::Etc::PreferencesParts=/dev/null -o APT::Sandbox::User=root -o Acquire::Retries=2 "$@"
}

prepare_private_apt() {
    mkdir -p "$apt_state/sources" "$apt_state/lists/partial" "$apt_state/cache/archives/partial"
    source=$(machine_source | head -n 1)
    [ -n "$source" ] ||
        die "no entry for suite $codename in /etc/apt/sources.list or sources.list.d: where is the archive?"
    uri=${source%% *}
    key=${source#* }
    {
        echo 'Types: deb'
        echo "URIs: $uri"
        echo "Suites: $codename $codename-backports"
        echo 'Components: main'
        [ -z "$key" ] || echo "Signed-By: $key"
    } >"$apt_state/sources/tests.sources"
    # A QEMU package that is installed already would break, or be missing from, the one that is unpacked.
    awk -v RS= -v ORS='\n\n' '!/^Package: qemu-/' /var/lib/dpkg/status >"$apt_state/status"
    quietly private_apt update || die "cannot read the package lists of $codename and $codename-backports, see above"
}

# unpack_all DIR SUITE PACKAGE...: the packages and whatever they need and this machine lacks, unpacked into DIR.
unpack_all() {
    directory=$1
    suite=$2
    shift 2
    archives=$directory.archives
    rm -rf "$archives" "$directory"
    mkdir -p "$archives/partial" "$directory"
    quietly private_apt -o Dir::Cache::Archives="$archives" -t "$suite" install --yes --download-only \
        --no-install-recommends "$@" || return 1
    for archive in "$archives"/*.deb; do
        [ -e "$archive" ] || return 1
        quietly dpkg-deb -x "$archive" "$directory" || return 1
    done
    rm -rf "$archives"
}

# kernel_package SUITE: the versioned package behind linux-image-cloud-amd64 in that suite.
kernel_package() {
    apt-cache -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt_state/sources" \
        -o Dir::State::Lists="$apt_state/lists" -o Dir::Cache="$apt_state/cache" \
        show "linux-image-cloud-amd64$1" 2>/dev/null |
        awk '/^Depends:/ { for (i = 2; i <= NF; i++) if ($i ~ /^linux-image-[0-9]/) { sub(/,$/, "", $i); print $i; exit } }'
}

# unpack_kernel DIR SUITE PREFIX: that suite's cloud kernel, whose version must begin with PREFIX.
unpack_kernel() {
    directory=$1
    package=$(kernel_package "/$2")
    case $package in
    linux-image-"$3".*) ;;
    '') die "no linux-image-cloud-amd64 in $2" ;;
    *) die "$2 has $package, the tests want a $3 kernel" ;;
    esac
    archives=$directory.archives
    rm -rf "$archives" "$directory"
    mkdir -p "$archives" "$directory"
    (cd "$archives" && quietly private_apt -t "$2" download "$package") || return 1
    quietly dpkg-deb -x "$archives"/*.deb "$directory" || return 1
    rm -rf "$archives"
    # One fixed name each, whatever the version is.
    mv "$directory"/boot/vmlinuz-* "$directory/vmlinuz" || return 1
    modules=$(find "$directory" -type d -path '*/lib/modules/*' -prune)
    [ -d "$modules/kernel" ] || return 1
    mv "$modules" "$directory/modules" || return 1
    rm -rf "$directory/boot" "$directory/lib" "$directory/usr"
}

if [ -n "$need_assets" ]; then
    prepare_private_apt
    for asset in $need_assets; do
        say "fetching $asset"
        case $asset in
        qemu-7) unpack_all "$cache/$asset" "$codename" qemu-system-x86 seabios ;;
        qemu-10) unpack_all "$cache/$asset" "$codename-backports" qemu-system-x86 seabios ;;
        linux-6.1) unpack_kernel "$cache/$asset" "$codename" 6.1 ;;
        linux-6.12) unpack_kernel "$cache/$asset" "$codename-backports" 6.12 ;;
        esac || die "cannot get $asset from the archive, see above"
        echo "$layout" >"$cache/$asset/.complete"
    done
    rm -rf "$apt_state"
fi
[ -z "$(missing_assets)" ] || die "unpacked, but still not complete: $(missing_assets | tr '\n' ' ')"
say 'all there'
