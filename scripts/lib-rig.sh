# Shell functions that make what the nested rig boots: a kernel and a root file system, in offshoot's cache. To be sourced
# after lib-setup.sh, by a POSIX shell.
# shellcheck shell=sh disable=SC2154

# In the root file system: what the tests of the whole system use, and other programs to compare with. busybox brings
# `reboot`; gcc compiles the recipes' programs.
rig_packages=busybox-static,kmod,iproute2,nftables,procps,strace,util-linux,qemu-system-x86,e2fsprogs,mmdebstrap,xz-utils,gcc,libc6-dev,python3-minimal
# In the initramfs, in the order to load them: enough to reach the root file system.
rig_modules="virtio_ring virtio virtio_mmio virtio_blk overlay"
# Changes with everything that makes another root file system.
rig_format=1

# Where offshoot has its cache.
cache_folder() {
    if [ -n "${OFFSHOOT_CACHE_DIR:-}" ]; then
        echo "$OFFSHOOT_CACHE_DIR"
    elif [ "$(id -u)" -eq 0 ]; then
        echo /var/cache/offshoot
    else
        echo "${XDG_CACHE_HOME:-$HOME/.cache}/offshoot"
    fi
}

rig_cache() {
    echo "$(cache_folder)/rig"
}

# What runs outside.
install_rig() {
    install_missing qemu-system-x86 e2fsprogs mmdebstrap busybox-static cpio util-linux gcc libc6-dev
}

# The suite whose programs run what was compiled here.
rig_suite() {
    # shellcheck disable=SC1091
    (. /etc/os-release && [ "$ID" = debian ] && echo "$VERSION_CODENAME") 2>/dev/null || echo bookworm
}

# "PACKAGE VERSION" of the newest cloud kernel.
rig_candidate() {
    apt-cache show --no-all-versions linux-image-cloud-amd64 2>/dev/null \
        | sed -n 's/^Depends: *\(linux-image-[^ ]*\) (= \([^)]*\)).*/\1 \2/p' | head -n 1
}

# Sets rig_dir to a folder with `vmlinuz`, `modules/` and `root.ext4`, made if it is not there.
ensure_rig() {
    shelf=$(rig_cache)
    mkdir -p "$shelf"
    candidate=$(rig_candidate)
    if [ -z "$candidate" ]; then
        # Without apt's lists what was made before serves.
        rig_dir=$(find "$shelf" -mindepth 2 -maxdepth 2 -name root.ext4 -printf '%T@ %h\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
        [ -n "$rig_dir" ] || setup_fail "apt knows no package linux-image-cloud-amd64; run: sudo apt-get update"
        return 0
    fi
    package=${candidate% *} version=${candidate#* }
    wanted=$(printf '%s' "$rig_format $(rig_suite) $rig_packages $rig_modules" | cksum | cut -d' ' -f1)
    rig_dir=$shelf/${package}_$(printf '%s' "$version" | sed 's/:/%3a/g')_$wanted
    [ ! -e "$rig_dir/root.ext4" ] || return 0
    # Two at once share the work.
    exec 9>"$shelf/.lock"
    flock 9
    [ -e "$rig_dir/root.ext4" ] || make_rig "$package" "$version"
    exec 9>&-
}

make_rig() {
    need_root_or_sudo
    rig_work=$(mktemp -d "$shelf/.new-XXXXXX")
    echo "Making the rig's root file system, once; this takes minutes" >&2
    if ! fill_rig "$1" "$2" >"$shelf/log" 2>&1; then
        tail -n 20 "$shelf/log" >&2
        $as_root rm -rf "$rig_work"
        setup_fail "The rig's root file system could not be made; all that was said is in $shelf/log"
    fi
    rm -rf "$rig_dir"
    mv "$rig_work/rig" "$rig_dir"
    $as_root rm -rf "$rig_work"
}

# fill_rig PACKAGE VERSION: makes $rig_work/rig.
fill_rig() {
    release=${1#linux-image-} release=${release%-unsigned}
    mkdir -p "$rig_work/rig/modules" "$rig_work/tmp"
    # The kernel is unpacked, never installed. Root's apt would fetch as another user, who cannot write here.
    (cd "$rig_work" && apt-get -q -o APT::Sandbox::User= download "$1=$2") || return 1
    dpkg-deb -x "$rig_work"/linux-image-*.deb "$rig_work/kernel" || return 1
    cp "$rig_work/kernel/boot/vmlinuz-$release" "$rig_work/rig/vmlinuz" || return 1
    modules=$rig_work/kernel/lib/modules
    [ -d "$modules" ] || modules=$rig_work/kernel/usr/lib/modules
    number=10
    for name in $rig_modules; do
        file=$(find "$modules" -name "$name.ko*" | head -n 1)
        case $file in
        *.ko) cp "$file" "$rig_work/rig/modules/$number-$name.ko" ;;
        *.ko.xz) xz -dc "$file" >"$rig_work/rig/modules/$number-$name.ko" ;;
        *) echo "$name is not in $1" && return 1 ;;
        esac || return 1
        number=$((number + 1))
    done
    mirror=${OFFSHOOT_DEBIAN_MIRROR:-}
    # shellcheck disable=SC2016
    $as_root env TMPDIR="$rig_work/tmp" SOURCE_DATE_EPOCH=1 mmdebstrap --mode=root --variant=minbase --format=directory \
        --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --include="$rig_packages" \
        --customize-hook="mkdir -p \"\$1/lib/modules\" && cp -r '$modules/$release' \"\$1/lib/modules/\" && chroot \"\$1\" depmod '$release'" \
        --customize-hook="mkdir \"\$1/rig\" && ln -s /bin/busybox \"\$1/usr/local/sbin/reboot\"" \
        -- "$(rig_suite)" "$rig_work/root" ${mirror:+"$mirror"} || return 1
    truncate -s 2G "$rig_work/rig/root.ext4" || return 1
    # Root reads the tree, whose files are not all for everybody.
    $as_root mke2fs -q -t ext4 -m 0 -O ^has_journal -d "$rig_work/root" "$rig_work/rig/root.ext4"
}

# test_in_rig [FILTER]: runs the compiled tests of the whole system in the rig. What templates are made from is downloaded
# outside; the templates stay on a disk of the rig's for the next run.
test_in_rig() {
    kept=$(cache_folder)
    if ! ls "$kept"/kernel/*/vmlinuz "$kept"/rootfs/debian-*.tar >/dev/null 2>&1; then
        home=$(mktemp -d)
        OFFSHOOT_DATA_DIR=$home/data OFFSHOOT_STATE_DIR=$home/state "$offshoot_bin/offshoot" build python --tag fetched --quiet
        rm -rf "$home"
    fi
    tests=$(cargo test -p offshoot-tests --test system --no-run --message-format json \
        | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [ -n "$tests" ] || setup_fail "The tests of the whole system could not be built; see the lines above."
    set -- "$tests" --test-threads "${OFFSHOOT_TEST_THREADS:-1}" "$@"
    # Folders that the tests read, and what was downloaded.
    for path in tests recipes examples docs crates/host/src; do
        set -- --file "$offshoot_source/$path" "$@"
    done
    for path in "$kept"/kernel "$kept"/rootfs/debian-*.tar; do
        set -- --file "$path:/var/cache/offshoot${path#"$kept"}" "$@"
    done
    "$offshoot_source/scripts/rig" run --timeout "${OFFSHOOT_RIG_TIMEOUT:-5400}" --memory 6G --disk tests \
        --env OFFSHOOT_TEST_DIR=/kept --env OFFSHOOT_TEST_ENGINE=kvm "$@"
}
