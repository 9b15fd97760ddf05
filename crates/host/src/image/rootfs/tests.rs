#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    process::Command,
};

use ::tar::{Builder, EntryType, Header};
use sha2::{Digest as _, Sha256};

use super::*;
use crate::recipe::RecipeFile;

/// An archive whose names are written as they are, `..` and all.
fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, text) in entries {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(if *kind == EntryType::Directory { 0o755 } else { 0o4755 });
        let link = matches!(kind, EntryType::Symlink | EntryType::Link);
        let content = if link { "" } else { *text };
        if link {
            header.as_gnu_mut().unwrap().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

use EntryType::{Directory as D, Link as H, Regular as F, Symlink as L};

fn unpacked(entries: &[(&str, EntryType, &str)]) -> (tempfile::TempDir, Result<(), RootError>) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.tar"), archive(entries)).unwrap();
    let mut tree = Tree::create(&dir.path().join("in")).unwrap();
    let outcome = tar::unpack(&dir.path().join("a.tar"), &mut tree, &mut |_| ()).and_then(|()| tree.finish().map(drop));
    (dir, outcome)
}

#[test]
fn an_archive_writes_nothing_outside_its_folder() {
    for entries in [
        [("../out", F, "x"), ("a", F, "")].as_slice(),
        &[("a/../../out", F, "x")],
        &[("a", L, "/nowhere"), ("a/out", F, "x")],
        &[("a", F, ""), ("a/out", F, "x")],
        &[("a", H, "../../etc/passwd")],
        &[("a", H, "/etc/passwd")],
    ] {
        let (dir, outcome) = unpacked(entries);
        assert!(matches!(outcome, Err(RootError::Hostile { .. })), "{entries:?}: {outcome:?}");
        assert!(!dir.path().join("out").exists());
    }
    // These mean something harmless: links lead where they would in the guest.
    let (dir, outcome) =
        unpacked(&[("up", L, "../../.."), ("up/out", F, "x"), ("/abs", F, "y"), ("et", L, "/"), ("et/z", F, "z")]);
    outcome.unwrap();
    assert!(!dir.path().join("out").exists());
    for name in ["out", "abs", "z"] {
        assert!(dir.path().join("in").join(name).is_file(), "{name}");
    }
    // A link is replaced, not written through.
    let victim = tempfile::NamedTempFile::new().unwrap();
    let (_dir, outcome) = unpacked(&[("a", L, victim.path().to_str().unwrap()), ("a", F, "evil")]);
    outcome.unwrap();
    assert_eq!(fs::read_to_string(victim.path()).unwrap(), "");
    // A directory's late mode does not travel over a link put in its place.
    let before = fs::metadata(victim.path().parent().unwrap()).unwrap().mode();
    let parent = victim.path().parent().unwrap().to_str().unwrap();
    let (_dir, outcome) = unpacked(&[("d", D, ""), ("d", L, parent)]);
    outcome.unwrap();
    assert_eq!(fs::metadata(parent).unwrap().mode(), before);
}

#[test]
fn damaged_and_empty_archives_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let good = archive(&[("a", F, &"x".repeat(5000))]);
    for (bytes, what) in [(good[..2000].to_vec(), "cut"), (vec![7; 2000], "noise"), (Vec::new(), "nothing")] {
        let path = dir.path().join(what);
        fs::write(&path, bytes).unwrap();
        let mut tree = Tree::create(&dir.path().join(format!("{what}-in"))).unwrap();
        assert!(tar::unpack(&path, &mut tree, &mut |_| ()).is_err(), "{what}");
    }
}

fn recipe(rootfs: RootSource) -> Recipe {
    let mut recipe = Recipe::load("busybox").unwrap();
    recipe.rootfs = rootfs;
    recipe.files = vec![RecipeFile { path: "/opt/app/run".into(), content: b"recipe's file".into(), mode: 0o755 }];
    recipe
}

fn debugfs(image: &Path, request: &str) -> String {
    let output =
        Command::new(crate::image::program::find("debugfs").unwrap()).args(["-R", request]).arg(image).output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

#[test]
fn an_image_has_what_went_in_and_what_every_guest_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, root) = (dir.path().join("cache"), dir.path().join("root"));
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin/only"), "a program").unwrap();
    fs::set_permissions(root.join("bin/only"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(root.join("bin/only"), root.join("bin/twice")).unwrap();
    symlink("bin", root.join("sbin")).unwrap();
    fs::create_dir(root.join("closed")).unwrap();
    fs::write(root.join("closed/in"), "").unwrap();
    fs::set_permissions(root.join("closed"), fs::Permissions::from_mode(0o555)).unwrap();

    let recipe = recipe(RootSource::Directory(root.clone()));
    let image = ensure(&cache, &recipe, &mut |_| ()).unwrap();
    assert_eq!(image.size, fs::metadata(&image.path).unwrap().len());
    assert_eq!(debugfs(&image.path, "cat /opt/app/run"), "recipe's file");
    assert_eq!(debugfs(&image.path, "cat /bin/twice"), "a program");
    assert!(debugfs(&image.path, "stat /bin/only").contains("Mode:  04755"));
    assert!(debugfs(&image.path, "stat /bin/only").contains("Links: 2"));
    assert!(debugfs(&image.path, "stat /closed").contains("Mode:  0555"));
    assert!(debugfs(&image.path, "stat /tmp").contains("Mode:  01777"));
    for name in ["proc", "sys", "dev", "run", "tmp", "etc"] {
        assert!(debugfs(&image.path, &format!("stat /{name}")).contains("Type: directory"), "{name}");
    }
    assert!(debugfs(&image.path, "stat /opt/app/run").contains("User:     0"));
    assert!(!debugfs(&image.path, "features").contains("has_journal"));

    // Found again; changed content is another image; nothing temporary is left.
    assert_eq!(ensure(&cache, &recipe, &mut |_| ()).unwrap(), image);
    fs::write(root.join("bin/only"), "b program").unwrap();
    assert_ne!(ensure(&cache, &recipe, &mut |_| ()).unwrap().path, image.path);
    nothing_temporary(&cache);
    assert!(matches!(
        ensure(&cache, &self::recipe(RootSource::Directory("/".into())), &mut |_| ()),
        Err(RootError::OwnRoot(_))
    ));
}

fn nothing_temporary(cache: &Path) {
    let names: Vec<_> = fs::read_dir(cache.join(SHELF)).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().contains(".tmp-")), "{names:?}");
}

#[test]
fn a_failure_leaves_nothing_in_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.tar");
    fs::write(&path, archive(&[("good", F, "x"), ("../bad", F, "x")])).unwrap();
    let error = ensure(dir.path(), &recipe(RootSource::Tar(path)), &mut |_| ()).unwrap_err();
    assert!(matches!(error, RootError::Hostile { .. }));
    nothing_temporary(dir.path());
    let images = fs::read_dir(dir.path().join(SHELF)).unwrap().flatten();
    assert_eq!(images.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')).count(), 0);
}

#[test]
fn two_builders_of_one_image_share_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar.gz");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&archive(&[("hello", F, "x")])).unwrap();
    fs::write(&path, gzip.finish().unwrap()).unwrap();
    let recipe = recipe(RootSource::Tar(path));
    let images: Vec<_> = std::thread::scope(|scope| {
        let build = || ensure(dir.path(), &recipe, &mut |_| ()).unwrap();
        let both = [scope.spawn(build), scope.spawn(build)];
        both.map(|thread| thread.join().unwrap()).into()
    });
    assert_eq!(images[0], images[1]);
    nothing_temporary(dir.path());
}

/// An OCI layout of these layers. Returns the digests of the layers.
fn layout(dir: &Path, layers: &[Vec<u8>]) -> Vec<String> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let put = |bytes: &[u8]| {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&hex), bytes).unwrap();
        (format!("sha256:{hex}"), serde_json::json!({"digest": format!("sha256:{hex}"), "size": bytes.len()}))
    };
    let config = put(br#"{"os":"linux","architecture":"amd64","config":{"Env":["A=1","bad name=2"]}}"#).1;
    let layers: Vec<_> = layers.iter().map(|layer| put(layer)).collect();
    let manifest = serde_json::json!({
        "config": config, "layers": layers.iter().map(|(_, descriptor)| descriptor).collect::<Vec<_>>(),
    });
    let manifest = put(manifest.to_string().as_bytes()).1;
    let other =
        serde_json::json!({"digest": "sha256:0", "size": 1, "platform": {"os": "unknown", "architecture": "unknown"}});
    fs::write(dir.join("index.json"), serde_json::json!({"manifests": [other, manifest]}).to_string()).unwrap();
    layers.into_iter().map(|(digest, _)| digest).collect()
}

fn oci_tree(layers: &[Vec<u8>]) -> (tempfile::TempDir, Result<(), RootError>) {
    let dir = tempfile::tempdir().unwrap();
    layout(&dir.path().join("layout"), layers);
    let mut tree = Tree::create(&dir.path().join("in")).unwrap();
    let outcome = oci::Image::open(&dir.path().join("layout"))
        .and_then(|image| image.unpack(&mut tree, &mut |_, _| ()))
        .and_then(|()| tree.finish().map(drop));
    (dir, outcome)
}

#[test]
fn layers_hide_what_lies_below_and_only_that() {
    let base = archive(&[
        ("a", F, "1"),
        ("b", F, "1"),
        ("d/old", F, "1"),
        ("e/keep", F, "1"),
        ("lib", L, "usr/lib"),
        ("usr/lib/x", F, "1"),
    ]);
    // The opaque mark comes after the layer's own file, and the whiteout of b beside a new b.
    let upper = archive(&[
        ("d/new", F, "2"),
        ("d/.wh..wh..opq", F, ""),
        (".wh.a", F, ""),
        ("b", F, "2"),
        (".wh.b", F, ""),
        ("lib/y", F, "2"),
    ]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&upper).unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(
        archive(&[("z", F, "3")]).as_slice(),
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    let (dir, outcome) = oci_tree(&[base, gzip.finish().unwrap(), zstd]);
    outcome.unwrap();
    let root = dir.path().join("in");
    assert!(!root.join("a").exists() && !root.join("d/old").exists());
    for (path, text) in
        [("b", "2"), ("d/new", "2"), ("e/keep", "1"), ("usr/lib/x", "1"), ("usr/lib/y", "2"), ("z", "3")]
    {
        assert_eq!(fs::read_to_string(root.join(path)).unwrap(), text, "{path}");
    }
    assert!(root.join("lib").is_symlink());
}

#[test]
fn a_layout_that_lies_is_refused() {
    for name in [".wh...", ".wh..", ".wh.", "../.wh.a"] {
        let (dir, outcome) = oci_tree(&[archive(&[("a", F, "1")]), archive(&[(name, F, "")])]);
        assert!(matches!(outcome, Err(RootError::Hostile { .. })), "{name}: {outcome:?}");
        assert!(dir.path().join("layout").exists());
    }
    let dir = tempfile::tempdir().unwrap();
    let digest = layout(dir.path(), &[archive(&[("a", F, "1")])]).remove(0);
    let blob = dir.path().join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
    let mut bytes = fs::read(&blob).unwrap();
    bytes[512] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let recipe = Recipe::load(dir.path().to_str().unwrap()).unwrap();
    assert_eq!(recipe.env.into_iter().collect::<Vec<_>>(), [("A".to_owned(), "1".to_owned())]);
    let unpack = || {
        let mut tree = Tree::create(&tempfile::tempdir().unwrap().path().join("in")).unwrap();
        oci::Image::open(dir.path())?.unpack(&mut tree, &mut |_, _| ())
    };
    assert!(matches!(unpack(), Err(RootError::Digest { .. })));
    fs::remove_file(&blob).unwrap();
    assert!(matches!(unpack(), Err(RootError::Oci(_))));
    for index in [
        "{}",
        "[]",
        r#"{"manifests":[{"digest":"sha256:../../x","size":1}]}"#,
        r#"{"manifests":[{"digest":"md5:1","size":1}]}"#,
    ] {
        fs::write(dir.path().join("index.json"), index).unwrap();
        assert!(matches!(unpack(), Err(RootError::Oci(_))), "{index}");
    }
}
