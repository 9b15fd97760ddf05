//! ACPI tables: how the guest finds its processors and devices.
//!
//! Hardware-reduced ACPI: no fixed registers, no SCI, no legacy interrupt controller. A kernel of any distribution finds
//! virtio-mmio devices that way without a word on its command line, and sets up no timer or port that we would have to play.

use acpi_tables::{
    Aml,
    aml::{
        Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
        Interrupt, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate,
        Return, Scope, Store,
    },
    fadt::{FADTBuilder, Flags},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::{
    layout::{
        ACPI, GENERATION, GENERATION_GSI, GENERATION_PORT, IOAPIC, LOCAL_APIC, SERIAL_GSI, VIRTIO_MMIO_BYTES,
        virtio_slot,
    },
    memory::GuestMemory,
};

const OEM: [u8; 6] = *b"OFFSHO";
const OEM_TABLE: [u8; 8] = *b"OFFSHOOT";
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header (ACPI 6.5, table 5.4).
const HEADER_BYTES: u32 = 36;
/// FADT boot flags: no VGA, no MSI, no PCIe ASPM control, no CMOS clock.
const NO_LEGACY: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
/// The status a device's driver is notified of when it should look again.
const CHANGED: u8 = 0x80;

/// Writes all tables.
///
/// # Errors
/// [`BootError::Acpi`] if they need more than the place they have, [`BootError::Memory`].
pub fn write(memory: &GuestMemory, vcpus: u8, slots: &[u32]) -> Result<(), BootError> {
    let mut writer = Writer { memory, at: ACPI + 64 };
    let dsdt = writer.append(&bytes(&dsdt(vcpus, slots)))?;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = NO_LEGACY.into();
    let fadt = writer.append(&bytes(&fadt.finalize()))?;
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    let madt = writer.append(&bytes(&madt))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.append(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(ACPI))?;
    Ok(())
}

struct Writer<'a> {
    memory: &'a GuestMemory,
    at: u64,
}

impl Writer<'_> {
    /// Puts a table behind the last one; returns its address.
    fn append(&mut self, table: &[u8]) -> Result<u64, BootError> {
        let address = self.at;
        let end = address + table.len() as u64;
        if end > GENERATION {
            return Err(BootError::Acpi);
        }
        self.memory.write_slice(table, GuestAddress(address))?;
        self.at = end.next_multiple_of(16);
        Ok(address)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The table of devices.
fn dsdt(vcpus: u8, slots: &[u32]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, 6, OEM, OEM_TABLE, OEM_REVISION);
    for id in 0..vcpus {
        dsdt.append_slice(&processor(id));
    }
    for (address, gsi, slot) in slots.iter().filter_map(|slot| virtio_slot(*slot).map(|(a, g)| (a, g, *slot))) {
        dsdt.append_slice(&virtio(slot, address, gsi));
    }
    dsdt.append_slice(&serial());
    dsdt.append_slice(&generation());
    dsdt.append_slice(&events());
    dsdt.update_checksum();
    dsdt
}

fn in_system_bus(device: &dyn Aml) -> Vec<u8> {
    bytes(&Scope::new("\\_SB_".into(), vec![device]))
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A name of four letters that ends in a number of two digits.
fn numbered(prefix: &str, number: u32) -> Path {
    Path::new(&format!("{prefix}{number:02X}"))
}

fn processor(id: u8) -> Vec<u8> {
    in_system_bus(&Device::new(
        numbered("CP", id.into()),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    ))
}

fn virtio(slot: u32, address: u64, gsi: u32) -> Vec<u8> {
    let (base, length) = (low(address), low(VIRTIO_MMIO_BYTES));
    in_system_bus(&Device::new(
        numbered("VR", slot),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &slot),
            &Name::new("_CCA".into(), &1_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, base, length), &edge(gsi)]),
            ),
        ],
    ))
}

/// The serial port. Without it Linux would know the port but not its interrupt, and poll.
fn serial() -> Vec<u8> {
    in_system_bus(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(0x3f8, 0x3f8, 1, 8), &edge(SERIAL_GSI)])),
        ],
    ))
}

/// The generation identifier ("Virtual Machine Generation ID" of Microsoft): 16 bytes in memory that change with every restore.
///
/// A driver asks where they are. That it did is written to a port: only then is it worth its while to interrupt the guest.
fn generation() -> Vec<u8> {
    in_system_bus(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"OFSHVGID"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &OpRegion::new("PORT".into(), OpRegionSpace::SystemIO, &GENERATION_PORT, &1_u8),
            &Field::new(
                "PORT".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"USED", 8)],
            ),
            &Method::new(
                "ADDR".into(),
                0,
                true,
                vec![&Store::new(&Path::new("USED"), &ONE), &Return::new(&Package::new(vec![&low(GENERATION), &0_u8]))],
            ),
        ],
    ))
}

/// The device that turns an interrupt into a notification (generic event device).
fn events() -> Vec<u8> {
    in_system_bus(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(GENERATION_GSI)])),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &GENERATION_GSI),
                    vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED)],
                )],
            ),
        ],
    ))
}

/// Addresses of the tables' devices; all lie below 4 GiB (asserted below).
const fn low(address: u64) -> u32 {
    let bytes = address.to_le_bytes();
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
const _: () = assert!(GENERATION < 1 << 32 && crate::layout::VIRTIO_MMIO < 1 << 32);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::memory::{Sharing, map};

    fn tables(vcpus: u8, slots: &[u32]) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 << 20).unwrap();
        let memory = map(&file, 2 << 20, Sharing::Private).unwrap();
        write(&memory, vcpus, slots).unwrap();
        let mut bytes = vec![0; 0x2_0000];
        memory.read_slice(&mut bytes, GuestAddress(ACPI)).unwrap();
        bytes
    }

    fn quad(bytes: &[u8], at: usize) -> usize {
        usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
    }

    fn table(bytes: &[u8], address: usize) -> &[u8] {
        let at = address - usize::try_from(ACPI).unwrap();
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        &bytes[at..at + usize::try_from(length).unwrap()]
    }

    #[test]
    fn the_tables_are_found_from_the_root_and_their_sums_are_zero() {
        let bytes = tables(8, &[0, 1, 2, 3, 17]);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let xsdt = table(&bytes, quad(&bytes, 24));
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&bytes, quad(entry, 0));
            assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            names.push(String::from_utf8(table[..4].to_vec()).unwrap());
            if &table[..4] == b"FACP" {
                let dsdt = self::table(&bytes, quad(table, 140));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(dsdt.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            }
        }
        assert_eq!(names, ["FACP", "APIC"]);
    }

    /// Where the ACPI compiler is installed it must understand every device.
    #[test]
    fn the_device_table_can_be_disassembled() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("dsdt.aml");
        std::fs::write(&file, bytes(&dsdt(2, &[0, 1, 2, 3]))).unwrap();
        let Ok(output) = Command::new("iasl").arg("-d").arg(&file).output() else {
            eprintln!("not run: iasl (Debian's acpica-tools) is not installed");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let source = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap();
        for part in ["VR03", "0xD0003000", "VM_Gen_Counter", "Notify (\\_SB.VGEN, 0x80)", "0x00000017", "PNP0501"] {
            assert!(source.contains(part), "{part} is not in {source}");
        }
    }
}
