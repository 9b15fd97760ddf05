//! The network card: what leaves a fork leaves it in its own name, and nothing ever in its template's.
//!
//! The engines are used directly, with a test at the other end of each cable.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::Ipv4Addr,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use engine::{
    Accel, AckStream, Confinement, Engine, Letter, Machine, NetworkEnd, RestoreSpec, RunningVm, kvm::KvmEngine,
    qemu::QemuEngine,
};
use identity::{
    Ack, AckKey, Action, ClockNanos, Document, ForkId, ForkIdentity, ForkName, Inet, Limits, MacAddress, MailboxName,
    Network, Secret, Stage, Tag,
    document::{ENTROPY_LEN, format_for},
};
use memchr::memmem;
use memory::Mailbox;
use offshoot_tests::{Bench, Kind, Template, programs};
use tempfile::TempDir;

/// How long something may take that must happen, in the rig too.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to listen for what must not come. QEMU announces a card five times in the first second after a load, unless told not to.
const SILENCE: Duration = Duration::from_millis(1500);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Of every template's card.
const TEMPLATE_MAC: [u8; 6] = [0x02, 0x6f, 0x66, 0x66, 0x73, 0x68];
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];

fn engine(template: &Template) -> Box<dyn Engine> {
    let engine = &template.manifest["engine"];
    match (engine["name"].as_str(), engine["accel"].as_str()) {
        (Some("kvm"), _) => Box::new(KvmEngine::with_worker(programs::beside("offshoot-vmm")).unwrap()),
        (_, Some("kvm")) => Box::new(QemuEngine::find(Accel::Kvm).unwrap()),
        _ => Box::new(QemuEngine::find(Accel::Tcg).unwrap()),
    }
}

/// Who a fork is.
#[derive(Clone, Copy)]
struct Who(u8);

impl Who {
    fn id(self) -> ForkId {
        ForkId::parse(&format!("{:020x}", self.0)).unwrap()
    }

    fn mac(self) -> [u8; 6] {
        [0x02, 0x6f, 0, 0, 0, self.0]
    }

    fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.0)
    }

    fn key(self) -> AckKey {
        AckKey::new([self.0; 32])
    }

    fn document(self, template: &Template, connected: bool) -> Document {
        let network = connected.then(|| Network {
            mac: MacAddress::new(self.mac()).unwrap(),
            mtu: 1500,
            ipv4: Some(Inet { address: self.address(), prefix: 32, gateway: Some(GATEWAY) }),
            ipv6: None,
            gateway_mac: Some(MacAddress::new(GATEWAY_MAC).unwrap()),
            dns: Vec::new(),
            search: Vec::new(),
            ack: None,
        });
        let name = ForkName::parse(&format!("fork-{}", self.0)).unwrap();
        Document {
            format: format_for(network.as_ref()),
            action: Action::Become,
            fork: ForkIdentity {
                id: self.id(),
                name: name.clone(),
                hostname: name,
                template: Tag::parse(&template.tag).unwrap(),
                machine_id: format!("{:032x}", self.0),
                boot_id: format!("01234567-89ab-4cde-8f01-{:012x}", self.0),
            },
            labels: [].into(),
            env: [].into(),
            secrets: [].into(),
            files: Vec::new(),
            wall_clock: ClockNanos(1_700_000_000_000_000_000),
            entropy: Secret::new(vec![self.0; ENTROPY_LEN]),
            ack_key: self.key(),
            limits: Limits { pids: None, memory: None, cpu_millis: None },
            network,
        }
    }
}

/// A fork that has acknowledged, and its machine's directory.
struct Running(Option<RunningVm>, #[allow(dead_code)] TempDir);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(vm) = self.0.take() {
            let _ = vm.destroy();
        }
    }
}

/// Forks, with the card connected to this or to nothing; `ahead` makes a spare first. `before_it_runs` is called when the machine is loaded.
fn fork(
    template: &Template,
    who: Who,
    cable: Option<UnixStream>,
    ahead: bool,
    before_it_runs: impl FnOnce(),
) -> Running {
    let engine = engine(template);
    let dir = tempfile::tempdir().unwrap();
    let machine: Machine = serde_json::from_value(template.manifest["machine"].clone()).unwrap();
    let file = |name: &str| template.dir().join(name);
    let spec = RestoreSpec {
        dir: dir.path(),
        machine,
        root_image: &file("root.img"),
        memory_file: &template.memory_file(),
        state_file: &file("state.bin"),
        delta: None,
        pages_file: None,
        network: cable.as_ref().map(|cable| NetworkEnd::Stream(cable.as_fd())),
        confinement: Confinement { user: None, namespaces: true, cgroups: &[] },
    };
    let paused = if ahead {
        let spare = engine.prepare(&spec).unwrap_or_else(|error| panic!("{error:?}"));
        let process = spare.process().clone();
        spare.release();
        engine.adopt(&spec, &process).unwrap()
    } else {
        engine.restore(&spec).unwrap_or_else(|error| panic!("{error:?}"))
    };
    // Its process has its own.
    let connected = cable.is_some();
    drop(cable);
    before_it_runs();
    let name = MailboxName::identity();
    let mailbox: Mailbox = serde_json::from_value(template.mailbox(name.as_str()).clone()).unwrap();
    let ack_key = who.key().for_mailbox(&name);
    let payload = who.document(template, connected).to_bytes();
    let letter = Letter { mailbox: &mailbox, payload, ack_key: ack_key.clone() };
    let running = paused.deliver(letter, Vec::new()).unwrap().resume().unwrap();
    let running = Running(Some(running), dir);
    acknowledged(&running.0.as_ref().unwrap().ack_stream, &ack_key, running.1.path());
    running
}

fn acknowledged(stream: &AckStream, key: &AckKey, dir: &Path) {
    let deadline = Instant::now() + PATIENCE;
    let (mut line, mut byte) = (Vec::new(), [0]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let count = stream.read(&mut byte, left).unwrap_or_default();
        assert_eq!(count, 1, "no ack; its log: {:?}", fs::read_to_string(dir.join(engine::LOG)));
        if byte != *b"\n" {
            line.push(byte[0]);
            continue;
        }
        if let Ok(ack) = Ack::parse(&line, |_| Some(key.clone())) {
            assert_eq!((ack.stage, ack.reason), (Stage::Applied, None));
            return;
        }
        line.clear();
    }
}

/// The other end of a card's cable.
struct Wire(UnixStream);

impl Wire {
    /// With the card's end.
    fn new() -> (Self, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        (Self(here), there)
    }

    /// The next frame, or none within `limit`.
    fn next(&mut self, limit: Duration) -> Option<Vec<u8>> {
        self.0.set_read_timeout(Some(limit)).unwrap();
        let mut length = [0; 4];
        match self.0.read_exact(&mut length) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            read => read.unwrap(),
        }
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frame = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap()];
        self.0.read_exact(&mut frame).unwrap();
        Some(frame)
    }

    fn send(&mut self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.0.write_all(&[&length, frame].concat()).unwrap();
    }

    /// The next frame, which must come, and must be this fork's own.
    fn next_of(&mut self, who: Who) -> Vec<u8> {
        let frame = self.next(PATIENCE).expect("a frame");
        self.is_of(who, &frame);
        frame
    }

    fn is_of(&self, who: Who, frame: &[u8]) {
        assert_eq!(frame[6..12], who.mac(), "{frame:02x?}");
        assert!(memmem::find(frame, &TEMPLATE_MAC).is_none(), "{frame:02x?}");
    }

    fn expect_nothing_of_the_template(&mut self, who: Who) {
        let deadline = Instant::now() + SILENCE;
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if let Some(frame) = self.next(left) {
                self.is_of(who, &frame);
            }
        }
    }
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// An echo request from the gateway, with this many bytes to be sent back.
fn echo_request(who: Who, bytes: u16) -> Vec<u8> {
    let mut message = [&[8, 0, 0, 0, 0, 7, 0, 1], vec![0x5a; bytes.into()].as_slice()].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    let length = (20 + 8 + bytes).to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, 1, 0, 0];
    header.extend(GATEWAY.octets());
    header.extend(who.address().octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    [&who.mac()[..], &GATEWAY_MAC, &IPV4, &header, &message].concat()
}

#[test]
fn n3_forks_speak_with_their_own_address_and_nobody_speaks_for_the_template() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    assert_eq!(template.manifest["machine"]["network"], true);
    let mut forks = Vec::new();
    for (who, ahead) in [(Who(2), false), (Who(3), true)] {
        let (mut wire, cable) = Wire::new();
        let running = fork(&template, who, Some(cable), ahead, || {
            assert_eq!(wire.next(SILENCE), None, "nothing leaves a machine that does not run");
        });
        forks.push((who, wire, running));
    }
    for (who, wire, _running) in &mut forks {
        let announcement = wire.next_of(*who);
        assert_eq!((&announcement[12..14], &announcement[28..32]), (&ARP[..], &who.address().octets()[..]));
        // Both ways, with the longest packets there are.
        for bytes in [56, 1472] {
            let request = echo_request(*who, bytes);
            wire.send(&request);
            let reply = loop {
                let frame = wire.next_of(*who);
                if frame[12..14] == IPV4 && frame[34] == 0 {
                    break frame;
                }
            };
            assert_eq!((&reply[..6], &reply[26..30]), (&GATEWAY_MAC[..], &who.address().octets()[..]));
            assert_eq!(reply[38..], request[38..]);
        }
    }
    for (who, wire, _running) in &mut forks {
        wire.expect_nothing_of_the_template(*who);
    }
}

#[test]
fn n3_a_card_connected_to_nothing_is_no_obstacle_and_one_that_is_missing_is_an_error() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    drop(fork(&template, Who(4), None, false, || ()));
    // As if it had been built without.
    let (_wire, cable) = Wire::new();
    let dir = tempfile::tempdir().unwrap();
    let refused = engine(&template).restore(&RestoreSpec {
        dir: dir.path(),
        machine: Machine { network: false, ..serde_json::from_value(template.manifest["machine"].clone()).unwrap() },
        root_image: &template.dir().join("root.img"),
        memory_file: &template.memory_file(),
        state_file: &template.dir().join("state.bin"),
        delta: None,
        pages_file: None,
        network: Some(NetworkEnd::Stream(cable.as_fd())),
        confinement: Confinement::default(),
    });
    assert!(refused.unwrap_err().to_string().contains("without one"));
}
