//! Linux' boot parameters, the "zero page".

use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::bootparam::{boot_e820_entry, boot_params, setup_header},
};
use vm_memory::GuestAddress;

use super::BootError;
use crate::{
    layout::{ACPI, BOOT_PARAMS, COMMAND_LINE, HIGH_MEMORY, HIGH_RAM_START, LOW_RAM_END, LOW_RESERVED},
    memory::{self, GuestMemory},
};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// A boot loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;

/// Writes the parameters. `header` is the kernel's own; a kernel that has none (ELF) gets the least one.
pub(super) fn write(
    memory: &GuestMemory,
    header: Option<setup_header>,
    initramfs: Option<(GuestAddress, u64)>,
    command_line_bytes: usize,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            kernel_alignment: 0x100_0000,
            ..Default::default()
        }),
        acpi_rsdp_addr: ACPI,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = low(COMMAND_LINE)?;
    params.hdr.cmdline_size =
        u32::try_from(command_line_bytes).map_err(|_| BootError::CommandLine(command_line_bytes))?;
    if let Some((address, bytes)) = initramfs {
        params.hdr.ramdisk_image = low(address.0)?;
        params.hdr.ramdisk_size = low(bytes)?;
    }
    let map = memory_map(memory::size(memory));
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    params.e820_entries = map.len().to_le_bytes()[0];
    let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(|_| BootError::NoRoom {
        kernel_end: HIGH_MEMORY,
        initramfs: memory::size(memory),
        initramfs_bytes: 0,
    })
}

/// Everything in these fields lies below 4 GiB, which is checked once more here.
fn low(value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::NoRoom { kernel_end: 0, initramfs: value, initramfs_bytes: 0 })
}

fn memory_map(bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RESERVED, E820_RAM),
        // The ACPI tables and the generation page are in here.
        (LOW_RESERVED, HIGH_MEMORY - LOW_RESERVED, E820_RESERVED),
        (HIGH_MEMORY, bytes.min(LOW_RAM_END) - HIGH_MEMORY, E820_RAM),
    ];
    if bytes > LOW_RAM_END {
        map.push((HIGH_RAM_START, bytes - LOW_RAM_END, E820_RAM));
    }
    map
}
