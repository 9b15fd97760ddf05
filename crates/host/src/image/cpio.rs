//! A cpio archive in the `newc` format, the one the kernel unpacks as its initramfs.
//!
//! Per entry: a header of `070701` and 13 numbers of eight hexadecimal digits, the name with a NUL, padding to four bytes, the
//! content, padding to four bytes. See the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes an archive in which everything belongs to root and has no date, so that equal input makes equal bytes.
#[derive(Debug)]
pub(super) struct Writer<W> {
    out: W,
    at: u64,
    inode: u32,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, at: 0, inode: 0 }
    }

    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[])
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, (0, 0), content)
    }

    pub(super) fn character_device(&mut self, name: &str, mode: u32, device: (u32, u32)) -> io::Result<()> {
        self.entry(name, CHARACTER_DEVICE | mode, device, &[])
    }

    pub(super) fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other("a file of 4 GiB or more"))?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.inode += 1;
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.at.next_multiple_of(4) - self.at;
        self.put(&[0; 3][..usize::try_from(missing).unwrap_or(0)])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn archive() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev").unwrap();
        writer.character_device("dev/console", 0o600, (5, 1)).unwrap();
        for size in 0..5 {
            writer.file(&format!("file{size}"), 0o755, &b"abcde"[..size]).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn cpio_reads_what_we_write() {
        let dir = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .env("TZ", "UTC")
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio is needed for this test; run: sudo apt-get install cpio");
        cpio.stdin.take().unwrap().write_all(&archive()).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let list = String::from_utf8(output.stdout).unwrap();
        let line = |name: &str| list.lines().find(|line| line.ends_with(name)).unwrap().to_owned();
        assert!(line("dev").starts_with("drwxr-xr-x"));
        assert!(line("dev/console").starts_with("crw-------") && line("dev/console").contains("5,   1"), "{list}");
        for size in 0..5 {
            let line = line(&format!("file{size}"));
            assert!(line.starts_with("-rwxr-xr-x") && line.contains(&format!(" {size} Jan ")), "{line}");
        }
        assert_eq!(list.lines().count(), 7);
    }

    #[test]
    fn equal_input_makes_equal_bytes() {
        assert_eq!(archive(), archive());
    }
}
