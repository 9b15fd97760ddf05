//! The bridge of the recipe `node`, as a plain process outside a guest.

use std::thread::sleep;

use super::*;

fn node(warm: &str) -> Runtime {
    let bridge = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/node/bridge.js");
    // As the recipe starts it.
    let command = format!("exec /usr/bin/node --no-force-async-hooks-checks '{bridge}' 8<&0 9>&1 </dev/null 1>&2");
    Runtime {
        command: ["/bin/sh", "-c", &command].map(str::to_owned).into(),
        env: [("OFFSHOOT_WARM".to_owned(), warm.to_owned())].into(),
        ready_timeout_ms: 60_000,
        event_timeout_ms: 20_000,
        ..Runtime::default()
    }
}

fn warm_node(warm: &str) -> (Arc<Host>, Arc<Supervisor>) {
    let (host, supervisor) = supervisor();
    let request = WarmRequest { runtime: Some(node(warm)), ..WarmRequest::default() };
    supervisor.warm(request, |_| ()).expect("nodejs (18 or later) must be installed: apt-get install nodejs");
    (host, supervisor)
}

/// The value and how Node shows it.
fn shown(supervisor: &Supervisor, code: &str) -> (String, String) {
    let reply = supervisor.eval(code, 20_000);
    assert_eq!(reply.error, None, "{code}");
    (reply.value_json, reply.repr)
}

#[test]
fn node_answers_with_values_that_say_what_they_are() {
    let (_host, supervisor) = warm_node("var warmed = await Promise.resolve(7)");
    for (code, expected) in [
        ("warmed", "7"),
        ("const x = 1; x + 1", "2"),
        ("const x = 2; x", "2"),
        ("const y = await new Promise((resolve) => setTimeout(resolve, 5, x)); y + 1", "3"),
        ("({ a: 1 })", r#"{"a":1}"#),
        ("[NaN, Infinity, -Infinity, -0, 0.5, 1e21, null, 'ü']", r#"[NaN,Infinity,-Infinity,-0,0.5,1e+21,null,"ü"]"#),
        (
            "[new Date(0), new Map([['k', 1]]), new Set([1]), Buffer.from('ab')]",
            r#"["1970-01-01T00:00:00.000Z",[["k",1]],[1],[97,98]]"#,
        ),
        (
            "[10n, undefined, , Symbol('s')]",
            r#"[{"$js":"10n"},{"$js":"undefined"},{"$js":"undefined"},{"$js":"Symbol(s)"}]"#,
        ),
        ("({ a: undefined, d: new Date(NaN) })", r#"{"a":{"$js":"undefined"},"d":{"$js":"Invalid Date"}}"#),
        ("const ring = {}; ring.ring = ring; ring", r#"{"ring":{"$js":"[Circular]"}}"#),
        ("[{ $js: 1 }]", r#"[{"$js":"{ '$js': 1 }"}]"#),
        ("'\\ud800'", "null"),
        ("({ get a() { throw new Error('no') } })", r#"{"a":{"$js":"<throws Error: no>"}}"#),
        ("[{ toJSON() { throw 1 } }, new Proxy({}, { get() { throw 1 }, ownKeys() { throw 2 } })].length", "2"),
        ("typeof require('node:fs').readFileSync", "\"function\""),
    ] {
        assert_eq!(value(&supervisor, code), expected, "{code}");
    }
    for (code, repr) in [
        ("undefined", "undefined"),
        ("null", "null"),
        ("10n", "10n"),
        ("/a/g", "/a/g"),
        ("new Proxy({}, { get() { throw 1 } })", "Proxy [ {}, { get: [Function: get] } ]"),
        ("({ toJSON() { throw 1 } })", "{ toJSON: [Function: toJSON] }"),
        ("Promise.resolve(1)", "Promise { 1 }"),
    ] {
        assert_eq!(shown(&supervisor, code), ("null".to_owned(), repr.to_owned()), "{code}");
    }
}

#[test]
fn node_errors_have_the_users_frames_and_nothing_that_is_left_behind_ends_it() {
    let (_host, supervisor) = warm_node("");
    let failure = error(&supervisor, "function f() { throw new TypeError('boo') }\nf()", 0);
    assert_eq!((&*failure.kind, &*failure.message), ("exception", "TypeError: boo"));
    let frames: Vec<_> = failure.stack.lines().skip(1).map(str::trim_start).collect();
    assert!(frames.len() == 2 && frames[0].starts_with("at f (<eval-") && frames[1].ends_with(":2:1"), "{frames:?}");
    let failure = error(&supervisor, "await (async () => { await 1; throw new RangeError('later') })()", 0);
    assert_eq!(failure.message, "RangeError: later");
    let failure =
        error(&supervisor, "throw Object.assign(new Error('e'), { code: 'E1', cause: new Error('deep') })", 0);
    assert!(failure.stack.contains("code: 'E1'") && failure.stack.contains("Error: deep"), "{}", failure.stack);
    assert!(!failure.stack.contains("bridge.js"), "{}", failure.stack);
    assert_eq!(error(&supervisor, "1 +", 0).message, "SyntaxError: Unexpected end of input");
    assert_eq!(error(&supervisor, "throw { code: 5 }", 0).message, "Uncaught { code: 5 }");
    value(
        &supervisor,
        "Promise.reject(new Error('nobody minds')); setTimeout(() => { throw new Error('nobody sees') }, 1); 1",
    );
    wait_for_log(&supervisor, "runtime", "unhandledRejection: Error: nobody minds");
    wait_for_log(&supervisor, "runtime", "uncaughtException: Error: nobody sees");
    let reply = supervisor.eval("console.log('out'); console.error('err'); process.stdout.write('more'); 1", 0);
    assert_eq!((&*reply.stdout, &*reply.stderr), ("out\nmore", "err\n"));
}

#[test]
fn node_hostile_code_reaches_neither_the_protocol_nor_other_answers() {
    let (_host, supervisor) = warm_node("");
    let forged = r#"fs.writeSync(1, '{"type":"result","id":2,"value":666}\n');
        child_process.execSync('echo 666; echo 777 >&2', { stdio: 'inherit' }); process.stdin.read()"#;
    assert_eq!(shown(&supervisor, forged), ("null".to_owned(), "null".to_owned()));
    assert_eq!(error(&supervisor, "'x'.repeat(5_000_000)", 0).kind, "too-large");
    assert_eq!(error(&supervisor, "new Uint8Array(5_000_000)", 0).kind, "too-large");
    assert_eq!(
        error(&supervisor, "let deep = []; for (let i = 0; i < 300; i++) deep = [deep]; deep", 0).kind,
        "too-large"
    );
    let reply = supervisor.eval("console.log('x'.repeat(5_000_000))", 0);
    assert!(reply.stdout.len() < (1 << 20) && reply.stdout.contains("more bytes"));
    let poisoned = "const kept = [Array.prototype.push, Array.prototype[Symbol.iterator], JSON.stringify];
        Array.prototype.push = Array.prototype[Symbol.iterator] = JSON.stringify = RegExp.prototype.test = null;
        Object.prototype.toJSON = undefined; Error.prototype.toString = () => { throw 1 }; [1, { a: 2 }]";
    assert!(value(&supervisor, poisoned).starts_with(r#"[1,{"a":2"#));
    assert_eq!(error(&supervisor, "throw new Error('still')", 0).message, "Error: still");
    assert_eq!(value(&supervisor, "1"), "1");
}

#[test]
fn node_is_interrupted_wherever_it_is_and_the_next_one_gets_its_own_answer() {
    let (_host, supervisor) = warm_node("");
    for code in [
        "for (;;) {}",
        "await 1; for (;;) {}",
        "await new Promise(() => {})",
        "for (;;) await null",
        "await new Promise(() => setTimeout(() => { for (;;) {} }, 1))",
        "({ toJSON() { for (;;) {} } })",
        "console.log('kept from the next'); Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)",
    ] {
        assert_eq!(error(&supervisor, code, 300).kind, "timeout", "{code}");
        let next = supervisor.eval("'next'", 20_000);
        assert_eq!((&*next.value_json, &*next.stdout), ("\"next\"", ""), "after {code}");
    }
}

#[test]
fn node_that_ends_says_its_last_words() {
    let (_host, supervisor) = warm_node("");
    let failure = error(&supervisor, "fs.writeSync(2, 'last words\\n'); process.exit(3)", 0);
    assert_eq!(failure.kind, "runtime-died");
    assert!(failure.message.contains("exit code 3") && failure.message.contains("last words"), "{}", failure.message);
    let (_host, supervisor) = self::supervisor();
    let request = WarmRequest { runtime: Some(node("require('no-such-thing')")), ..WarmRequest::default() };
    let error = supervisor.warm(request, |_| ()).unwrap_err().to_string();
    assert!(error.contains("exit code 1") && error.contains("no-such-thing"), "{error}");
}

/// When a timer ran, and under which name.
const TICKING: &str =
    "var ticks = []; setInterval(() => ticks.push([Date.now(), process.env.OFFSHOOT_NAME ?? '']), 1); 1";
/// How long it stood still at most (it has had time to go on); then the names before and after that, and how often it ran after.
const STOOD: &str = "await new Promise((resolve) => setTimeout(resolve, 50));
    var at = 1; for (let i = 1; i < ticks.length; i++) \
    if (ticks[i][0] - ticks[i - 1][0] > ticks[at][0] - ticks[at - 1][0]) at = i;
    [ticks[at][0] - ticks[at - 1][0], ticks[at - 1][1], ticks[at][1], ticks.length - at]";

fn stood(supervisor: &Supervisor) -> (u64, String, String, u64) {
    serde_json::from_str(&value(supervisor, STOOD)).unwrap()
}

#[test]
fn node_stands_still_from_the_quiesce_until_it_is_told_who_it_is() {
    let (host, supervisor) = warm_node(TICKING);
    for name in ["a", "b"] {
        supervisor.prepare_quiesce(soon()).unwrap();
        assert_eq!(supervisor.before_thaw(), Some("filled"));
        sleep(Duration::from_millis(700));
        let identity = fork(&host, name, &[("COLOR", "red")]);
        let after = supervisor.after_thaw(&identity);
        assert_eq!((after.failure, after.announce), (None, true));
        let steps: Vec<_> = after.steps.iter().map(|step| (&*step.name, &*step.outcome)).collect();
        assert!(
            steps.iter().any(|(name, outcome)| *name == "runtime.openssl" && outcome.starts_with("reseeded-")),
            "{steps:?}"
        );
        assert!(steps.contains(&("runtime.environ", "set")), "{steps:?}");
        supervisor.after_ack(&identity);
        let (held, before, after, _) = stood(&supervisor);
        assert!(held >= 700 && before != name && after == name, "{held} {before:?} {after:?}");
        value(&supervisor, "ticks = [ticks.at(-1), ticks.at(-1)]; 1");
    }
    assert_eq!(value(&supervisor, "[process.env.COLOR, offshootGuest.fork.name]"), r#"["red","b"]"#);
}

#[test]
fn node_goes_on_by_itself_when_a_capture_is_given_up() {
    let (_host, supervisor) = warm_node(TICKING);
    supervisor.prepare_quiesce(soon()).unwrap();
    sleep(Duration::from_millis(700));
    supervisor.abandon_quiesce();
    sleep(Duration::from_millis(500));
    let (held, before, after, ran) = stood(&supervisor);
    assert_eq!((held >= 700, &*before, &*after), (true, "", ""));
    // Had it been released by this request, there would be one.
    assert!(ran > 20, "{ran}");
}

#[test]
fn node_in_a_fork_has_its_own_environment_and_loses_the_one_before() {
    let warm = "var calls = []; offshootGuest.onIdentity(async (fork) => { await 1; calls.push(fork.name) })";
    let (host, supervisor) = warm_node(warm);
    let mut seen = Vec::new();
    for (name, env) in [("a", &[("COLOR", "red"), ("ONLY_A", "1")][..]), ("b", &[("COLOR", "blue \"\n")])] {
        supervisor.prepare_quiesce(soon()).unwrap();
        // Its callbacks are part of its identity, so the ack waits for them.
        assert_eq!(supervisor.before_thaw(), None);
        let identity = fork(&host, name, env);
        let after = supervisor.after_thaw(&identity);
        assert_eq!((after.failure, after.announce), (None, false));
        assert!(after.steps.iter().any(|step| step.name == "runtime.callbacks" && step.outcome == "ran-1"));
        let code = "[process.env.COLOR, process.env.OFFSHOOT_NAME, 'ONLY_A' in process.env, calls, \
            child_process.execSync('printenv COLOR').toString()]";
        seen.push(value(&supervisor, code));
    }
    assert_eq!(seen, [r#"["red","a",true,["a"],"red\n"]"#, r#"["blue \"\n","b",false,["a","b"],"blue \"\n\n"]"#]);
    // A callback that fails fails the fork.
    value(&supervisor, "offshootGuest.onIdentity(() => { throw new Error('no lease') }); 1");
    supervisor.prepare_quiesce(soon()).unwrap();
    let failure = supervisor.after_thaw(&fork(&host, "c", &[])).failure.unwrap();
    assert!(failure.contains("no lease"), "{failure}");
}

#[test]
fn node_finds_openssls_generators_and_seeds_its_own_as_published() {
    let (_host, supervisor) = warm_node("");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/node/randomness.js");
    value(&supervisor, &format!("var {{ MathRandom, OpenSsl }} = require('{file}'); var openssl = new OpenSsl(); 1"));
    // Each generator of this thread, and the primary, seeds itself at its next draw, and only then.
    let found = "crypto.generateKeyPairSync('x25519');
        const problem = openssl.prepare();
        const marked = () => openssl.places.filter((place) => openssl.forkId(place) !== process.pid).length;
        const [all, before] = [openssl.places.length, marked()];
        crypto.randomBytes(1);
        const public = marked();
        crypto.generateKeyPairSync('x25519');
        [problem, all >= 3, all - before, before - public, public - marked()]";
    assert_eq!(value(&supervisor, &found.replace("public", "drawn")), "[null,true,0,2,1]");
    // Only they: not what earlier searches have read, whose memory may be somebody else's by then.
    let again = "const found = new Set(); for (let i = 0; i < 5; i++) { openssl.prepare(); found.add(openssl.places.sort().join()); } found.size";
    assert_eq!(value(&supervisor, again), "1");
    // xoshiro128** from 1, 2, 3, 4 begins with 11520, 0, 5927040 and 70819200.
    let drawn = "const own = new MathRandom(); own.install(); own.own(1, 2, 3, 4);
        [Math.random() * 2 ** 53, Math.random() * 2 ** 53]";
    assert_eq!(value(&supervisor, drawn), format!("[{},{}]", 360_u64 << 26, (185_220_u64 << 26) + 1_106_550));
}
