# Shell functions that make what the nested rig boots: a kernel and a root file system, in offshoot's cache. To be sourced
# after lib-setup.sh, by a POSIX shell.
# shellcheck shell=sh disable=SC2154

# In the root file system: what the tests of the whole system use, and other programs to compare with. busybox brings
# `reboot`; gcc compiles the recipes' programs.
rig_packages=busybox-static,passt,kmod,iproute2,nftables,procps,strace,util-linux,qemu-system-x86,e2fsprogs,mmdebstrap,xz-utils,gcc,libc6-dev,python3-minimal
# In the initramfs, in the order to load them: enough to reach the root file system.
rig_modules="virtio_ring virtio virtio_mmio virtio_blk overlay"
# Changes with everything that makes another root file system.
rig_format=1

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

# rig_candidate META: "PACKAGE VERSION" of the newest kernel that META depends on.
rig_candidate() {
    apt-cache show --no-all-versions "$1" 2>/dev/null \
        | sed -n 's/^Depends: *\(linux-image-[^ ]*\) (= \([^)]*\)).*/\1 \2/p' | head -n 1
}

# Sets rig_dir to a folder with `vmlinuz`, `modules/` and `root.ext4`, made if it is not there.
ensure_rig() {
    shelf=$(rig_cache)
    mkdir -p "$shelf"
    candidate=$(rig_candidate linux-image-cloud-amd64)
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

# Sets vmgenid_kernel to a kernel with a driver for the generation identifier, and vmgenid_tree to the folder with it and its
# modules, as its package has them. Debian's cloud kernel 6.1 has no such driver. Backports' newer one would be half the
# download, but takes another apt source.
ensure_vmgenid_kernel() {
    shelf=$(rig_cache)
    mkdir -p "$shelf"
    candidate=$(rig_candidate linux-image-amd64)
    if [ -n "$candidate" ]; then
        vmgenid_tree=$shelf/${candidate% *}_$(printf '%s' "${candidate#* }" | sed 's/:/%3a/g')_vmgenid
        [ -d "$vmgenid_tree" ] || make_vmgenid_kernel "${candidate% *}" "${candidate#* }"
    else
        vmgenid_tree=$(find "$shelf" -mindepth 1 -maxdepth 1 -name '*_vmgenid' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
        [ -n "$vmgenid_tree" ] || setup_fail "apt knows no package linux-image-amd64; run: sudo apt-get update"
    fi
    vmgenid_kernel=$(find "$vmgenid_tree/boot" -name 'vmlinuz-*')
}

make_vmgenid_kernel() {
    vmgenid_work=$(mktemp -d "$shelf/.new-XXXXXX")
    if ! fill_vmgenid_kernel "$1" "$2" >"$shelf/log" 2>&1; then
        tail -n 20 "$shelf/log" >&2
        rm -rf "$vmgenid_work"
        setup_fail "The kernel $1 could not be fetched; if apt's lists are old run: sudo apt-get update"
    fi
    # If another run was faster it has made the same.
    mv -T "$vmgenid_work/tree" "$vmgenid_tree" || [ -d "$vmgenid_tree" ]
    rm -rf "$vmgenid_work"
}

# fill_vmgenid_kernel PACKAGE VERSION: makes $vmgenid_work/tree.
fill_vmgenid_kernel() {
    (cd "$vmgenid_work" && apt-get -q -o APT::Sandbox::User= download "$1=$2") || return 1
    dpkg-deb -x "$vmgenid_work"/linux-image-*.deb "$vmgenid_work/tree" || return 1
    # Of its 400 MB what a guest needs; some of this may be built in.
    find "$vmgenid_work/tree" ! -type d ! -name 'vmlinuz-*' ! -name 'virtio*.ko*' ! -name 'rng-core.ko*' ! -name '*failover.ko*' \
        ! -name 'overlay.ko*' ! -name 'ext4.ko*' ! -name 'jbd2.ko*' ! -name 'mbcache.ko*' ! -name 'crc16.ko*' \
        ! -name 'crc32c_generic.ko*' -delete && find "$vmgenid_work/tree" -type d -empty -delete
}

# fetch_for RECIPE: downloads into the cache what its templates are made from: the rig has no network.
fetch_for() {
    home=$(mktemp -d)
    OFFSHOOT_DATA_DIR=$home/data OFFSHOOT_STATE_DIR=$home/state "$offshoot_bin/offshoot" build "$1" --tag fetched --quiet
    rm -rf "$home"
}

# test_in_rig [FILTER]: runs the compiled tests of the whole system in the rig. What templates are made from is downloaded
# outside; the templates stay on a disk of the rig's for the next run. Without a filter two machines share the work.
test_in_rig() {
    kept=$(cache_folder)
    ls "$kept"/kernel-*/*/vmlinuz "$kept"/rootfs/debian-*.tar >/dev/null 2>&1 || fetch_for python
    tests=$(cargo test -p offshoot-tests --test system --no-run --message-format json \
        | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [ -n "$tests" ] || setup_fail "The tests of the whole system could not be built; see the lines above."
    ensure_vmgenid_kernel
    if [ $# -gt 0 ]; then
        tests_in_one_rig tests-1 "$@"
        return
    fi
    # Half of them by time, and those together that share what takes long to build. Without the daemon's: it is the same whatever the engine, and
    # its tests use programs that the rig does not have. Without those of the router and of the audit, which know no engine. Without those of the browser and of Node, whose packages are not fetched for it. And without those that break standby off at each of its steps: what undoes it is the
    # same, too, and they take as long as a quarter of all others.
    all=$("$tests" --list | sed -n 's/: test$//p' | grep -v -e '^\(api\|route\)[a-z_]*::' -e '^\(audit\|browser\|node\)::' -e '^\(standby\|branch\)::o2_')
    half='^\(adversary\|branch\|eval\|generation\|identity\|idle\|isolation\|pool\|network[a-z_]*\)::'
    codes=$(mktemp -d)
    for part in 1 2; do
        {
            code=0
            if [ "$part" = 1 ]; then names=$(echo "$all" | grep "$half"); else names=$(echo "$all" | grep -v "$half"); fi
            # shellcheck disable=SC2086
            tests_in_one_rig "tests-$part" --exact $names 2>&1 || code=$?
            echo "$code" >"$codes/$part"
        } | tee "$codes/$part.log" | sed -u "s/^/$part| /" &
    done
    wait
    # A machine that is emulated in an emulated machine stands still for seconds now and then, which some deadlines do not bear. So a few that
    # failed in a run that came to its end are run once more, alone. What fails twice fails.
    for part in 1 2; do
        again=$(failed_tests "$codes/$part.log")
        [ -n "$again" ] && [ "$(echo "$again" | wc -l)" -le 3 ] || continue
        echo "Failed in machine $part, run once more, alone:" $again
        # shellcheck disable=SC2086
        if tests_in_one_rig "tests-$part" --exact $again; then echo 0 >"$codes/$part"; fi
    done
    # Both must have said so: one that ended before it could has not passed.
    passed=$(cat "$codes/1" "$codes/2" 2>/dev/null | grep -cx 0) || :
    rm -r "$codes"
    [ "$passed" -eq 2 ]
}

# failed_tests FILE: the names of the tests that failed, as the end of their output lists them.
failed_tests() {
    sed -n '/^failures:$/,/^test result: FAILED/s/^    \([a-z0-9_]*::[a-z0-9_:]*\)$/\1/p' "$1" 2>/dev/null | sort -u
}

# tests_in_one_rig DISK ARGUMENT…: one processor, because emulated ones with guests of their own trip over each other now and then.
tests_in_one_rig() {
    disk=$1 && shift
    # Ignored are those that need what only the rig has.
    set -- "$tests" --include-ignored --nocapture --test-threads 1 "$@"
    # Folders that the tests read, and what was downloaded.
    for path in tests recipes examples docs crates/host/src crates/net/src; do
        set -- --file "$offshoot_source/$path" "$@"
    done
    for path in "$kept"/kernel-* "$kept"/rootfs/debian-*.tar; do
        set -- --file "$path:/var/cache/offshoot${path#"$kept"}" "$@"
    done
    set -- --file "$vmgenid_tree" --env OFFSHOOT_TEST_VMGENID_KERNEL="$vmgenid_kernel" "$@"
    "$offshoot_source/scripts/rig" run --timeout "${OFFSHOOT_RIG_TIMEOUT:-3000}" --memory 6G --cpus 1 --disk "$disk" \
        --env OFFSHOOT_TEST_DIR=/kept --env OFFSHOOT_ENGINE=kvm "$@"
}
