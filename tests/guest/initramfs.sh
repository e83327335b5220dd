#!/bin/sh
# Builds a guest's initramfs: busybox, iperf3 and ping with their libraries, the kernel's modules for the virtio network
# device, and the init beside this file.
#
#   initramfs.sh KERNEL-DIRECTORY OUTPUT     KERNEL-DIRECTORY holds modules/, as tests/packages.sh leaves it
set -eu
umask 022
[ $# = 2 ] || { echo "usage: $0 KERNEL-DIRECTORY OUTPUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
kernel=$1
output=$2
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

program() {
    command -v "$1" || { echo "$0: $1 not found: run tests/packages.sh" >&2; exit 1; }
}

mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/tmp" "$root/modules"
cp "$here/init" "$root/init"
chmod 755 "$root/init"
cp -L "$(program busybox)" "$root/bin/busybox"
# Called by path: the shell would take its own, smaller ping for the bare name.
for name in iperf3 ping; do
    path=$(program $name)
    mkdir -p "$root/programs"
    cp -L "$path" "$root/programs/$name"
    for library in $(ldd "$path" | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) print $i }'); do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
done

# In the order of their dependencies. What a kernel has built in, or has not at all, is left out.
for module in failover net_failover virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio-iommu \
    virtio_pci virtio_net; do
    file=$(find "$kernel/modules" -name "$module.ko" -o -name "$module.ko.xz" | head -n 1)
    case $file in
    '') continue ;;
    *.xz) xz -dc "$file" >"$root/modules/$module.ko" ;;
    *) cp "$file" "$root/modules/$module.ko" ;;
    esac
    echo "$module" >>"$root/modules/order"
done
[ -e "$root/modules/virtio_net.ko" ] || { echo "$0: no virtio_net module below $kernel/modules" >&2; exit 1; }

# Written under another name first: a half-written file must not be taken for a good one. No compression: reading it is
# cheaper for an emulated processor than unpacking it.
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null) >"$output.new.$$"
mv "$output.new.$$" "$output"
