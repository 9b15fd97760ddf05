//! Where offshoot keeps things.

use std::{
    env, fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use net::{Pool, PoolTextError};
use thiserror::Error;

/// The directories of one user (or of the whole system, for root).
#[derive(Debug, Clone)]
pub struct Home {
    /// Templates.
    pub data: PathBuf,
    /// Forks: what runs, and who holds which name.
    pub state: PathBuf,
    /// What can be made again: kernels, root images.
    pub cache: PathBuf,
    /// What is known of forks' networks: who holds which address. It belongs to the host's network namespace, not to one user's home.
    pub network: PathBuf,
    /// Where forks' addresses are from.
    pub pool: Pool,
}

/// Why there is no home.
#[derive(Debug, Error)]
pub enum HomeError {
    /// Neither HOME nor the directories themselves are set.
    #[error("HOME is not set; set it, or OFFSHOOT_DATA_DIR, OFFSHOOT_STATE_DIR and OFFSHOOT_CACHE_DIR")]
    NoHome,
    /// A directory could not be made.
    #[error("the directory {path} could not be made; set {variable} to one you can write to")]
    Make {
        /// The directory.
        path: PathBuf,
        /// The variable that moves it.
        variable: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not ranges of addresses.
    #[error("OFFSHOOT_NETWORK_POOL can not be used: {0}")]
    Pool(#[from] PoolTextError),
}

impl Home {
    /// From the environment: `OFFSHOOT_{DATA,STATE,CACHE}_DIR`; else for root `/var/lib/offshoot`, `/run/offshoot` and
    /// `/var/cache/offshoot`; else the XDG directories. They are made if absent. `OFFSHOOT_NETWORK_DIR` and `OFFSHOOT_NETWORK_POOL`
    /// say where addresses are leased, and which; the default directory is one for each network namespace that is a host's.
    ///
    /// # Errors
    /// [`HomeError`].
    pub fn from_env() -> Result<Self, HomeError> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = rustix::process::geteuid().is_root();
        let place = |own: &str, system: &str, xdg: &str, below_home: &str| -> Result<PathBuf, HomeError> {
            if let Some(path) = set(own) {
                return Ok(path);
            }
            if root {
                return Ok(PathBuf::from(system));
            }
            let base = set(xdg).or_else(|| set("HOME").map(|home| home.join(below_home))).ok_or(HomeError::NoHome)?;
            Ok(base.join("offshoot"))
        };
        let home = Self {
            data: place("OFFSHOOT_DATA_DIR", "/var/lib/offshoot", "XDG_DATA_HOME", ".local/share")?,
            state: place("OFFSHOOT_STATE_DIR", "/run/offshoot", "XDG_STATE_HOME", ".local/state")?,
            cache: place("OFFSHOOT_CACHE_DIR", "/var/cache/offshoot", "XDG_CACHE_HOME", ".cache")?,
            network: set("OFFSHOOT_NETWORK_DIR").unwrap_or_else(network_of_this_host),
            pool: match env::var("OFFSHOOT_NETWORK_POOL") {
                Ok(text) if !text.is_empty() => text.parse()?,
                _ => Pool::default(),
            },
        };
        home.make()
    }

    /// Everything below one directory.
    #[must_use]
    pub fn below(dir: &Path) -> Self {
        let place = |name: &str| dir.join(name);
        Self {
            data: place("data"),
            state: place("state"),
            cache: place("cache"),
            network: place("network"),
            pool: Pool::default(),
        }
    }

    /// Makes the directories: data can be passed through (a fork's process reaches its template), the rest is private.
    ///
    /// # Errors
    /// [`HomeError::Make`].
    pub fn make(self) -> Result<Self, HomeError> {
        let forks = self.forks();
        let names = self.names();
        let pools = self.pools();
        let pages = self.pages();
        let snapshots = self.snapshots();
        let places: [(&Path, u32, &'static str); 8] = [
            (&self.data, 0o711, "OFFSHOOT_DATA_DIR"),
            (&snapshots, 0o700, "OFFSHOOT_DATA_DIR"),
            (&self.cache, 0o711, "OFFSHOOT_CACHE_DIR"),
            (&self.state, 0o700, "OFFSHOOT_STATE_DIR"),
            (&forks, 0o700, "OFFSHOOT_STATE_DIR"),
            (&names, 0o700, "OFFSHOOT_STATE_DIR"),
            (&pools, 0o700, "OFFSHOOT_STATE_DIR"),
            (&pages, 0o700, "OFFSHOOT_STATE_DIR"),
        ];
        for (path, mode, variable) in places {
            make(path, mode).map_err(|source| HomeError::Make { path: path.to_owned(), variable, source })?;
        }
        Ok(self)
    }

    /// One directory per fork.
    #[must_use]
    pub fn forks(&self) -> PathBuf {
        self.state.join("forks")
    }

    /// What forks were captured as: standby, and what children are made of. With the data, because it is what is not in memory.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.data.join("snapshots")
    }

    /// One file per template that is to have spare machines.
    #[must_use]
    pub fn pools(&self) -> PathBuf {
        self.state.join("pools")
    }

    /// Up to two files per template that has been forked: the pages that a fork needs first, without a network and with one.
    #[must_use]
    pub fn pages(&self) -> PathBuf {
        self.state.join("pages")
    }

    /// One link per fork name in use, to the fork's id.
    #[must_use]
    pub fn names(&self) -> PathBuf {
        self.state.join("names")
    }
}

/// Makes a directory with this mode, whatever this process' umask takes away. One that is there keeps its own: somebody chose it.
fn make(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Two network namespaces have nothing to do with each other, so what is known of one is nothing to the other. The number is the
/// namespace's inode.
fn network_of_this_host() -> PathBuf {
    let number = fs::metadata("/proc/self/ns/net").map_or(0, |namespace| namespace.ino());
    PathBuf::from(format!("/run/offshoot/network-{number}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn t2_the_umask_takes_nothing_from_directories_that_are_passed_through() {
        // A umask is the whole process', so this test has one of its own.
        const INSIDE: &str = "OFFSHOOT_TEST_UMASK";
        let Some(dir) = env::var_os(INSIDE) else {
            let dir = tempfile::tempdir().unwrap();
            let mut again = Command::new("sh");
            again.args(["-c", "umask 077; exec \"$0\" \"$@\""]).arg(env::current_exe().unwrap());
            let name = "home::tests::t2_the_umask_takes_nothing_from_directories_that_are_passed_through";
            let output = again.args(["--exact", name]).env(INSIDE, dir.path()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            return;
        };
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let home = Home::below(Path::new(&dir)).make().unwrap();
        assert_eq!([&home.data, &home.cache, &home.state].map(|path| mode(path)), [0o711, 0o711, 0o700]);
        // Whoever chose another mode keeps it.
        fs::set_permissions(&home.data, fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(mode(&home.make().unwrap().data), 0o750);
    }
}
