//! F1: a build that can not succeed says why, with what the guest wrote last, and leaves nothing.

use std::{fs, path::Path};

use offshoot_tests::{Bench, Run, processes};
use serde_json::Value;

/// A build of this recipe, which must fail.
#[track_caller]
fn failing(bench: &Bench, recipe: &str, code: &str) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("name = \"failing\"\nmemory = \"128M\"\n[rootfs]\nkind = \"busybox\"\n{recipe}");
    fs::write(dir.path().join("recipe.toml"), text).unwrap();
    let error = bench.offshoot(&["build", dir.path().to_str().unwrap(), "--tag", "failing"]).exits(1).refused(code);
    nothing_is_left(bench);
    error
}

#[track_caller]
fn nothing_is_left(bench: &Bench) {
    let left = fs::read_dir(bench.data().join("templates")).unwrap().count();
    assert_eq!((left, processes::inside(&bench.data())), (0, Vec::new()));
}

#[test]
fn f1_a_service_or_runtime_that_does_not_get_ready_fails_the_build_with_its_last_words() {
    let bench = Bench::with_own_data();
    let service = |script: &str| {
        format!(
            "[[services]]\nname = \"web\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\nready_line = \"ready\"\ntimeout_s = 2\n"
        )
    };
    let text = failing(&bench, &service("echo no port 80; exit 3"), "guest_refused").to_string();
    assert!(text.contains("web") && text.contains("no port 80") && text.contains('3'), "{text}");
    let text = failing(&bench, &service("echo still thinking; sleep 1000"), "guest_refused").to_string();
    assert!(text.contains("web") && text.contains("still thinking"), "{text}");
    let text = failing(&bench, "[[services]]\nname = \"web\"\ncommand = [\"/no/such\"]\n", "guest_refused").to_string();
    assert!(text.contains("/no/such"), "{text}");
    let runtime = "[runtime]\ncommand = [\"/bin/sh\", \"-c\", \"echo traceback >&2; exit 1\"]\nready_timeout_s = 5\n";
    let text = failing(&bench, runtime, "guest_refused").to_string();
    assert!(text.contains("traceback"), "{text}");
    bench.end();
}

#[test]
fn f1_a_kernel_that_is_none_is_an_error_and_no_wait() {
    let bench = Bench::with_own_data();
    let _ = bench.offshoot(&["templates"]).ok();
    for kernel in [Path::new("/no/such/kernel"), Path::new("/etc/passwd")] {
        let kernel = kernel.to_str().unwrap();
        let run = bench.offshoot(&["build", "busybox", "--tag", "none", "--kernel", kernel]).exits(1);
        let _ = run.refused("kernel_unusable");
        nothing_is_left(&bench);
    }
    bench.end();
}

#[test]
fn f1_what_is_missing_is_named_with_its_package() {
    let bench = Bench::with_own_data();
    let _ = bench.offshoot(&["templates"]).ok();
    let mut command = bench.command(&["build", "busybox", "--tag", "none"]);
    // Neither programs of the distribution nor places to look for them.
    command.env("PATH", "/no/such/folder");
    let run = Run::of(command, &[]);
    if run.code != Some(0) {
        let text = run.error().to_string();
        assert!(text.contains("apt-get install"), "{text}");
        nothing_is_left(&bench);
    }
    for options in [["--memory", "1M"], ["--vcpus", "0"], ["--vcpus", "99"]] {
        let run = bench.offshoot(&[&["build", "busybox", "--tag", "none"], &options[..]].concat());
        let _ = run.exits(2).refused("out_of_range");
    }
    bench.offshoot(&["build", "no-such-recipe", "--tag", "none"]).exits(1).refused("recipe_not_found");
    bench.end();
}
