//! Kernel modules: what a module file says it depends on, and an order to load a set of them in.
//!
//! The package's `modules.dep` is made when it is installed, which we never do; the modules themselves carry the same
//! facts in their `.modinfo` section.

use std::collections::BTreeMap;

/// `depends=` of a module file (an ELF64 relocatable object). `None` if the file is not one.
pub(super) fn dependencies(elf: &[u8]) -> Option<Vec<String>> {
    let modinfo = section(elf, b".modinfo")?;
    let depends = modinfo
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))
        .map(|list| String::from_utf8_lossy(list).into_owned())
        .unwrap_or_default();
    Some(depends.split(',').filter(|name| !name.is_empty()).map(canonical).collect())
}

/// A module's name as the kernel compares it: file names may have `-` for `_`.
pub(super) fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// `wanted` and everything they need, what is needed before what needs it. Names that `modules` lacks are left out:
/// they are built in, or this kernel has none.
pub(super) fn load_order(wanted: &[&str], modules: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    fn visit(name: &str, modules: &BTreeMap<String, Vec<String>>, seen: &mut Vec<String>, order: &mut Vec<String>) {
        let Some(needs) = modules.get(name) else { return };
        if seen.iter().any(|other| other == name) {
            return;
        }
        seen.push(name.to_owned());
        for need in needs {
            visit(need, modules, seen, order);
        }
        order.push(name.to_owned());
    }
    let (mut seen, mut order) = (Vec::new(), Vec::new());
    for name in wanted {
        visit(&canonical(name), modules, &mut seen, &mut order);
    }
    order
}

fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if elf.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let word = |at: usize, len: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    let (table, size, count, names) = (word(0x28, 8)?, word(0x3a, 2)?, word(0x3c, 2)?, word(0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let content = |index: usize| {
        let at = header(index)?;
        let (offset, length) = (word(at.checked_add(0x18)?, 8)?, word(at.checked_add(0x20)?, 8)?);
        elf.get(offset..offset.checked_add(length)?)
    };
    let names = content(names)?;
    (0..count).find_map(|index| {
        let own = names.get(word(header(index)?, 4)?..)?;
        (own.strip_prefix(name)?.first() == Some(&0)).then(|| content(index))?
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use super::*;

    /// An ELF64 file with nothing but a `.modinfo` section.
    pub fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = vec![0; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        let (modinfo_at, names_at) = (elf.len(), elf.len() + modinfo.len());
        elf.extend_from_slice(modinfo);
        elf.extend_from_slice(names);
        let table = elf.len() as u64;
        elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        elf[0x3a..0x40].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
        for (name, at, len) in [(0_u32, 0, 0), (1, modinfo_at, modinfo.len()), (10, names_at, names.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf
    }

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        let elf = module(b"license=GPL\0depends=virtio-ring,virtio\0name=x\0");
        assert_eq!(dependencies(&elf).unwrap(), ["virtio_ring", "virtio"]);
        assert!(dependencies(&module(b"depends=\0")).unwrap().is_empty());
    }

    #[test]
    fn a_cut_or_foreign_file_is_no_module() {
        let elf = module(b"depends=virtio\0");
        for cut in 0..elf.len() {
            let _ = dependencies(&elf[..cut]);
        }
        assert!(dependencies(b"#!/bin/sh").is_none());
        let mut huge = elf;
        huge[0x28..0x30].fill(0xff);
        assert!(dependencies(&huge).is_none());
    }

    #[test]
    fn what_is_needed_comes_first_and_once_even_in_a_circle() {
        let modules = [("a", vec!["b"]), ("b", vec!["ring"]), ("ring", vec![]), ("x", vec!["y"]), ("y", vec!["x"])]
            .map(|(name, needs)| (name.to_owned(), needs.into_iter().map(str::to_owned).collect()))
            .into();
        assert_eq!(load_order(&["a", "b", "absent"], &modules), ["ring", "b", "a"]);
        assert_eq!(load_order(&["x"], &modules), ["y", "x"]);
    }
}
