//! What a guest is started from: the kernel, the initramfs with our agent, and the root file system as a disk image.
//!
//! Everything here can be made again, so it lives in the cache: looked up by a hash of what goes in, made in a
//! temporary place beside its final one under a lock, and renamed when complete. Half an image is never found.

pub mod cache;
mod cpio;
pub mod ext4;
pub mod initramfs;
pub mod kernel;
mod module;
pub mod program;
pub mod rootfs;
