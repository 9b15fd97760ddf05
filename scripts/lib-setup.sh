# Shell functions that bring a Debian machine to where offshoot can be built and run. To be sourced, by a POSIX shell:
#   . "$(dirname "$0")/lib-setup.sh"
# shellcheck shell=sh

offshoot_source=${offshoot_source:-$(git rev-parse --show-toplevel 2>/dev/null || pwd)}
offshoot_target=x86_64-unknown-linux-gnu
# All programs side by side, so that the command line finds its agent and its worker.
offshoot_bin=$offshoot_source/target/offshoot-bin
# Features to build them with; those that run tests set them.
agent_features=
cli_features=

setup_fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Sets as_root to what must stand before a command that needs root.
need_root_or_sudo() {
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif command -v sudo >/dev/null 2>&1; then
        as_root=sudo
    else
        setup_fail "This needs root: run it as root, or install sudo."
    fi
}

is_installed() {
    dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
}

# install_missing PACKAGE…: installs those that are not there, and does nothing, not even ask for root, if all are.
install_missing() {
    command -v dpkg-query >/dev/null 2>&1 || setup_fail "This is no Debian system. Install yourself: $*"
    missing=
    for package in "$@"; do
        is_installed "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    need_root_or_sudo
    echo "Installing:$missing"
    # Package names have no blanks, so $missing is split on purpose; the lists may be old or absent, then once more.
    # shellcheck disable=SC2086
    if ! $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1; then
        echo "Updating the package lists"
        $as_root apt-get update -qq || setup_fail "The package lists could not be updated; see the lines above, then run: apt-get update"
        # shellcheck disable=SC2086
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null \
            || setup_fail "These packages could not be installed; see the lines above, then run: apt-get install$missing"
    fi
}

# What running offshoot takes.
install_runtime() {
    install_missing qemu-system-x86 e2fsprogs mmdebstrap busybox-static xz-utils passt
    [ "$(id -u)" -eq 0 ] || install_missing uidmap
}

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

# The folder in which cargo puts what it builds with profile $1.
profile_folder() {
    case $1 in dev | test) echo debug ;; *) echo "$1" ;; esac
}

copy_program() {
    mkdir -p "$offshoot_bin"
    # A program that is the same keeps its time: what was made with it is still good.
    cmp -s "$1" "$offshoot_bin/$2" && return 0
    # By a rename, so that a program that runs is not written over.
    cp "$1" "$offshoot_bin/.$2.new" && mv "$offshoot_bin/.$2.new" "$offshoot_bin/$2"
}

# build_agent [PROFILE]: the agent is the first program of a guest, where no library is, so it is linked statically.
build_agent() {
    profile=${1:-release}
    (cd "$offshoot_source" && RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --profile "$profile" -p offshoot-agent --features "$agent_features" --target "$offshoot_target") \
        || setup_fail "The agent could not be built; see the lines above."
    copy_program "$offshoot_source/target/$offshoot_target/$(profile_folder "$profile")/offshoot-agent" offshoot-agent
    # It lies in the guest's memory: with its debug information a small guest has no room to boot.
    strip --strip-debug "$offshoot_bin/offshoot-agent"
}

# build_offshoot [PROFILE]: all programs, into $offshoot_bin.
build_offshoot() {
    profile=${1:-release}
    build_agent "$profile"
    (cd "$offshoot_source" && cargo build --profile "$profile" -p offshoot-cli --features "$cli_features" \
        && cargo build --profile "$profile" -p offshoot-vmm) \
        || setup_fail "offshoot could not be built; see the lines above."
    copy_program "$offshoot_source/target/$(profile_folder "$profile")/offshoot" offshoot
    copy_program "$offshoot_source/target/$(profile_folder "$profile")/offshoot-vmm" offshoot-vmm
}
