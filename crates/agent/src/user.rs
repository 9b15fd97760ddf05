//! Users of the workload: looked up in its own `/etc/passwd` and `/etc/group`, without any name service.

use std::{io, os::fd::OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid};

/// Whom a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    ids: Option<(u32, u32)>,
    groups: Vec<Gid>,
    home: Option<String>,
}

/// A file of users or groups that is larger is not read: the guest's images are not ours.
const MAX_FILE: usize = 1 << 20;

impl User {
    pub(crate) fn unchanged() -> Self {
        Self { ids: None, groups: Vec::new(), home: None }
    }

    /// Its home directory: what `HOME` is where nobody says something else.
    pub(crate) fn home(&self) -> Option<&str> {
        self.home.as_deref()
    }

    /// Becomes the user. System calls only: it runs between fork and exec, when this thread is the whole process.
    pub(crate) fn become_it(&self) -> io::Result<()> {
        let Some((uid, gid)) = self.ids else { return Ok(()) };
        rustix::thread::set_thread_groups(&self.groups)?;
        rustix::thread::set_thread_gid(Gid::from_raw(gid))?;
        rustix::thread::set_thread_uid(Uid::from_raw(uid))?;
        Ok(())
    }
}

/// The user called `name` (empty: root; also `uid` and `uid:gid`).
pub(crate) fn resolve(root: Option<&OwnedFd>, name: &str) -> Option<User> {
    let passwd = read(root, "etc/passwd");
    let group = read(root, "etc/group");
    find(&passwd, &group, name)
}

fn find(passwd: &str, group: &str, name: &str) -> Option<User> {
    let name = if name.is_empty() { "0:0" } else { name };
    if let Some((uid, gid)) = name.split_once(':') {
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        let home = entries(passwd).find(|entry| entry.uid == uid).and_then(|entry| entry.home);
        return Some(User { ids: Some((uid, gid)), groups: vec![Gid::from_raw(gid)], home: Some(home_of(uid, home)) });
    }
    let number: Option<u32> = name.parse().ok();
    let entry = entries(passwd).find(|entry| entry.user == name || Some(entry.uid) == number);
    match (entry, number) {
        (Some(Entry { user, uid, gid, home }), _) => {
            let member = |line: &str| {
                let mut fields = line.split(':');
                let (id, members) = (fields.nth(2)?, fields.next()?);
                members.split(',').any(|member| member == user).then(|| id.parse().ok())?
            };
            let mut groups = vec![Gid::from_raw(gid)];
            groups.extend(group.lines().filter_map(member).filter(|&id| id != gid).take(64).map(Gid::from_raw));
            Some(User { ids: Some((uid, gid)), groups, home: Some(home_of(uid, home)) })
        }
        (None, Some(uid)) => {
            Some(User { ids: Some((uid, uid)), groups: vec![Gid::from_raw(uid)], home: Some(home_of(uid, None)) })
        }
        (None, None) => None,
    }
}

/// A line of `/etc/passwd`, as far as it matters.
struct Entry<'a> {
    user: &'a str,
    uid: u32,
    gid: u32,
    home: Option<&'a str>,
}

/// The lines that are well formed.
fn entries(passwd: &str) -> impl Iterator<Item = Entry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (user, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let home = fields.nth(1).filter(|home| home.starts_with('/') && !home.contains('\0'));
        Some(Entry { user, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home })
    })
}

/// A user's home directory, also if nobody has written down one.
fn home_of(uid: u32, home: Option<&str>) -> String {
    home.unwrap_or(if uid == 0 { "/root" } else { "/" }).to_owned()
}

fn read(root: Option<&OwnedFd>, path: &str) -> String {
    let open = |root: &OwnedFd| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
        let mut bytes = vec![0; MAX_FILE];
        let mut len = 0;
        while len < MAX_FILE {
            match rustix::io::read(&fd, &mut bytes[len..]).ok()? {
                0 => break,
                read => len += read,
            }
        }
        Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
    };
    root.and_then(open).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:web\nlogs:x:40:a,web\nweb2:x:41:webber\n";

    fn ids(name: &str) -> Option<(u32, u32)> {
        find(PASSWD, GROUP, name)?.ids
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        assert_eq!(ids(""), Some((0, 0)));
        assert_eq!(ids("root"), Some((0, 0)));
        assert_eq!(ids("web"), Some((33, 34)));
        assert_eq!(ids("33"), Some((33, 34)));
        assert_eq!(ids("7"), Some((7, 7)));
        assert_eq!(ids("7:8"), Some((7, 8)));
        for unknown in ["nobody", "7:", ":7", "7:x", "web:34", "-1", "broken"] {
            assert_eq!(ids(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn a_user_has_his_home_and_an_unknown_one_the_root() {
        let home = |passwd, name| find(passwd, GROUP, name).and_then(|user| user.home);
        for (name, expected) in
            [("", "/root"), ("web", "/var/www"), ("33", "/var/www"), ("33:7", "/var/www"), ("7", "/"), ("7:8", "/")]
        {
            assert_eq!(home(PASSWD, name).as_deref(), Some(expected), "{name}");
        }
        assert_eq!(home("", "").as_deref(), Some("/root"));
        assert_eq!(home("web:x:33:34::relative:/bin/sh\n", "web").as_deref(), Some("/"));
    }

    #[test]
    fn a_user_gets_the_groups_he_is_a_member_of_and_no_others() {
        let groups: Vec<u32> = find(PASSWD, GROUP, "web").into_iter().flat_map(|u| u.groups).map(Gid::as_raw).collect();
        assert_eq!(groups, [34, 40]);
    }
}
