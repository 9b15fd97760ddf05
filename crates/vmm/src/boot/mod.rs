//! What is in memory before the first instruction: kernel, initramfs, command line, boot parameters, ACPI tables.

pub mod acpi;
mod params;

use std::{
    fs::File,
    io::{Read, Seek},
};

use linux_loader::loader::{BzImage, Elf, KernelLoader, bootparam::setup_header};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{
    layout::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_MEMORY, LOW_RAM_END, PAGE_BYTES},
    memory::{self, GuestMemory},
};

/// Offset of a bzImage's 64-bit entry from where it was loaded (Documentation/arch/x86/boot.rst).
const ENTRY_64: u64 = 0x200;
/// `XLF_KERNEL_64`: there is a 64-bit entry.
const HAS_ENTRY_64: u16 = 1;

/// Why a kernel was not loaded.
#[derive(Debug, Error)]
pub enum BootError {
    /// Not a kernel.
    #[error("the kernel was not loaded: neither a bzImage nor an ELF image that fits into guest memory")]
    Kernel(#[source] linux_loader::loader::Error),
    /// An old or 32-bit kernel.
    #[error("the kernel has no 64-bit entry")]
    NoEntry,
    /// Too little memory.
    #[error(
        "the kernel unpacks itself up to {kernel_end:#x}, but the initramfs of {initramfs_bytes} bytes starts at {initramfs:#x}: give the machine more memory"
    )]
    NoRoom {
        /// First address the kernel does not use.
        kernel_end: u64,
        /// Where the initramfs (or memory) begins (or ends).
        initramfs: u64,
        /// Bytes of the initramfs.
        initramfs_bytes: u64,
    },
    /// Too long, or with a zero in it.
    #[error("the kernel command line has {0} bytes or a zero byte in it; {max} bytes are possible", max = COMMAND_LINE_MAX - 1)]
    CommandLine(usize),
    /// A file.
    #[error("the {what} was not read")]
    Read {
        /// Which.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// ACPI tables past their place.
    #[error("the ACPI tables do not fit below the generation page")]
    Acpi,
    /// Guest memory that is too small for the fixed places.
    #[error("guest memory is too small to boot")]
    Memory(#[from] GuestMemoryError),
}

/// What to load.
#[derive(Debug)]
pub struct Image<'a> {
    /// A bzImage or a 64-bit ELF kernel.
    pub kernel: &'a mut File,
    /// Initial root file system.
    pub initramfs: Option<&'a mut File>,
    /// Kernel command line, without a closing zero.
    pub command_line: &'a str,
    /// Number of vCPUs, for the tables.
    pub vcpus: u8,
    /// The virtio slots that have a device.
    pub slots: &'a [u32],
}

/// Loads everything; returns the address of the first instruction, to be run in long mode with the boot parameters' address
/// in RSI.
///
/// # Errors
/// [`BootError`]; memory may then be partly written.
pub fn load(memory: &GuestMemory, image: Image<'_>) -> Result<GuestAddress, BootError> {
    let loaded = load_kernel(memory, image.kernel)?;
    let initramfs = match image.initramfs {
        None => None,
        Some(file) => Some(load_initramfs(memory, file, &loaded)?),
    };
    write_command_line(memory, image.command_line)?;
    params::write(memory, loaded.header, initramfs, image.command_line.len())?;
    acpi::write(memory, image.vcpus, image.slots)?;
    Ok(loaded.entry)
}

struct Loaded {
    entry: GuestAddress,
    header: Option<setup_header>,
    /// First address past what the kernel occupies before it knows the memory map.
    end: u64,
    /// The initramfs must lie below.
    initramfs_limit: u64,
}

fn load_kernel(memory: &GuestMemory, file: &mut File) -> Result<Loaded, BootError> {
    let start = Some(GuestAddress(HIGH_MEMORY));
    let mut magic = [0; 4];
    let read = |source| BootError::Read { what: "kernel", source };
    file.rewind().map_err(read)?;
    file.read_exact(&mut magic).map_err(read)?;
    if &magic == b"\x7fELF" {
        let loaded = Elf::load(memory, None, file, start).map_err(BootError::Kernel)?;
        return Ok(Loaded {
            entry: loaded.kernel_load,
            header: None,
            end: loaded.kernel_end,
            initramfs_limit: LOW_RAM_END,
        });
    }
    let loaded = BzImage::load(memory, None, file, start).map_err(BootError::Kernel)?;
    let header = loaded.setup_header.ok_or(BootError::NoEntry)?;
    // `xloadflags` came with version 2.12.
    if header.version < 0x20c || header.xloadflags & HAS_ENTRY_64 == 0 {
        return Err(BootError::NoEntry);
    }
    // It unpacks itself to the preferred address, or to where it is if that is higher.
    let unpacked = loaded.kernel_load.0.max(header.pref_address).saturating_add(u64::from(header.init_size));
    Ok(Loaded {
        entry: GuestAddress(loaded.kernel_load.0 + ENTRY_64),
        header: Some(header),
        end: loaded.kernel_end.max(unpacked),
        initramfs_limit: u64::from(header.initrd_addr_max) + 1,
    })
}

/// Reads the initramfs to the highest place the kernel allows; returns address and bytes.
fn load_initramfs(memory: &GuestMemory, file: &mut File, kernel: &Loaded) -> Result<(GuestAddress, u64), BootError> {
    let read = |source| BootError::Read { what: "initramfs", source };
    let bytes = file.metadata().map_err(read)?.len();
    let limit = memory::size(memory).min(LOW_RAM_END).min(kernel.initramfs_limit);
    let address = limit.saturating_sub(bytes) & !(PAGE_BYTES - 1);
    if address < kernel.end {
        return Err(BootError::NoRoom { kernel_end: kernel.end, initramfs: address, initramfs_bytes: bytes });
    }
    file.rewind().map_err(read)?;
    let count = usize::try_from(bytes).map_err(|_| BootError::NoRoom {
        kernel_end: kernel.end,
        initramfs: address,
        initramfs_bytes: bytes,
    })?;
    memory.read_exact_volatile_from(GuestAddress(address), file, count)?;
    Ok((GuestAddress(address), bytes))
}

fn write_command_line(memory: &GuestMemory, line: &str) -> Result<(), BootError> {
    if line.len() >= COMMAND_LINE_MAX || line.contains('\0') {
        return Err(BootError::CommandLine(line.len()));
    }
    memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_slice(&[0], GuestAddress(COMMAND_LINE + line.len() as u64))?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use linux_loader::loader::bootparam::boot_params;
    use vm_memory::ByteValued;

    use super::*;
    use crate::{
        layout::BOOT_PARAMS,
        memory::{Sharing, map},
    };

    const MEMORY: u64 = 64 << 20;

    fn guest_memory() -> GuestMemory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        map(&file, MEMORY, Sharing::Private).unwrap()
    }

    /// The least a bzImage is: one boot sector, one set-up sector, a payload.
    fn bzimage(change: impl FnOnce(&mut setup_header)) -> File {
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            version: 0x20f,
            loadflags: 1,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            xloadflags: HAS_ENTRY_64,
            pref_address: 0x100_0000,
            init_size: 0x10_0000,
            ..Default::default()
        };
        change(&mut header);
        let mut params = boot_params { hdr: header, ..Default::default() };
        let mut image = params.as_mut_slice()[..1024].to_vec();
        image.extend_from_slice(b"the kernel itself");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image).unwrap();
        file
    }

    fn load_both(kernel: &mut File, initramfs: &mut File, command_line: &str) -> Result<GuestMemory, BootError> {
        let memory = guest_memory();
        let image = Image { kernel, initramfs: Some(initramfs), command_line, vcpus: 1, slots: &[0] };
        assert_eq!(load(&memory, image)?, GuestAddress(0x10_0200));
        Ok(memory)
    }

    #[test]
    fn a_bzimage_and_its_initramfs_are_where_the_parameters_say() {
        let mut initramfs = tempfile::tempfile().unwrap();
        initramfs.write_all(&[9; 5000]).unwrap();
        let memory = load_both(&mut bzimage(|_| ()), &mut initramfs, "quiet").unwrap();
        let mut kernel = [0; 17];
        memory.read_slice(&mut kernel, GuestAddress(HIGH_MEMORY)).unwrap();
        assert_eq!(&kernel, b"the kernel itself");
        let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).unwrap();
        let (address, bytes) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((u64::from(address), bytes), (MEMORY - 8192, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(MEMORY - 8192 + 4999)).unwrap(), 9);
        let mut line = [0; 6];
        memory.read_slice(&mut line, GuestAddress(u64::from(params.hdr.cmd_line_ptr))).unwrap();
        assert_eq!(&line, b"quiet\0");
        let ram: u64 = params.e820_table[..usize::from(params.e820_entries)]
            .iter()
            .filter(|entry| { entry.r#type } == 1)
            .map(|entry| entry.size)
            .sum();
        assert_eq!(ram, MEMORY - 0x10_0000 + 0x9_fc00);
    }

    #[test]
    fn what_cannot_boot_is_refused() {
        let mut none = tempfile::tempfile().unwrap();
        let old = load_both(&mut bzimage(|header| header.version = 0x20b), &mut none, "");
        assert!(matches!(old, Err(BootError::NoEntry)));
        let small = load_both(&mut bzimage(|header| header.xloadflags = 0), &mut none, "");
        assert!(matches!(small, Err(BootError::NoEntry)));
        let large = load_both(&mut bzimage(|header| header.init_size = u32::MAX), &mut none, "");
        assert!(matches!(large, Err(BootError::NoRoom { .. })));
        let mut text = tempfile::tempfile().unwrap();
        text.write_all(b"#!/bin/sh").unwrap();
        assert!(matches!(load_both(&mut text, &mut none, ""), Err(BootError::Kernel(_))));
        for line in ["x".repeat(COMMAND_LINE_MAX), "a\0b".into()] {
            let refused = load_both(&mut bzimage(|_| ()), &mut none, &line);
            assert!(matches!(refused, Err(BootError::CommandLine(_))));
        }
    }
}
