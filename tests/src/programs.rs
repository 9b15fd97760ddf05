//! Where the programs under test are, and where the tests keep what they make.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The checkout.
#[must_use]
pub fn source() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the checkout")
}

/// Templates, compiled recipes: kept between runs.
#[must_use]
pub fn kept() -> PathBuf {
    let path = env::var_os("OFFSHOOT_TEST_DIR").map_or_else(|| source().join("target/system-tests"), PathBuf::from);
    fs::create_dir_all(&path).expect("the tests' directory can be made");
    path
}

/// Kernels and root images: the place that `offshoot` takes for root, who runs these tests.
#[must_use]
pub fn cache() -> PathBuf {
    let set = env::var_os("OFFSHOOT_CACHE_DIR").filter(|value| !value.is_empty());
    set.map_or_else(|| PathBuf::from("/var/cache/offshoot"), PathBuf::from)
}

/// `offshoot`, built with the feature `fault-points`.
#[must_use]
pub fn offshoot() -> PathBuf {
    let path =
        env::var_os("OFFSHOOT_BIN").map_or_else(|| source().join("target/offshoot-bin-test/offshoot"), PathBuf::from);
    assert!(path.is_file(), "{} is missing; run: scripts/test (or set OFFSHOOT_BIN)", path.display());
    path
}

/// A program beside `offshoot`: the agent, or the agent that does not freeze.
#[must_use]
pub fn beside(name: &str) -> PathBuf {
    let path = offshoot().with_file_name(name);
    assert!(path.is_file(), "{} is missing; run: scripts/test", path.display());
    path
}

/// A program of the distribution.
#[must_use]
pub fn distribution(name: &str, package: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed; run: apt-get install {package}"))
}
