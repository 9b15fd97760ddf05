//! F5: the user's own root file system: a directory, a tar archive, an OCI layout; honest and hostile ones.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use offshoot_tests::{Bench, Kind, Run, processes, programs};
use serde_json::json;
use tar::{Builder, EntryType, Header};

/// A root file system of a busybox and a file.
fn tree(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::copy(programs::distribution("busybox", "busybox-static"), root.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "hostname", "ls", "sleep", "stat"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("etc/marker"), "my own\n").unwrap();
    root
}

fn tar_of(root: &Path, archive: &Path, flags: &str) {
    let made = Command::new("tar").arg("-C").arg(root).arg(flags).arg(archive).arg(".").status().unwrap();
    assert!(made.success());
}

/// An OCI layout of one layer, made by hand; a digest that is given stands in place of the layer's own.
fn layout(dir: &Path, layer: &[u8], lie: Option<&str>) -> PathBuf {
    let layout = dir.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let put = |bytes: &[u8]| {
        let file = blobs.join("new");
        fs::write(&file, bytes).unwrap();
        let sum = Command::new("sha256sum").arg(&file).output().unwrap();
        let hex = String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap().trim_start_matches('\\').to_owned();
        fs::rename(&file, blobs.join(&hex)).unwrap();
        json!({ "digest": format!("sha256:{hex}"), "size": bytes.len() })
    };
    let config = put(br#"{"os":"linux","architecture":"amd64","config":{"Env":["OCI=yes"]}}"#);
    let mut layer = put(layer);
    if let Some(lie) = lie {
        layer["digest"] = json!(lie);
    }
    let manifest = put(json!({ "config": config, "layers": [layer] }).to_string().as_bytes());
    fs::write(layout.join("index.json"), json!({ "manifests": [manifest] }).to_string()).unwrap();
    layout
}

fn build(bench: &Bench, from: &Path, tag: &str) -> Run {
    bench.offshoot(&["build", from.to_str().unwrap(), "--tag", tag, "--memory", "128M"])
}

/// Its forks run its own programs, with identities of their own.
#[track_caller]
fn check_forks(bench: &Bench, tag: &str) {
    let made = bench.offshoot(&["fork", tag, "-n", "2", "--name", tag]).ok().json();
    for number in [1, 2] {
        let name = format!("{tag}-{number}");
        let seen =
            bench.plain_ok(&["exec", &name, "--", "/bin/sh", "-c", "cat /etc/marker; hostname; cat /run/offshoot/id"]);
        let id = made["forks"][number - 1]["id"].as_str().unwrap();
        assert_eq!(seen, format!("my own\n{name}\n{id}"));
    }
    let _ = bench.plain_ok(&["exec", &format!("{tag}-1"), "--", "/bin/sh", "-c", "echo changed > /etc/marker"]);
    assert_eq!(bench.plain_ok(&["exec", &format!("{tag}-2"), "--", "/bin/cat", "/etc/marker"]), "my own\n");
}

#[test]
fn f5_a_directory_is_a_root_file_system() {
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    let root = tree(dir.path());
    let _ = build(&bench, &root, "directory").ok();
    check_forks(&bench, "directory");
    assert_eq!(fs::read_to_string(root.join("etc/marker")).unwrap(), "my own\n", "the directory is only read");
    assert!(!root.join("proc").exists());
    bench.offshoot(&["eval", "directory-1", "--", "1"]).exits(1).refused("no_runtime");
    bench.end();
}

#[test]
fn f5_a_tar_archive_is_a_root_file_system() {
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    let archive = dir.path().join("root.tar.gz");
    tar_of(&tree(dir.path()), &archive, "-czf");
    let _ = build(&bench, &archive, "archive").ok();
    check_forks(&bench, "archive");
    bench.end();
}

#[test]
fn f5_an_oci_layout_is_a_root_file_system() {
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    let archive = dir.path().join("layer.tar");
    tar_of(&tree(dir.path()), &archive, "-cf");
    let layout = layout(dir.path(), &fs::read(&archive).unwrap(), None);
    let _ = build(&bench, &layout, "layers").ok();
    check_forks(&bench, "layers");
    assert_eq!(bench.plain_ok(&["exec", "layers-1", "--", "/bin/sh", "-c", "echo $OCI"]), "yes\n");
    bench.end();
}

/// An archive whose names are written as they are, `..` and all.
fn archive(path: &Path, entries: &[(&str, EntryType, &str)]) {
    let mut builder = Builder::new(File::create(path).unwrap());
    for (name, kind, text) in entries {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        let link = matches!(kind, EntryType::Symlink | EntryType::Link);
        if link {
            header.as_gnu_mut().unwrap().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        let content = if link { "" } else { *text };
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.finish().unwrap();
}

/// Expects a typed error before any machine is started, and that nothing stays.
#[track_caller]
fn refused(bench: &Bench, from: &Path, code: &str, says: &str) {
    let error = build(bench, from, "hostile").exits(1).refused(code);
    assert!(error.to_string().contains(says), "{says:?} is not in {error}");
    let left: Vec<_> =
        fs::read_dir(bench.data().join("templates")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, Vec::<PathBuf>::new());
    assert_eq!(processes::inside(&bench.data()), Vec::<u32>::new());
}

#[test]
fn f5_a_hostile_archive_is_refused_and_writes_nothing_outside() {
    use EntryType::{Link, Regular, Symlink};
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    let path = dir.path().join("hostile.tar");
    let victim = dir.path().join("victim");
    fs::create_dir(&victim).unwrap();
    let victim_text = victim.to_str().unwrap().to_owned();
    for entries in [
        [("../offshoot-escaped", Regular, "x")].as_slice(),
        &[("a/../../offshoot-escaped", Regular, "x")],
        &[("out", Symlink, &victim_text), ("out/owned", Regular, "x")],
        &[("out", Symlink, "/nowhere"), ("out/owned", Regular, "x")],
        &[("passwd", Link, "/etc/passwd")],
        &[("passwd", Link, "../../../../etc/passwd")],
    ] {
        archive(&path, entries);
        refused(&bench, &path, "root_image_failed", "refused");
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "{entries:?}");
    }
    // The same as a layer of an image.
    let layout_dir = tempfile::tempdir().unwrap();
    archive(&path, &[("../offshoot-escaped", Regular, "x")]);
    let layout = layout(layout_dir.path(), &fs::read(&path).unwrap(), None);
    refused(&bench, &layout, "root_image_failed", "refused");
    bench.end();
}

#[test]
fn f5_a_damaged_or_lying_root_file_system_is_refused() {
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    let _ = bench.offshoot(&["templates"]).ok();
    let path = dir.path().join("root.tar");
    // A size that is never reached.
    let mut header = Header::new_gnu();
    header.set_path("bomb").unwrap();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(1 << 60);
    header.set_cksum();
    fs::write(&path, [header.as_bytes(), &[0_u8; 512][..]].concat()).unwrap();
    refused(&bench, &path, "root_image_failed", "");
    for bytes in [&b""[..], &[7; 4096]] {
        fs::write(&path, bytes).unwrap();
        refused(&bench, &path, "root_image_failed", "");
    }
    let good = dir.path().join("good.tar");
    archive(&good, &[("a", EntryType::Regular, "x")]);
    let good = fs::read(good).unwrap();
    let lies = ["sha256:../../../../../etc/passwd", "md5:00", "", &format!("sha256:{}", "0".repeat(64))];
    for lie in lies {
        let layout_dir = tempfile::tempdir().unwrap();
        let layout = layout(layout_dir.path(), &good, Some(lie));
        refused(&bench, &layout, "root_image_failed", "OCI");
    }
    // Content that is not what its digest says.
    let layout_dir = tempfile::tempdir().unwrap();
    let layout = layout(layout_dir.path(), &good, None);
    for blob in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap().path();
        let mut bytes = fs::read(&blob).unwrap();
        if bytes == good {
            bytes[0] ^= 1;
            fs::write(blob, bytes).unwrap();
        }
    }
    refused(&bench, &layout, "root_image_failed", "damaged");
    let nothing = dir.path().join("nothing");
    refused(&bench, &nothing, "recipe_not_found", "nothing");
    fs::create_dir(&nothing).unwrap();
    refused(&bench, &nothing, "root_image_failed", "empty");
    refused(&bench, Path::new("/"), "root_image_failed", "own root directory");
    bench.end();
}

#[test]
fn f5_an_archive_that_fills_the_disk_is_a_typed_error_and_nothing_stays() {
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    // The shelf of root images, without touching the one that other tests use.
    let _ = bench.template(Kind::Busybox);
    let shelf = programs::cache().join("rootfs");
    assert!(shelf.is_dir(), "{} is not the cache", shelf.display());
    let plain = dir.path().join("bomb.tar");
    let mut builder = Builder::new(File::create(&plain).unwrap());
    let zeros = vec![0; 48 << 20];
    let mut header = Header::new_gnu();
    header.set_size(zeros.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "zeros", zeros.as_slice()).unwrap();
    builder.into_inner().unwrap().flush().unwrap();
    assert!(Command::new("gzip").arg(&plain).status().unwrap().success());
    let bomb = dir.path().join("bomb.tar.gz");
    assert!(fs::metadata(&bomb).unwrap().len() < 1 << 20);
    let script = format!(
        "mount -t tmpfs -o size=16m small '{shelf}' || exit 99; \"$@\"; code=$?; find '{shelf}' -type f -size +0; exit $code",
        shelf = shelf.display()
    );
    let mut command = Command::new(programs::distribution("unshare", "util-linux"));
    command.args(["--mount", "--propagation", "private", "/bin/sh", "-c", &script, "sh"]);
    let build = bench.command(&["build", bomb.to_str().unwrap(), "--tag", "bomb"]);
    command.arg(build.get_program()).args(build.get_args());
    for (name, value) in build.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let run = Run::of(command, &[]).exits(1);
    let error = run.refused("root_image_failed");
    assert!(error.to_string().contains("disk") && error.to_string().contains("full"), "{error}");
    assert_eq!(run.out(), "", "something is left");
    bench.end();
}
