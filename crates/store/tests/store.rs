//! The store's promises, on real directories and processes.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use engine::{Accel, EngineInfo, EngineName, Machine};
use identity::Tag;
use offshoot_store::{Building, Contents, MEMORY, Manifest, Store, StoreError};

fn tag(text: &str) -> Tag {
    Tag::parse(text).unwrap()
}

fn contents() -> Contents {
    Contents {
        engine: EngineInfo { name: EngineName::Qemu, version: "7.2.22".into(), accel: Accel::Tcg },
        machine: Machine { memory_bytes: 8192, vcpus: 1, network: false },
        kernel: "6.1".into(),
        recipe: "busybox".into(),
        mailboxes: Vec::new(),
        ambiguous: Vec::new(),
        probes: BTreeMap::new(),
        allow_env: std::collections::BTreeSet::new(),
        devtools_port: None,
        facts: BTreeMap::new(),
        warnings: Vec::new(),
        findings: Vec::new(),
        findings_left_out: 0,
        frozen_monotonic_ns: 1,
        frozen_wall_ns: 2,
        rehearses: true,
        ack_limit_ms: 60_000,
        build_millis: 3,
        group: None,
        memory_writable: false,
    }
}

fn fill(building: &Building) {
    fs::write(building.memory_file(), [7; 8192]).unwrap();
    fs::write(building.state_file(), b"state").unwrap();
    fs::write(building.root_image(), b"root").unwrap();
}

fn make(store: &Store, text: &str) -> Manifest {
    let building = store.begin(&tag(text)).unwrap();
    fill(&building);
    building.commit(contents()).unwrap()
}

#[test]
fn f1_a_template_appears_whole_and_read_only() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let building = store.begin(&tag("a")).unwrap();
    fill(&building);
    assert!(store.list().unwrap().is_empty(), "not before it is committed");
    let made = building.commit(contents()).unwrap();
    make(&store, "b");
    let template = store.get(&tag("a")).unwrap();
    assert_eq!(template.manifest(), &made);
    let mode = fs::metadata(template.memory_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o400);
    let tags: Vec<_> = store.list().unwrap().into_iter().map(|found| found.unwrap().tag.to_string()).collect();
    assert_eq!(tags, ["a", "b"]);
    drop(template);
    assert!(matches!(store.begin(&tag("a")), Err(StoreError::Exists { .. })));
}

#[test]
fn o4_a_second_builder_is_told_who_holds_the_tag() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let building = store.begin(&tag("a")).unwrap();
    let error = store.begin(&tag("a")).unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    assert!(matches!(store.get(&tag("a")), Err(StoreError::Locked { .. })));
    // Another tag is free, and so is this one when the builder gives up.
    make(&store, "b");
    drop(building);
    make(&store, "a");
}

#[test]
fn a_template_in_use_is_not_removed() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    make(&store, "a");
    make(&store, "b");
    let using = store.get(&tag("a")).unwrap();
    assert!(matches!(store.remove(&tag("a")), Err(StoreError::Locked { .. })));
    drop(using);
    store.remove(&tag("a")).unwrap();
    assert!(matches!(store.get(&tag("a")), Err(StoreError::NotFound { .. })));
    assert!(store.get(&tag("b")).is_ok());
}

#[test]
fn who_only_looks_at_a_template_keeps_nobody_from_it() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let made = make(&store, "a");
    let building = store.begin(&tag("b")).unwrap();
    // Neither waits for a lock nor takes one.
    assert_eq!(store.manifest(&tag("a")).unwrap(), made);
    assert!(matches!(store.manifest(&tag("b")), Err(StoreError::NotFound { .. })));
    drop(building);
    store.remove(&tag("a")).unwrap();
    assert!(matches!(store.manifest(&tag("a")), Err(StoreError::NotFound { .. })));
    make(&store, "c");
    fs::write(data.path().join("templates/c/manifest.json"), b"{").unwrap();
    assert!(matches!(store.manifest(&tag("c")), Err(StoreError::Broken { .. })));
}

#[test]
fn t2_the_umask_keeps_no_fork_s_process_from_its_template() {
    // A umask is the whole process', so this test has one of its own.
    const INSIDE: &str = "OFFSHOOT_TEST_UMASK";
    let Some(data) = std::env::var_os(INSIDE) else {
        let data = tempfile::tempdir().unwrap();
        let mut again = Command::new("sh");
        again.args(["-c", "umask 077; exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
        again.args(["--exact", "t2_the_umask_keeps_no_fork_s_process_from_its_template"]).env(INSIDE, data.path());
        let output = again.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    };
    let data = Path::new(&data);
    let mode = |path: &str| fs::metadata(data.join(path)).unwrap().permissions().mode() & 0o777;
    let store = Store::open(data).unwrap();
    make(&store, "a");
    assert_eq!((mode("templates"), mode("templates/a"), mode("locks")), (0o711, 0o711, 0o700));
    // What an older one left behind is mended.
    fs::set_permissions(data.join("templates"), fs::Permissions::from_mode(0o700)).unwrap();
    let _ = Store::open(data).unwrap();
    assert_eq!(mode("templates"), 0o711);
}

#[test]
fn a_builder_that_gives_up_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let building = store.begin(&tag("a")).unwrap();
    fs::write(building.memory_file(), b"x").unwrap();
    // Two of three files are missing: the commit fails, and the directory goes.
    assert!(matches!(building.commit(contents()), Err(StoreError::File { .. })));
    assert_eq!(fs::read_dir(data.path().join("templates")).unwrap().count(), 0);
}

#[test]
fn t3_a_manifest_that_claims_another_tag_or_size_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    make(&store, "a");
    make(&store, "b");
    let templates = data.path().join("templates");
    fs::rename(templates.join("a"), templates.join("c")).unwrap();
    assert!(matches!(store.get(&tag("c")), Err(StoreError::Broken { .. })));
    let memory = templates.join("b").join(MEMORY);
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&memory, b"short").unwrap();
    assert!(matches!(store.get(&tag("b")), Err(StoreError::Broken { .. })));
    assert_eq!(store.list().unwrap().iter().filter(|found| found.is_err()).count(), 2);
}

#[test]
fn o3_only_what_a_dead_maker_left_is_a_leftover() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    make(&store, "kept");
    let templates = data.path().join("templates");
    let alive = store.begin(&tag("alive")).unwrap();
    let left = |name: &str, maker: &str| {
        let dir = templates.join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("maker.json"), maker).unwrap();
        dir
    };
    let dead = left(".building-0123456789abcdef0123", &maker_that_ended());
    // Near misses that are not ours.
    left(".building-0123", &maker_that_ended());
    left(".building-0123456789abcdef0123x", &maker_that_ended());
    left("building-0123456789abcdef0123", &maker_that_ended());
    // One whose maker can not be found out: he may live. It is old enough that nobody would still be writing his name.
    let unclear = templates.join(".building-fedcba98765432100123");
    fs::create_dir(&unclear).unwrap();
    std::os::unix::fs::symlink("maker.json", unclear.join("maker.json")).unwrap();
    fs::File::open(&unclear).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(store.leftovers().unwrap(), [dead]);
    drop(alive);
}

/// What a process that is gone would have written.
fn maker_that_ended() -> String {
    let mut child = Command::new("sleep").arg("100").stdout(Stdio::null()).spawn().unwrap();
    let process = engine::ProcessRef::of(child.id()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    serde_json::to_string(&process).unwrap()
}

#[test]
fn t3_no_file_appears_for_a_bad_tag() {
    for bad in ["", "../x", "/etc/x", ".", "..", "a/b", &"a".repeat(65)] {
        assert!(Tag::parse(bad).is_err(), "{bad}");
    }
    assert!(!Path::new("x").exists());
}
