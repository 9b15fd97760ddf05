//! own_rootfs
