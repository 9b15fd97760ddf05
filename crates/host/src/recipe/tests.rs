#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::symlink;

use super::*;

const GOOD: &str = r#"
name = "mine"
memory = "512M"
[rootfs]
kind = "busybox"
"#;

fn load(text: &str) -> Result<Recipe, RecipeError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE), text).unwrap();
    Recipe::load(dir.path().to_str().unwrap())
}

/// The error of GOOD with one more part.
fn refused(more: &str) -> String {
    load(&format!("{GOOD}{more}")).expect_err(more).to_string()
}

#[test]
fn the_built_in_recipes_are_good() {
    for name in built_in() {
        let recipe = Recipe::load(name).unwrap();
        assert_eq!(recipe.name, name);
    }
    let python = Recipe::load("python").unwrap();
    assert!(python.files.iter().any(|file| file.path.ends_with("bridge.py") && !file.content.is_empty()));
    assert!(python.warm_request().runtime.is_some());
}

#[test]
fn everything_a_recipe_can_say_reaches_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("root")).unwrap();
    fs::write(dir.path().join("a.py"), "print()").unwrap();
    let text = r#"
name = "all"
description = "d"
memory = "1G"
vcpus = 2
network = false
[rootfs]
kind = "directory"
path = "root"
[[files]]
path = "/a/b.py"
source = "a.py"
mode = 0o755
[[files]]
path = "/etc/x"
content = "text"
[env]
A = "1"
[runtime]
command = ["/bin/r"]
env = { B = "2" }
restart = "on-failure"
ready_timeout_s = 7
event_timeout_s = 3
[[services]]
name = "web"
command = ["/bin/w", "-x"]
workdir = "/srv"
user = "1000:1000"
on_fork = "signal"
signal = "HUP"
ready_line = "listening"
restart = "always"
timeout_s = 9
limits = { memory = "64M", pids = 50, cpu = 0.5 }
[[services]]
name = "late"
command = ["/bin/l"]
on_fork = "wait"
[[services]]
name = "hooked"
command = ["/bin/h"]
on_fork = "hook"
hook = ["/bin/hook"]
"#;
    fs::write(dir.path().join(FILE), text).unwrap();
    let recipe = Recipe::load(dir.path().join(FILE).to_str().unwrap()).unwrap();
    assert_eq!((recipe.memory, recipe.vcpus, recipe.network), (1 << 30, 2, false));
    assert!(load(GOOD).unwrap().network, "where nothing is said");
    assert_eq!(recipe.rootfs, RootSource::Directory(dir.path().canonicalize().unwrap().join("root")));
    assert_eq!(recipe.files[0], RecipeFile { path: "/a/b.py".into(), content: b"print()".into(), mode: 0o755 });
    assert_eq!((recipe.files[1].content.as_slice(), recipe.files[1].mode), (b"text".as_slice(), 0o644));
    let warm = recipe.warm_request();
    assert_eq!(warm.env["A"], "1");
    let runtime = warm.runtime.as_ref().unwrap();
    assert_eq!(
        (runtime.ready_timeout_ms, runtime.event_timeout_ms, runtime.restart.as_str()),
        (7000, 3000, "on-failure")
    );
    let web = &warm.services[0];
    assert_eq!((web.on_fork(), web.signal.as_str(), web.user.as_str()), (proto::OnFork::Signal, "HUP", "1000:1000"));
    assert_eq!(web.limits, Some(proto::Limits { memory: 64 << 20, pids: 50, cpu_millis: 500 }));
    assert!(web.start_in_template && !warm.services[1].start_in_template);
    assert_eq!(warm.services[2].hook, ["/bin/hook"]);
    assert_eq!(warm.timeout_ms, 10_000 + 7_000 + 9_000 + 60_000, "time for all that starts in the template");
    assert_eq!(recipe.ack_limit_ms(), 30_000 + 3_000 + 9_000 + 60_000 + 60_000, "and for all that happens in a fork");
    assert_eq!(load(GOOD).unwrap().ack_limit_ms(), 60_000, "where nothing does");
}

#[test]
fn f5_a_service_that_answers_devtools_is_asked_as_devtools_clients_ask() {
    let with = |more: &str| {
        load(&format!("{GOOD}[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nready_cdp = 9222\n{more}")).unwrap()
    };
    let plain = with("");
    assert_eq!(plain.devtools_port.map(NonZeroU16::get), Some(9222));
    let asked = |recipe: &Recipe| {
        let service = recipe.services.last().unwrap();
        (service.ready_port, service.ready_http.clone(), service.ready_text.clone())
    };
    assert_eq!(asked(&plain), (9222, "/json/version".into(), "\"webSocketDebuggerUrl\"".into()));
    // Another question of the recipe's is the one that counts.
    let other = with("ready_http = \"/json\"\nready_text = \"warm\"");
    assert_eq!(asked(&other), (9222, "/json".into(), "warm".into()));
    assert_eq!(asked(&with("ready_http = \"/\"")), (9222, "/".into(), String::new()));
    assert_eq!(load(GOOD).unwrap().devtools_port, None);
    assert_eq!(Recipe::load("browser").unwrap().devtools_port.map(NonZeroU16::get), Some(9222));
}

#[test]
fn mistakes_in_a_recipe_are_refused_with_their_line() {
    let long = "x".repeat(5000);
    let many_services: String =
        (0..33).map(|i| format!("[[services]]\nname = \"s{i}\"\ncommand = [\"/x\"]\n")).collect();
    for (more, expect) in [
        ("colour = 1", "colour"),
        ("[env]\n\"A B\" = \"x\"", "no name of a variable"),
        ("[env]\nA = \"\\u0000\"", "zero byte"),
        ("[env]\nA = 1", "expected a string"),
        ("[runtime]\ncommand = []", "at least the program"),
        ("[runtime]\ncommand = [\"/x\"]\nrestart = \"always\"", "unknown variant"),
        ("[runtime]\ncommand = [\"/x\"]\nready_timeout_s = 0", "3600"),
        ("[runtime]\ncommand = [\"/x\"]\nready_timeout_s = -1", "3600"),
        ("[runtime]\ncommand = [\"/x\"]\nevent_timeout_s = 9999999999", "3600"),
        ("[runtime]\ncommand = [\"/x\"]\nworkdir = \"rel\"", "absolute"),
        ("[[services]]\nname = \"Web\"\ncommand = [\"/x\"]", "a name has"),
        ("[[services]]\nname = \"web\"", "command"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\non_fork = \"signal\"", "needs signal"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nsignal = \"HUP\"", "needs on_fork"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\non_fork = \"signal\"\nsignal = \"KILLALL\"", "one of HUP"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\non_fork = \"signal\"\nsignal = \"PWR\"", "one of HUP"),
        ("[[services]]\nname = \"runtime\"\ncommand = [\"/x\"]", "can not be called runtime"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\non_fork = \"hook\"", "needs hook"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nawaited = false", "no meaning"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nhook_when = \"before-thaw\"", "needs on_fork"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nlimits = { memory = \"1K\" }", "from 1M"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nlimits = { pids = 0 }", "from 1 to"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nlimits = { cpu = 0.0 }", "from 0.01"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nlimits = { cpu = nan }", "from 0.01"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nlimits = { disk = 1 }", "unknown field"),
        ("[identity]\npayload = \"mail\"", "unknown variant"),
        ("[identity]\nport = 0", "1 to 65535"),
        ("[identity]\npayload = \"off\"\n[identity.fields]\na = \"A\"", "with a payload"),
        ("[identity.fields]\n\"a b\" = \"A\"", "a field's name"),
        ("[identity.fields]\na = \"A B\"", "a variable's name"),
        ("[identity.fields]\na = \"A\"\nb = \"A\"", "two fields"),
        ("[identity.fields]\na = \"OFFSHOOT_ID\"", "offshoot's"),
        ("[identity.fields]\na = \"LD_PRELOAD\"", "allow = [\"LD_PRELOAD\"]"),
        ("[identity]\nallow = [\"A B\"]", "a variable's name"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nuser = \"a b\"", "a user is"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nuser = \"1:2:3\"", "a user is"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nready_cdp = 0", "nonzero"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nready_cdp = 1\nready_port = 1", "by itself"),
        ("[[services]]\nname = \"web\"\ncommand = [\"/x\"]\nready_cdp = 1\nready_text = \"x\"", "a ready_http"),
        (
            "[[services]]\nname = \"a\"\ncommand = [\"/x\"]\nready_cdp = 1\n[[services]]\nname = \"b\"\ncommand = [\"/x\"]\nready_cdp = 2",
            "which one",
        ),
        (
            "[[services]]\nname = \"a\"\ncommand = [\"/x\"]\n[[services]]\nname = \"a\"\ncommand = [\"/x\"]",
            "two services",
        ),
        (many_services.as_str(), "at most 32"),
        ("[[files]]\npath = \"/a/../b\"\ncontent = \"\"", "absolute"),
        ("[[files]]\npath = \"a\"\ncontent = \"\"", "absolute"),
        ("[[files]]\npath = \"/\"\ncontent = \"\"", "at /"),
        ("[[files]]\npath = \"/a\"", "either source"),
        ("[[files]]\npath = \"/a\"\nsource = \"x\"\ncontent = \"y\"", "either source"),
        ("[[files]]\npath = \"/a\"\nsource = \"../x\"", "below the recipe's folder"),
        ("[[files]]\npath = \"/a\"\nsource = \"/etc/passwd\"", "below the recipe's folder"),
        ("[[files]]\npath = \"/a\"\nsource = \"none\"", "No such file"),
        ("[[files]]\npath = \"/a\"\ncontent = \"\"\nmode = 0o10000", "octal"),
        (&format!("[[files]]\npath = \"/{long}\"\ncontent = \"\""), "absolute"),
    ] {
        let error = refused(more);
        assert!(error.contains(expect), "{more}\n→ {error}");
        assert!(error.contains("line "), "no line: {error}");
    }
    for (text, expect) in [
        ("", "name"),
        ("name = \"x\"", "rootfs"),
        ("name = \"x\"\n[rootfs]\nkind = \"zip\"", "unknown variant"),
        ("name = \"x\"\n[rootfs]\nkind = \"debian\"", "needs suite"),
        ("name = \"x\"\n[rootfs]\nkind = \"debian\"\nsuite = \"-o\"", "a suite is"),
        ("name = \"x\"\n[rootfs]\nkind = \"debian\"\nsuite = \"bookworm\"\npackages = [\"--x\"]", "Debian package"),
        ("name = \"x\"\n[rootfs]\nkind = \"debian\"\nsuite = \"bookworm\"\npackages = [\"a,b\"]", "Debian package"),
        ("name = \"x\"\n[rootfs]\nkind = \"debian\"\nsuite = \"bookworm\"\npath = \"x\"", "path is for"),
        ("name = \"x\"\n[rootfs]\nkind = \"busybox\"\nsuite = \"bookworm\"", "only"),
        ("name = \"x\"\n[rootfs]\nkind = \"tar\"", "needs path"),
        ("name = \"x\"\n[rootfs]\nkind = \"tar\"\npath = \"/etc/passwd\"", "below the recipe's folder"),
        ("name = \"x\"\n[rootfs]\nkind = \"oci\"\npath = \".\"", "no file oci-layout"),
        ("name = \"x\"\nmemory = \"1M\"\n[rootfs]\nkind = \"busybox\"", "from 64M"),
        ("name = \"x\"\nmemory = \"99999999999999999999G\"\n[rootfs]\nkind = \"busybox\"", "from 64M"),
        ("name = \"x\"\nmemory = \"é\"\n[rootfs]\nkind = \"busybox\"", "from 64M"),
        ("name = \"x\"\nvcpus = 0\n[rootfs]\nkind = \"busybox\"", "1 to 64"),
    ] {
        let error = load(text).expect_err(text).to_string();
        assert!(error.contains(expect), "{text}\n→ {error}");
    }
    assert!(matches!(load(&"#".repeat(300 << 10)), Err(RecipeError::Read { .. })));
}

#[test]
fn the_line_of_a_mistake_is_right() {
    let error = refused("\n[[services]]\nname = \"web\"\ncommand = [\"/x\"]\non_fork = \"hook\"");
    assert!(error.contains("line 7"), "{error}");
    let error = refused("vcpus_ = 1");
    assert!(error.contains("line 6"), "{error}");
}

#[test]
fn a_link_does_not_lead_out_of_the_recipes_folder() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "s").unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    fs::write(dir.path().join(FILE), format!("{GOOD}[[files]]\npath = \"/a\"\nsource = \"link/secret\"")).unwrap();
    let error = Recipe::load(dir.path().to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("leads out"), "{error}");
}

#[test]
fn what_is_no_recipe_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let load = |name: &str| Recipe::load(dir.path().join(name).to_str().unwrap());
    fs::create_dir(dir.path().join("My Root")).unwrap();
    let recipe = load("My Root").unwrap();
    assert_eq!((recipe.name.as_str(), recipe.rootfs.kind()), ("my-root", "directory"));
    for name in ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst"] {
        fs::write(dir.path().join(name), "").unwrap();
        let recipe = load(name).unwrap();
        assert_eq!((recipe.name.as_str(), recipe.rootfs.kind()), ("a", "tar"));
    }
    fs::write(dir.path().join("a.zip"), "").unwrap();
    assert!(matches!(load("a.zip"), Err(RecipeError::UnknownFile(_))));
    let error = Recipe::load("no-such-recipe").unwrap_err().to_string();
    assert!(error.contains("python") && error.contains("./no-such-recipe"), "{error}");
}
