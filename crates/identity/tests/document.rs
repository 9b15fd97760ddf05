//! The identity document: its rules, and that neither its errors nor its `Debug` repeat a secret.
#![allow(clippy::unwrap_used)]

use offshoot_identity::{
    AckKey, Action, ClockNanos, Document, DocumentError, EnvName, File, ForkId, ForkIdentity, ForkName, Limits, Secret,
    SecretName, Tag,
    document::{ENTROPY_LEN, FORMAT, MAX_ENTRIES, MAX_LABEL, is_guest_path},
};
use proptest::prelude::*;

fn document() -> Document {
    Document {
        format: FORMAT,
        action: Action::Become,
        fork: ForkIdentity {
            id: ForkId::parse("0123456789abcdef0123").unwrap(),
            name: ForkName::parse("worker-7").unwrap(),
            hostname: ForkName::parse("worker-7").unwrap(),
            template: Tag::parse("python").unwrap(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            boot_id: "01234567-89ab-4cde-8f01-23456789abcd".into(),
        },
        labels: [("team".to_owned(), "blue".to_owned())].into(),
        env: [(EnvName::parse("API_URL").unwrap(), "http://x".to_owned())].into(),
        secrets: [(SecretName::parse("API_KEY").unwrap(), Secret::new(b"hunter2".to_vec()))].into(),
        files: vec![File { path: "/etc/app.conf".into(), mode: 0o600, content: Secret::new(b"swordfish".to_vec()) }],
        wall_clock: ClockNanos(u64::MAX),
        entropy: Secret::new(vec![3; ENTROPY_LEN]),
        ack_key: AckKey::new([4; 32]),
        limits: Limits { pids: Some(100), memory: None, cpu_millis: Some(500) },
        network: None,
    }
}

fn refused(change: impl FnOnce(&mut Document)) -> DocumentError {
    let mut document = document();
    change(&mut document);
    let error = Document::from_json(document.to_json().expose()).unwrap_err();
    // The bytes are read under the same rules; too many entries end the reading.
    match Document::from_bytes(document.to_bytes().expose()).unwrap_err() {
        DocumentError::MalformedBytes { .. } => assert!(document.labels.len() > MAX_ENTRIES),
        other => assert_eq!(other, error),
    }
    error
}

#[test]
fn a_document_reads_back_as_it_was_written() {
    let before = document();
    let after = Document::from_json(before.to_json().expose()).unwrap();
    assert_eq!(after.to_json(), before.to_json());
    assert_eq!(after.wall_clock, ClockNanos(u64::MAX), "no digit of a large number is lost");
    assert_eq!(after.secrets, before.secrets);
    let after = Document::from_bytes(before.to_bytes().expose()).unwrap();
    assert_eq!(after.to_json(), before.to_json());
    let source = Document { action: Action::Continue, limits: Limits::default(), ..before };
    let after = Document::from_bytes(source.to_bytes().expose()).unwrap();
    assert_eq!(after.to_json(), source.to_json());
}

#[test]
fn i15_a_rehearsal_has_nothing_that_a_caller_gave() {
    let bare = Document {
        action: Action::Rehearse,
        labels: [].into(),
        env: [].into(),
        secrets: [].into(),
        files: Vec::new(),
        limits: Limits::default(),
        ..document()
    };
    let after = Document::from_bytes(bare.to_bytes().expose()).unwrap();
    assert_eq!(after.action, Action::Rehearse);
    assert_eq!(after.to_json(), bare.to_json());
    let given: [fn(&mut Document, Document); 5] = [
        |rehearsal, given| rehearsal.labels = given.labels,
        |rehearsal, given| rehearsal.env = given.env,
        |rehearsal, given| rehearsal.secrets = given.secrets,
        |rehearsal, given| rehearsal.files = given.files,
        |rehearsal, given| rehearsal.limits = given.limits,
    ];
    for give in given {
        let mut rehearsal = bare.clone();
        give(&mut rehearsal, document());
        let refused = Document::from_bytes(rehearsal.to_bytes().expose()).unwrap_err();
        assert!(matches!(refused, DocumentError::Field { field: "action", .. }), "{refused}");
    }
}

#[test]
fn bytes_have_one_form() {
    let bytes = document().to_bytes().expose().to_vec();
    let at = |text: &[u8]| bytes.windows(text.len()).position(|window| window == text).unwrap();
    let mut longer = bytes.clone();
    longer.push(0);
    let mut unknown_action = bytes.clone();
    unknown_action[8] = 4;
    let mut half_a_limit = bytes.clone();
    half_a_limit[20] = 2;
    let mut not_text = bytes.clone();
    not_text[at(b"http://x")] = 0xff;
    let mut bad_name = bytes.clone();
    bad_name[at(b"API_URL")] = b'=';
    let mut endless = bytes.clone();
    endless[at(b"worker-7") - 4..][..4].copy_from_slice(&[0xff; 4]);
    for bad in [longer, unknown_action, half_a_limit, not_text, bad_name, endless, Vec::new()] {
        assert!(matches!(Document::from_bytes(&bad), Err(DocumentError::MalformedBytes { .. })));
    }
    // Two labels, the second before the first, and the same twice.
    for second in [b'y', b'z'] {
        let mut two = document();
        two.labels = [("y".to_owned(), String::new()), ("z".to_owned(), String::new())].into();
        let mut bytes = two.to_bytes().expose().to_vec();
        assert!(Document::from_bytes(&bytes).is_ok());
        let first = bytes.windows(9).position(|window| window == b"\x01\0\0\0y\0\0\0\0").unwrap();
        bytes[first + 4] = b'z';
        bytes[first + 13] = second;
        assert!(matches!(Document::from_bytes(&bytes), Err(DocumentError::MalformedBytes { .. })));
    }
}

#[test]
fn what_breaks_a_rule_is_refused() {
    assert_eq!(refused(|document| document.format = 3), DocumentError::Format(3));
    let changes: [fn(&mut Document); 11] = [
        |document| document.fork.machine_id = "0123456789ABCDEF0123456789ABCDEF".into(),
        |document| document.fork.machine_id.push('0'),
        |document| document.fork.boot_id = "0123456789ab4cde8f0123456789abcd0000".into(),
        |document| document.entropy = Secret::new(vec![3; ENTROPY_LEN - 1]),
        |document| document.labels = (0..=MAX_ENTRIES).map(|index| (index.to_string(), String::new())).collect(),
        |document| drop(document.labels.insert("a=b".into(), String::new())),
        |document| drop(document.labels.insert(String::new(), String::new())),
        |document| drop(document.labels.insert("a".into(), "x".repeat(MAX_LABEL + 1))),
        |document| document.env.values_mut().for_each(|value| value.push('\0')),
        |document| document.files[0].path = "/etc/../x".into(),
        |document| document.files[0].mode = 0o10000,
    ];
    for change in changes {
        assert!(matches!(refused(change), DocumentError::Field { .. }));
    }
}

#[test]
fn unknown_and_doubled_fields_are_refused() {
    let json = String::from_utf8(document().to_json().expose().to_vec()).unwrap();
    for (from, to) in [
        ("{\"format\":1", "{\"format\":1,\"extra\":1"),
        ("{\"format\":1", "{\"format\":1,\"format\":1"),
        ("\"action\":\"become\"", "\"action\":\"overwrite\""),
        ("\"worker-7\"", "\"Worker_7\""),
    ] {
        assert!(json.contains(from), "{from}");
        let error = Document::from_json(json.replacen(from, to, 1).as_bytes()).unwrap_err();
        assert!(matches!(error, DocumentError::Malformed { .. }), "{to}");
    }
}

#[test]
fn neither_debug_nor_an_error_repeats_a_secret() {
    let shown = format!("{:?}", document());
    for secret in ["hunter2", "swordfish", "[3, 3", "[4, 4"] {
        assert!(!shown.contains(secret), "{secret}");
    }
    // A secret where a number belongs, and one that is not base64.
    for bad in ["{\"format\":\"hunter2\"}", "{\"format\":1,\"entropy\":\"hunter2!\"}"] {
        assert!(!Document::from_json(bad.as_bytes()).unwrap_err().to_string().contains("hunter2"));
    }
}

#[test]
fn guest_paths_are_absolute_and_go_nowhere_else() {
    for good in ["/a", "/etc/app.conf", "/a/...", "/a/..b"] {
        assert!(is_guest_path(good), "{good}");
    }
    for bad in ["", "a", "/", "/a/", "/..", "/../a", "/a/..", "/a/../b", "/a\0"] {
        assert!(!is_guest_path(bad), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Document::from_json(&bytes).is_err());
        prop_assert!(Document::from_bytes(&bytes).is_err());
    }

    #[test]
    fn bytes_changed_anywhere_are_refused_or_have_their_one_form(
        at in any::<prop::sample::Index>(), change in prop::collection::vec(any::<u8>(), 1..6),
    ) {
        let mut bytes = document().to_bytes().expose().to_vec();
        let at = at.index(bytes.len());
        let end = bytes.len().min(at + change.len());
        bytes[at..end].copy_from_slice(&change[..end - at]);
        if let Ok(read) = Document::from_bytes(&bytes) {
            let again = read.to_bytes();
            prop_assert_eq!(again.expose(), &bytes[..]);
        }
    }

    #[test]
    fn a_document_cut_anywhere_is_refused(at in any::<prop::sample::Index>()) {
        let json = document().to_json();
        let json = json.expose();
        prop_assert!(Document::from_json(&json[..at.index(json.len())]).is_err());
        let bytes = document().to_bytes();
        let bytes = bytes.expose();
        prop_assert!(Document::from_bytes(&bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn any_content_survives(content in prop::collection::vec(any::<u8>(), 0..500), value in "[^\\x00]{0,50}") {
        let mut document = document();
        document.files[0].content = Secret::new(content);
        document.env.insert(EnvName::parse("X").unwrap(), value);
        for after in [
            Document::from_json(document.to_json().expose()).unwrap(),
            Document::from_bytes(document.to_bytes().expose()).unwrap(),
        ] {
            prop_assert_eq!(&after.files, &document.files);
            prop_assert_eq!(&after.env, &document.env);
        }
    }
}
