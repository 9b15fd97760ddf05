//! Patching real processes: each maps the template's memory, is given its own payload, and the file stays as it was.
#![allow(clippy::unwrap_used)]

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write, stdin},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    ptr,
};

use identity::{
    AckKey, MailboxName,
    mailbox::{PAGE_SIZE, PAYLOAD_PER_PAGE, Page, arm, take},
};
use offshoot_memory::{
    Delta, DeltaError, ExpectedMailbox, Mailbox, PatchError, PlantedBy, ProcessMemory, find_mailboxes, write_delta,
};
use rustix::mm::{MapFlags, ProtFlags, mmap};

const PAGES: u64 = 64;
const SIZE: u64 = PAGES * PAGE_SIZE as u64;
const TEMPLATE: &str = "0123456789abcdef0123";
const IMAGE: &str = "OFFSHOOT_TEST_IMAGE";
/// What a machine says of a mailbox that nobody filled.
const ARMED: &str = "(armed)";
const SHARED: &str = "OFFSHOOT_TEST_SHARED";

/// A template's memory with two mailboxes, their pages out of order, and where they are.
fn template(path: &Path) -> (File, Vec<Mailbox>) {
    let file = File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut expected = Vec::new();
    for (name, first, capacity) in [("offshoot:identity", 9_u64, 10_000_usize), ("app:config", 30, 100)] {
        let name = MailboxName::parse(name).unwrap();
        let nonce = [u8::try_from(first).unwrap(); 16];
        let mut pages = vec![[0; PAGE_SIZE]; capacity.div_ceil(PAYLOAD_PER_PAGE)];
        arm(&mut pages, &name, b"", nonce, capacity, true).unwrap();
        for (index, page) in pages.iter().rev().enumerate() {
            file.write_all_at(page, (first + 2 * index as u64) * PAGE_SIZE as u64).unwrap();
        }
        expected.push(ExpectedMailbox { name, nonce, planted_by: PlantedBy::Agent });
    }
    let scan = find_mailboxes(&file, &expected).unwrap();
    assert_eq!(scan.mailboxes.len(), 2);
    (file, scan.mailboxes)
}

/// What a machine has for itself, as a file, and that machine's memory as `seen`.
fn capture(machine: &Machine, file: &File, seen: &mut Vec<u64>) -> (File, offshoot_memory::DeltaSize) {
    let dirty = offshoot_memory::touched_pages(machine.process.id(), file, SIZE).unwrap().copied;
    let out = tempfile::tempfile().unwrap();
    let memory = machine.memory(file).unwrap();
    let size = write_delta(&memory, SIZE, &dirty, file, TEMPLATE, &out, |offset, _| seen.push(offset)).unwrap();
    (out, size)
}

fn whole(machine: &Machine, file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    machine.memory(file).unwrap().read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn f7_what_a_machine_has_for_itself_makes_another_one_like_it_and_not_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("memory.img");
    let (file, _) = template(&image);
    let original = fs::read(&image).unwrap();
    let page = PAGE_SIZE as u64;
    let [source, child, grandchild, other] = std::array::from_fn(|_| Machine::start(&image, false));
    let memory = source.memory(&file).unwrap();
    memory.write(3 * page + 100, &vec![7; 2 * PAGE_SIZE]).unwrap();
    // A marker that becomes zeros; a page that is written and is as it was.
    memory.write(9 * page, &vec![0; PAGE_SIZE]).unwrap();
    memory.write(30 * page, &original[30 * PAGE_SIZE..31 * PAGE_SIZE]).unwrap();
    memory.write(SIZE - 1, &[1]).unwrap();
    let mut seen = Vec::new();
    let (delta, size) = capture(&source, &file, &mut seen);
    assert_eq!(seen, [3, 4, 5, 9, 30, 63].map(|index| index * page));
    assert_eq!((size.dirty, size.data, size.zeros), (6 * page, 4 * page, page));

    let take = |machine: &Machine, delta: File| {
        Delta::open(delta, SIZE, TEMPLATE).unwrap().apply(&machine.memory(&file).unwrap()).unwrap();
    };
    take(&child, delta.try_clone().unwrap());
    assert!(whole(&child, &file) == whole(&source, &file));
    // One that was restored has for itself what differs from the template: never a layer above a layer.
    child.memory(&file).unwrap().write(40 * page, &[9]).unwrap();
    let (second, size) = capture(&child, &file, &mut Vec::new());
    assert_eq!((size.data, size.zeros), (5 * page, page));
    take(&grandchild, second);
    assert!(whole(&grandchild, &file) == whole(&child, &file));
    assert!(whole(&source, &file) != whole(&child, &file));
    assert!(whole(&other, &file) == original);
    assert!(fs::read(&image).unwrap() == original, "the template was written");

    assert!(matches!(Delta::open(delta.try_clone().unwrap(), SIZE, "other"), Err(DeltaError::OtherTemplate)));
    assert!(matches!(Delta::open(delta.try_clone().unwrap(), SIZE - page, TEMPLATE), Err(DeltaError::Malformed(_))));
    delta.set_len(delta.metadata().unwrap().len() - 1).unwrap();
    assert!(matches!(Delta::open(delta, SIZE, TEMPLATE), Err(DeltaError::Malformed(_))));
    assert!(memory.write(SIZE - 1, &[1, 2]).is_err(), "nothing is written past the end");
}

/// A process that maps the image as a machine does.
struct Machine {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Machine {
    fn start(image: &Path, shared: bool) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "a_machine_maps_the_image", "--ignored", "--nocapture"]).env(IMAGE, image);
        if shared {
            command.env(SHARED, "1");
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut machine = Self { process, input, output };
        assert_eq!(machine.answer(), "mapped");
        machine
    }

    fn memory(&self, file: &File) -> Result<ProcessMemory, PatchError> {
        ProcessMemory::open(self.process.id(), file, SIZE)
    }

    /// What the machine itself finds in a mailbox.
    fn read(&mut self, mailbox: &Mailbox) -> String {
        let pages: Vec<String> = mailbox.pages.iter().map(u64::to_string).collect();
        writeln!(self.input, "{}", pages.join(" ")).unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        // The test runner of the child writes lines of its own.
        let mut lines = self.output.by_ref().lines();
        lines.find_map(|line| line.unwrap().split_once("machine: ").map(|(_, text)| text.to_owned())).unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The child: maps the image, and answers with what it reads in the pages it is asked for.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn a_machine_maps_the_image() {
    let Some(path) = env::var_os(IMAGE) else { return };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let sharing = if env::var_os(SHARED).is_some() { MapFlags::SHARED } else { MapFlags::PRIVATE };
    let size = usize::try_from(SIZE).unwrap();
    // SAFETY: a new mapping where the kernel likes; it is never unmapped.
    let memory = unsafe { mmap(ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, sharing, &file, 0) }.unwrap();
    println!("machine: mapped");
    for line in stdin().lines() {
        let page = |offset: &str| -> Box<Page> {
            let offset: usize = offset.parse().unwrap();
            assert!(offset + PAGE_SIZE <= size);
            // SAFETY: inside of the mapping; another process may write it, so it is copied by a volatile read.
            Box::new(unsafe { memory.cast::<u8>().add(offset).cast::<Page>().read_volatile() })
        };
        let pages: Vec<Box<Page>> = line.unwrap().split(' ').map(page).collect();
        let pages: Vec<&Page> = pages.iter().map(AsRef::as_ref).collect();
        match take(&pages) {
            Ok(Some((payload, _))) => println!("machine: {}", str::from_utf8(payload.expose()).unwrap()),
            Ok(None) => println!("machine: {ARMED}"),
            Err(error) => println!("machine: ({error})"),
        }
    }
}

/// One payload for each mailbox, with nothing of it shared by two machines.
fn payloads(machine: usize) -> [String; 2] {
    let letter = ["a", "b", "c", "d"][machine];
    // The second fills more than two pages, so that places out of order show.
    [format!("{machine}/config"), letter.repeat(9_000)]
}

fn fill(memory: &ProcessMemory, mailboxes: &[Mailbox], payloads: &[String; 2]) -> Result<(), PatchError> {
    let key = AckKey::new([9; 32]);
    let letters: Vec<_> =
        mailboxes.iter().zip(payloads).map(|(mailbox, text)| (mailbox, text.as_bytes(), &key)).collect();
    memory.fill(&letters)
}

#[test]
fn i2_every_process_gets_its_own_payloads_and_the_file_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory image.img");
    let (file, mailboxes) = template(&path);
    let before = fs::read(&path).unwrap();
    let mut machines: Vec<Machine> = (0..3).map(|_| Machine::start(&path, false)).collect();
    for (index, machine) in machines.iter().enumerate().take(2) {
        fill(&machine.memory(&file).unwrap(), &mailboxes, &payloads(index)).unwrap();
    }
    for (index, machine) in machines.iter_mut().enumerate().take(2) {
        for (mailbox, payload) in mailboxes.iter().zip(payloads(index)) {
            assert_eq!(machine.read(mailbox), payload);
        }
    }
    assert_eq!(machines[2].read(&mailboxes[0]), ARMED, "the third was given nothing");
    assert_eq!(Machine::start(&path, false).read(&mailboxes[1]), ARMED, "a later one starts clean");
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn i2_a_shared_mapping_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.img");
    let (file, mailboxes) = template(&path);
    let mut machine = Machine::start(&path, true);
    let error = machine.memory(&file).unwrap_err();
    assert!(matches!(error, PatchError::Mapping(reason) if reason.contains("shared")), "{error}");
    assert_eq!(machine.read(&mailboxes[0]), ARMED);
}

#[test]
fn a_file_of_the_same_name_is_not_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.img");
    let (_, mailboxes) = template(&path);
    let mut machine = Machine::start(&path, false);
    fs::remove_file(&path).unwrap();
    let (other, _) = template(&path);
    assert!(matches!(machine.memory(&other), Err(PatchError::Mapping(_))));
    assert_eq!(machine.read(&mailboxes[0]), ARMED);
}

#[test]
fn a_mapping_of_another_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.img");
    let (file, _) = template(&path);
    let machine = Machine::start(&path, false);
    for size in [SIZE - PAGE_SIZE as u64, SIZE + PAGE_SIZE as u64] {
        assert!(matches!(ProcessMemory::open(machine.process.id(), &file, size), Err(PatchError::Mapping(_))));
    }
}

#[test]
fn i3_one_wrong_marker_or_payload_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.img");
    let (file, mailboxes) = template(&path);
    let mut machine = Machine::start(&path, false);
    let memory = machine.memory(&file).unwrap();

    let changes: [fn(&mut Mailbox); 6] = [
        |mailbox| mailbox.nonce[0] ^= 1,
        |mailbox| mailbox.capacity += 1,
        |mailbox| mailbox.pages.swap(0, 1),
        |mailbox| mailbox.pages.truncate(2),
        |mailbox| mailbox.pages[2] = SIZE,
        |mailbox| mailbox.pages[2] = u64::MAX - 4095,
    ];
    for (index, change) in changes.into_iter().enumerate() {
        // The last mailbox is the wrong one: the first must be left alone all the same.
        let mut wrong = mailboxes.clone();
        change(&mut wrong[1]);
        let error = fill(&memory, &wrong, &payloads(0)).unwrap_err();
        assert!(matches!(error, PatchError::Marker { .. }), "change {index}: {error}");
        assert!(mailboxes.iter().all(|mailbox| machine.read(mailbox) == ARMED), "change {index}");
    }
    let too_long = [payloads(0)[0].clone(), "x".repeat(mailboxes[1].capacity + 1)];
    assert!(matches!(fill(&memory, &mailboxes, &too_long), Err(PatchError::Payload(_))));
    assert_eq!(machine.read(&mailboxes[0]), ARMED);

    fill(&memory, &mailboxes, &payloads(0)).unwrap();
    let again = fill(&memory, &mailboxes, &payloads(1)).unwrap_err();
    assert!(matches!(again, PatchError::Marker { reason, .. } if reason.contains("armed")));
    assert_eq!(machine.read(&mailboxes[1]), payloads(0)[1], "what was delivered stays");
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.img");
    let (file, mailboxes) = template(&path);
    let machine = Machine::start(&path, false);
    let memory = machine.memory(&file).unwrap();
    drop(machine);
    assert!(matches!(fill(&memory, &mailboxes, &payloads(0)), Err(PatchError::Open(_))));
}
