//! What stands in `/run/offshoot`: one raw value a file, without a newline at its end.

use std::{collections::BTreeMap, io, os::fd::OwnedFd};

use identity::{Document, EnvName, ForkIdentity};
use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::root::{Root, fill, reserve};
use crate::{payload::Payload, service::push_object, state::Identity};

/// One file of the identity directory.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path in the directory.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Content; wiped on drop, because it may be a secret.
    pub content: Zeroizing<Vec<u8>>,
}

/// The files that every identity has.
pub(super) const EVERY: [&str; 8] =
    ["id", "name", "hostname", "template", "machine-id", "boot-id", "labels.json", "identity.json"];

/// `identity.json`: everything but secrets, for programs that would rather read one file.
fn identity_json(fork: &ForkIdentity, labels: &str, env: &BTreeMap<EnvName, String>, payload: &Payload) -> String {
    let mut json = String::with_capacity(1024);
    let members = [
        ("id", fork.id.as_str()),
        ("name", fork.name.as_str()),
        ("hostname", fork.hostname.as_str()),
        ("template", fork.template.as_str()),
        ("machine_id", &fork.machine_id),
        ("boot_id", &fork.boot_id),
    ];
    push_object(&mut json, members.into_iter());
    json.pop();
    json.push_str(",\"labels\":");
    json.push_str(labels);
    json.push_str(",\"env\":");
    push_object(&mut json, env.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    if !payload.is_empty() {
        json.push_str(",\"fields\":");
        push_object(&mut json, payload.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    }
    json.push('}');
    json
}

/// The files that a document makes, with the payload that came with it.
#[must_use]
pub fn plan(document: &Document, payload: &Payload) -> Vec<Entry> {
    let fork = &document.fork;
    let entry = |path: String, mode, content: &[u8]| Entry { path, mode, content: Zeroizing::new(content.to_vec()) };
    let public = |name: &str, value: &str| entry(name.to_owned(), 0o444, value.as_bytes());
    let mut labels = String::new();
    push_object(&mut labels, document.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let mut entries = vec![
        public("id", fork.id.as_str()),
        public("name", fork.name.as_str()),
        public("hostname", fork.hostname.as_str()),
        public("template", fork.template.as_str()),
        public("machine-id", &fork.machine_id),
        public("boot-id", &fork.boot_id),
        public("labels.json", &labels),
    ];
    let env = document.env.iter().map(|(name, value)| public(&["env/", name.as_str()].concat(), value));
    entries.extend(env);
    let secrets =
        document.secrets.iter().map(|(name, value)| entry(["secrets/", name.as_str()].concat(), 0o400, value.expose()));
    entries.extend(secrets);
    entries.push(public("identity.json", &identity_json(fork, &labels, &document.env, payload)));
    entries
}

/// The identity directory as the agent sees it, with its folders open.
#[derive(Debug)]
pub struct Directory {
    top: Root,
    env: Root,
    secrets: Root,
}

impl Directory {
    /// The directory at `path`, which has its folders.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(path: &str) -> io::Result<Self> {
        let open = |path: String| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map(Root::new)
        };
        Ok(Self {
            top: open(path.to_owned())?,
            env: open(format!("{path}/env"))?,
            secrets: open(format!("{path}/secrets"))?,
        })
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.top.read(path)
    }

    /// Writes over one of its files, in place: its memory does not keep what was there. As long as what was there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn overwrite(&self, path: &str, content: &[u8]) -> io::Result<()> {
        self.top.overwrite(path, content)
    }

    /// Makes the files that every identity has, empty, for [`Self::write`] to fill.
    pub fn blanks(&self) -> Vec<(String, OwnedFd)> {
        let make = |name: &str| {
            let file = self.top.create(name, 0o444, b"").ok()?;
            reserve(&file);
            Some((name.to_owned(), file))
        };
        EVERY.into_iter().filter_map(make).collect()
    }

    /// Removes them again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_blanks(&self, blanks: &[(String, OwnedFd)]) -> io::Result<()> {
        blanks.iter().try_for_each(|(name, _)| self.top.wipe(name))
    }

    /// Writes the files, those of `blanks` into the open ones; removes (secrets: wipes) those of `before`, an earlier identity, that are not among them.
    /// Answers with what is there now.
    ///
    /// # Errors
    /// The file that could not be written or removed.
    pub fn write(&self, before: &[String], entries: &[Entry], blanks: &[(String, OwnedFd)]) -> io::Result<Vec<String>> {
        // Secrets are wiped even where a new one takes the name: its memory would keep the old one.
        let stays = |path: &String| !path.starts_with("secrets/") && entries.iter().any(|entry| entry.path == *path);
        for stale in before.iter().filter(|path| !stays(path)) {
            self.top.wipe(stale)?;
        }
        for entry in entries {
            if let Some((_, file)) = blanks.iter().find(|(path, _)| *path == entry.path) {
                fill(file, &entry.content).map_err(|error| named(&entry.path, &error))?;
                continue;
            }
            let (folder, name) = match entry.path.split_once('/') {
                Some(("env", name)) => (&self.env, name),
                Some((_, name)) => (&self.secrets, name),
                None => (&self.top, entry.path.as_str()),
            };
            // A file that has readers keeps their content: it is replaced, not changed.
            let replace = before.contains(&entry.path) && stays(&entry.path);
            let result = match replace {
                true => folder.write(name, entry.mode, &entry.content),
                false => folder.create(name, entry.mode, &entry.content).map(drop),
            };
            result.map_err(|error| named(&entry.path, &error))?;
        }
        Ok(entries.iter().map(|entry| entry.path.clone()).collect())
    }
}

impl Directory {
    /// Writes what an identity's payload adds. Answers with the files of it that there were not before.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn complete(&self, identity: &Identity, payload: &Payload, before: &[String]) -> io::Result<Vec<String>> {
        let mut new = Vec::new();
        for (name, value) in &identity.env {
            let path = ["env/", name.as_str()].concat();
            if !before.contains(&path) {
                self.env.write(name.as_str(), 0o444, value.as_bytes()).map_err(|error| named(&path, &error))?;
                new.push(path);
            }
        }
        let mut labels = String::new();
        push_object(&mut labels, identity.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let json = identity_json(&identity.fork, &labels, &identity.env, payload);
        self.top.write("identity.json", 0o444, json.as_bytes()).map_err(|error| named("identity.json", &error))?;
        Ok(new)
    }
}

fn named(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn document(name: &str) -> Document {
        let text = serde_json::json!({
            "format": 1, "action": "become",
            "fork": {"id": "0123456789abcdef0123", "name": name, "hostname": name, "template": "python",
                     "machine_id": "0".repeat(32), "boot_id": "00000000-0000-4000-8000-000000000000"},
            "labels": {"team": "a"}, "env": {"API_URL": "http://x", "EMPTY": ""},
            "secrets": {"KEY": "aHVudGVyMg=="},
            "wall_clock": "1700000000000000000",
            "entropy": format!("{}==", "A".repeat(86)), "ack_key": format!("{}=", "A".repeat(43)),
        });
        Document::from_json(text.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn i12_values_are_raw_and_have_no_newline() {
        let entries = plan(&document("worker-7"), &Payload::new());
        let content = |path: &str| entries.iter().find(|e| e.path == path).map(|e| (&e.content[..], e.mode));
        assert_eq!(content("id"), Some((&b"0123456789abcdef0123"[..], 0o444)));
        assert_eq!(content("hostname"), Some((&b"worker-7"[..], 0o444)));
        assert_eq!(content("env/API_URL"), Some((&b"http://x"[..], 0o444)));
        assert_eq!(content("env/EMPTY"), Some((&b""[..], 0o444)));
        assert_eq!(content("labels.json"), Some((&br#"{"team":"a"}"#[..], 0o444)));
        assert_eq!(entries.last().unwrap().path, "identity.json");
    }

    #[test]
    fn i15_a_secret_is_in_its_own_file_and_nowhere_else() {
        let entries = plan(&document("a"), &Payload::new());
        let with: Vec<_> = entries.iter().filter(|e| e.content.windows(7).any(|w| w == b"hunter2")).collect();
        assert_eq!(with.iter().map(|e| (e.path.as_str(), e.mode)).collect::<Vec<_>>(), [("secrets/KEY", 0o400)]);
    }

    #[test]
    fn i13_a_second_identity_leaves_nothing_of_the_first() {
        let path = std::env::temp_dir().join(format!("offshoot-identity-{}", std::process::id()));
        for folder in ["env", "secrets"] {
            std::fs::create_dir_all(path.join(folder)).unwrap();
        }
        let directory = Directory::open(path.to_str().unwrap()).unwrap();
        let first = directory.write(&[], &plan(&document("a"), &Payload::new()), &directory.blanks()).unwrap();
        let mut second = document("b");
        second.env.clear();
        second.secrets.clear();
        directory.write(&first, &plan(&second, &Payload::new()), &[]).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("name")).unwrap(), "b");
        assert!(!path.join("env/API_URL").exists());
        assert!(!path.join("secrets/KEY").exists());
        std::fs::remove_dir_all(path).unwrap();
    }
}
