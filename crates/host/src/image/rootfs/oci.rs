//! A root file system from an OCI image layout: index → manifest → layers, every blob checked against its digest.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use tar::Archive;

use super::{
    RootError,
    tar::{plain, put},
    tree::Tree,
};
use crate::image::cache::CacheError;

const MAX_DOCUMENT: u64 = 4 << 20;
const MAX_LAYERS: usize = 256;
const MAX_INDEX_DEPTH: usize = 4;

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Run,
}

#[derive(Debug, Default, Deserialize)]
struct Run {
    #[serde(rename = "Env")]
    env: Option<Vec<String>>,
}

/// An image of a layout, its manifest and configuration checked.
#[derive(Debug)]
pub(crate) struct Image {
    layout: PathBuf,
    digest: String,
    layers: Vec<Descriptor>,
    env: Vec<(String, String)>,
}

fn bad(why: impl Into<String>) -> RootError {
    RootError::Oci(why.into())
}

impl Image {
    /// The layout's only image for linux/amd64.
    pub(crate) fn open(layout: &Path) -> Result<Self, RootError> {
        let path = layout.join("index.json");
        let mut text = Vec::new();
        let file = File::open(&path).map_err(CacheError::at("read", &path))?;
        file.take(MAX_DOCUMENT).read_to_end(&mut text).map_err(CacheError::at("read", &path))?;
        let index: Index = parse(&text, "index.json")?;
        let mut found = Vec::new();
        search(layout, index, MAX_INDEX_DEPTH, &mut found)?;
        found.dedup_by(|a, b| a.digest == b.digest);
        let descriptor = match found.as_slice() {
            [one] => one,
            [] => return Err(bad("it has no image for linux/amd64")),
            many => {
                let names: Vec<_> = many
                    .iter()
                    .map(|one| one.annotations.get("org.opencontainers.image.ref.name").unwrap_or(&one.digest).as_str())
                    .collect();
                return Err(bad(format!(
                    "it has several images ({}); copy the one you mean into a layout of its own, for example with skopeo",
                    names.join(", ")
                )));
            }
        };
        let manifest: Manifest = document(layout, descriptor)?;
        if manifest.layers.len() > MAX_LAYERS {
            return Err(bad(format!("it has {} layers; at most {MAX_LAYERS} are allowed", manifest.layers.len())));
        }
        let config: Config = document(layout, &manifest.config)?;
        if (config.os.as_str(), config.architecture.as_str()) != ("linux", "amd64") {
            return Err(bad(format!("its image is for {}/{}, not linux/amd64", config.os, config.architecture)));
        }
        let env = config.config.env.unwrap_or_default();
        let env =
            env.iter().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        Ok(Self { layout: layout.to_owned(), digest: descriptor.digest.clone(), layers: manifest.layers, env })
    }

    /// Names the whole content: the manifest names its layers.
    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }

    /// The environment the image asks for.
    pub(crate) fn env(&self) -> &[(String, String)] {
        &self.env
    }

    /// Applies the layers in order.
    pub(super) fn unpack(&self, tree: &mut Tree, progress: &mut dyn FnMut(u64, u64)) -> Result<(), RootError> {
        let total = self.layers.iter().map(|layer| layer.size).sum();
        let mut before = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            let mut file = blob(&self.layout, layer)?;
            // What a layer hides lies in the layers below, so it goes before anything of the layer itself comes,
            // wherever in the archive the marks are.
            if index > 0 {
                let fresh = file.try_clone().map_err(RootError::Archive)?;
                hide(fresh, tree)?;
                file.rewind().map_err(RootError::Archive)?;
            }
            let start = before;
            let mut counted = |read| progress(start + read, total);
            let mut archive = Archive::new(plain(file, &mut counted)?);
            for entry in archive.entries().map_err(RootError::Archive)? {
                let mut entry = entry.map_err(RootError::Archive)?;
                let path = entry.path().map_err(RootError::Archive)?.into_owned();
                if whiteout(&path)?.is_none() {
                    put(&mut entry, tree)?;
                }
            }
            before += layer.size;
        }
        Ok(())
    }
}

/// The images for our platform in an index and the indexes it names.
fn search(layout: &Path, index: Index, depth: usize, found: &mut Vec<Descriptor>) -> Result<(), RootError> {
    for descriptor in index.manifests {
        if descriptor.platform.as_ref().is_some_and(|p| p.os != "linux" || p.architecture != "amd64") {
            continue;
        }
        if descriptor.media_type.contains("index") || descriptor.media_type.contains("manifest.list") {
            if depth == 0 {
                return Err(bad("its indexes are nested too deeply"));
            }
            search(layout, document(layout, &descriptor)?, depth - 1, found)?;
        } else {
            found.push(descriptor);
        }
    }
    Ok(())
}

enum Whiteout {
    /// What lies below at this path is gone.
    Path(PathBuf),
    /// All that lies below in this directory is gone.
    Inside(PathBuf),
}

fn whiteout(path: &Path) -> Result<Option<Whiteout>, RootError> {
    let Some(name) = path.file_name() else { return Ok(None) };
    let above = path.parent().unwrap_or(Path::new("")).to_owned();
    if name == ".wh..wh..opq" {
        return Ok(Some(Whiteout::Inside(above)));
    }
    let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") else { return Ok(None) };
    if hidden.starts_with(b".wh.") {
        // Marks of the storage driver that made the layer.
        return Ok(Some(Whiteout::Path(above.join(name))));
    }
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(RootError::Hostile {
            path: path.to_owned(),
            why: "a whiteout of nothing in its directory".to_owned(),
        });
    }
    Ok(Some(Whiteout::Path(above.join(std::ffi::OsStr::from_bytes(hidden)))))
}

fn hide(file: File, tree: &mut Tree) -> Result<(), RootError> {
    let mut nobody = |_| ();
    let mut archive = Archive::new(plain(file, &mut nobody)?);
    for entry in archive.entries().map_err(RootError::Archive)? {
        let entry = entry.map_err(RootError::Archive)?;
        match whiteout(&entry.path().map_err(RootError::Archive)?)? {
            Some(Whiteout::Path(path)) => tree.remove(&path)?,
            Some(Whiteout::Inside(path)) => tree.clear(&path)?,
            None => {}
        }
    }
    Ok(())
}

fn parse<T: DeserializeOwned>(text: &[u8], name: &str) -> Result<T, RootError> {
    serde_json::from_slice(text).map_err(|error| bad(format!("{name} is not what the format says: {error}")))
}

fn document<T: DeserializeOwned>(layout: &Path, descriptor: &Descriptor) -> Result<T, RootError> {
    if descriptor.size > MAX_DOCUMENT {
        return Err(bad(format!(
            "{} has {} bytes; at most {MAX_DOCUMENT} are allowed",
            descriptor.digest, descriptor.size
        )));
    }
    let mut text = Vec::new();
    blob(layout, descriptor)?.take(MAX_DOCUMENT).read_to_end(&mut text).map_err(RootError::Archive)?;
    parse(&text, &descriptor.digest)
}

/// A blob, from its beginning, once its size and digest are found right.
fn blob(layout: &Path, descriptor: &Descriptor) -> Result<File, RootError> {
    let digest = &descriptor.digest;
    let hex = digest.strip_prefix("sha256:").filter(|hex| {
        hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    });
    let Some(hex) = hex else {
        return Err(bad(format!("{digest:?} is not a sha256 digest")));
    };
    let path = layout.join("blobs/sha256").join(hex);
    let mut file = File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => bad(format!("the blob {digest} is missing; copy the image again")),
        _ => CacheError::at("read", &path)(error).into(),
    })?;
    let mut hash = Sha256::new();
    let size = io::copy(&mut file, &mut hash).map_err(CacheError::at("read", &path))?;
    let actual: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if size != descriptor.size || actual != hex {
        return Err(RootError::Digest { expected: digest.clone(), actual: format!("sha256:{actual}"), size });
    }
    file.rewind().map_err(CacheError::at("read", &path))?;
    Ok(file)
}
