//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  RAM (GDT, boot parameters, page tables, command line: only until the kernel has its own)
//! 0x0009_fc00  reserved
//! 0x000e_0000  ACPI tables
//! 0x000f_f000  generation identifier page
//! 0x0010_0000  RAM: kernel … initramfs
//! 0xc000_0000  hole: devices
//! 0xd000_0000  virtio-mmio, one page a slot
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APICs
//! 0xfffb_c000  identity map page and TSS of KVM
//! 0x1_0000_0000  RAM beyond 3 GiB
//! ```

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// RAM below this address (3 GiB) has its file offset as its address.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM from file offset [`LOW_RAM_END`] on starts here (4 GiB).
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Boot GDT.
pub const GDT: u64 = 0x500;
/// Linux' `boot_params`, one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Boot stack: grows down from here.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Boot page tables: PML4, PDPT and page directory, a page each.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x20000;
/// Most bytes of a command line, the closing zero included.
pub const COMMAND_LINE_MAX: usize = 4096;
/// End of the RAM below 640 KiB.
pub const LOW_RESERVED: u64 = 0x9_fc00;
/// ACPI: the RSDP is first; firmware tables are searched from here.
pub const ACPI: u64 = 0xe_0000;
/// The generation identifier's page.
pub const GENERATION: u64 = 0xf_f000;
/// Start of the RAM above 1 MiB: the kernel's place.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// MMIO of virtio slot 0.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Bytes of MMIO of each virtio slot.
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
/// Interrupt of virtio slot 0; the next slots have the next numbers.
pub const VIRTIO_GSI: u32 = 5;
/// Most virtio slots (IOAPIC pins 5 to 22; 23 is [`GENERATION_GSI`]).
pub const VIRTIO_SLOTS: u32 = 18;
/// Interrupt that tells the guest of a new generation.
pub const GENERATION_GSI: u32 = 23;

/// Port by which the guest says that it has a driver for the generation identifier.
pub const GENERATION_PORT: u16 = 0x600;

/// First serial port.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Ports of the serial device.
pub const SERIAL_PORTS: u64 = 8;
/// Interrupt of the serial device.
pub const SERIAL_GSI: u32 = 4;
/// Keyboard controller: data port 0x60 and command port 0x64.
pub const KEYBOARD_PORT: u64 = 0x60;
/// Ports of the keyboard controller.
pub const KEYBOARD_PORTS: u64 = 5;

/// IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// KVM's identity map page (one page).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's TSS (three pages).
pub const KVM_TSS: usize = 0xfffb_d000;

/// MMIO address and interrupt of a virtio slot.
///
/// `None` from slot [`VIRTIO_SLOTS`] on.
pub fn virtio_slot(slot: u32) -> Option<(u64, u32)> {
    (slot < VIRTIO_SLOTS).then(|| (VIRTIO_MMIO + u64::from(slot) * VIRTIO_MMIO_BYTES, VIRTIO_GSI + slot))
}
