//! Services and the bridge, as plain processes outside a guest.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use guest_api::proto::{OnFork, Runtime, Service};
use identity::{EnvName, ForkId, ForkIdentity, ForkName, Tag};

use super::{unit::NoLife, *};
use crate::{
    payload::Expected,
    workload::{Start, StartError, Workload},
};

mod node;

/// The agent's state, as far as the supervisor sees it.
#[derive(Debug)]
struct Host {
    workload: &'static Workload,
    identity: Mutex<Option<Arc<Identity>>>,
}

impl World for Arc<Host> {
    fn start(&self, start: Start) -> Result<Process, StartError> {
        self.workload.start(start)
    }

    fn environment(&self) -> BTreeMap<String, String> {
        let mut env: BTreeMap<String, String> = [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into();
        if let Some(identity) = self.identity() {
            env.insert("OFFSHOOT_NAME".into(), identity.fork.name.to_string());
        }
        env
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.lock().unwrap().clone()
    }

    fn set_recipe_environment(&self, _env: BTreeMap<String, String>) {}

    fn expected(&self) -> Option<Arc<Expected>> {
        None
    }

    fn complete(&self, fork: &ForkId, payload: Payload) -> io::Result<Option<Arc<Identity>>> {
        let mut identity = self.identity.lock().unwrap();
        let Some(before) = identity.as_ref().filter(|identity| identity.fork.id == *fork) else { return Ok(None) };
        let complete = Arc::new(Identity { payload: Some(payload), ..Identity::clone(before) });
        Ok(identity.insert(complete).clone().into())
    }
}

/// One reaper serves the whole process, as it does in a guest: it takes in every child there is.
fn supervisor() -> (Arc<Host>, Arc<Supervisor>) {
    static WORKLOAD: OnceLock<Workload> = OnceLock::new();
    let workload = WORKLOAD.get_or_init(|| Workload::bare().unwrap());
    let host = Arc::new(Host { workload, identity: Mutex::default() });
    (Arc::clone(&host), Arc::new(Supervisor::over(Arc::new(host))))
}

fn fork(host: &Host, name: &str, env: &[(&str, &str)]) -> Arc<Identity> {
    let identity = Arc::new(Identity {
        fork: ForkIdentity {
            id: ForkId::parse("0123456789abcdef0123").unwrap(),
            name: ForkName::parse(name).unwrap(),
            hostname: ForkName::parse(name).unwrap(),
            template: Tag::parse("t").unwrap(),
            machine_id: "0".repeat(32),
            boot_id: "00000000-0000-4000-8000-000000000000".into(),
        },
        labels: BTreeMap::new(),
        env: env.iter().map(|(name, value)| (EnvName::parse(name).unwrap(), (*value).to_owned())).collect(),
        limits: identity::Limits::default(),
        payload: Some(Payload::new()),
    });
    *host.identity.lock().unwrap() = Some(Arc::clone(&identity));
    identity
}

fn shell(name: &str, script: &str) -> Service {
    Service {
        name: name.into(),
        command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        start_in_template: true,
        timeout_ms: 10_000,
        ..Service::default()
    }
}

fn python(warm: &str) -> Runtime {
    let bridge = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/python/bridge.py");
    Runtime {
        command: vec!["/usr/bin/python3".into(), bridge.into()],
        env: [("OFFSHOOT_WARM".to_owned(), warm.to_owned())].into(),
        ready_timeout_ms: 60_000,
        event_timeout_ms: 20_000,
        ..Runtime::default()
    }
}

fn warm_python(warm: &str) -> (Arc<Host>, Arc<Supervisor>) {
    let (host, supervisor) = supervisor();
    let request = WarmRequest { runtime: Some(python(warm)), ..WarmRequest::default() };
    supervisor.warm(request, |_| ()).expect("python3 and python3-numpy must be installed; scripts/test does it");
    (host, supervisor)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn value(supervisor: &Supervisor, code: &str) -> String {
    let reply = supervisor.eval(code, 20_000);
    assert_eq!(reply.error, None, "{code}");
    reply.value_json
}

fn error(supervisor: &Supervisor, code: &str, timeout_ms: u32) -> EvalError {
    supervisor.eval(code, timeout_ms).error.expect("an error")
}

fn wait_for_log(supervisor: &Supervisor, source: &str, line: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut follower = supervisor.logs().follow();
    let wait = async {
        let mut seen = String::new();
        loop {
            while let Some((from, bytes)) = follower.take() {
                if from == source {
                    seen.push_str(&String::from_utf8_lossy(&bytes));
                }
            }
            if seen.contains(line) {
                return;
            }
            follower.changed().await.unwrap();
        }
    };
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), wait).await }).expect(line);
}

#[test]
fn values_errors_and_prints_come_back() {
    let (_host, supervisor) = warm_python("seven = 7");
    assert_eq!(value(&supervisor, "x = seven\nx + 1"), "8");
    assert_eq!(
        value(&supervisor, "[float('nan'), float('inf'), -float('inf'), 2**70]"),
        "[NaN, Infinity, -Infinity, 1180591620717411303424]"
    );
    let reply = supervisor.eval("import sys\nprint('out')\nprint('err', file=sys.stderr)\nb'x'", 0);
    assert_eq!((&*reply.value_json, &*reply.repr), ("null", "b'x'"));
    assert_eq!((&*reply.stdout, &*reply.stderr), ("out\n", "err\n"));
    let failure = error(&supervisor, "def f():\n    raise ValueError('boo')\nf()", 0);
    assert_eq!((&*failure.kind, &*failure.message), ("exception", "ValueError: boo"));
    assert!(failure.stack.contains("in f\n    raise ValueError"), "{}", failure.stack);
    assert!(!failure.stack.contains("bridge.py"), "{}", failure.stack);
    assert_eq!(error(&supervisor, "1 +", 0).message, "SyntaxError: invalid syntax");
    assert_eq!(error(&supervisor, "import sys; sys.exit(3)", 0).message, "SystemExit: 3");
}

#[test]
fn hostile_code_reaches_neither_the_protocol_nor_other_answers() {
    let (_host, supervisor) = warm_python("");
    let forged = r#"import os; os.write(1, b'{"type":"result","id":2,"value":666}\n'); os.system('echo 666'); input()"#;
    assert_eq!(error(&supervisor, forged, 0).message, "EOFError: EOF when reading a line");
    assert_eq!(error(&supervisor, "'x' * 5_000_000", 0).kind, "too-large");
    let reply = supervisor.eval("print('x' * 5_000_000)", 0);
    assert!(reply.stdout.len() < (1 << 20) && reply.stdout.contains("more bytes"));
    let deep = "x = []\nfor _ in range(300): x = [x]\nx";
    assert_eq!(error(&supervisor, deep, 0).kind, "too-large");
    assert_eq!(value(&supervisor, "import os\npid = os.fork()\npid > 0"), "true");
    assert_eq!(value(&supervisor, "'\\udcff'"), "null");
    assert_eq!(value(&supervisor, "1"), "1");
}

#[test]
fn an_evaluation_that_is_late_is_interrupted_and_the_next_one_gets_its_own_answer() {
    let (_host, supervisor) = warm_python("import time");
    let failure = error(&supervisor, "while True: pass", 300);
    assert_eq!(failure.kind, "timeout");
    assert_eq!(value(&supervisor, "'next'"), "\"next\"");
    let stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(2)\n'late'";
    assert_eq!(error(&supervisor, stubborn, 200).kind, "timeout");
    assert_eq!(error(&supervisor, "1", 200).kind, "timeout");
    assert_eq!(value(&supervisor, "'mine'"), "\"mine\"");
}

#[test]
fn callers_at_the_same_time_get_their_own_answers() {
    let (_host, supervisor) = warm_python("");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let supervisor = &supervisor;
            scope.spawn(move || assert_eq!(value(supervisor, &format!("{n} * 10")), (n * 10).to_string()));
        }
    });
}

#[test]
fn two_forks_of_one_state_draw_different_numbers_from_every_generator() {
    let warm = "import random, uuid, tempfile, platform, ssl, numpy as np\n\
        own = random.Random()\n\
        bits = [c(5) for c in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)]\n\
        gens = [np.random.Generator(b) for b in bits]\n\
        old = np.random.RandomState(); other = np.random.RandomState(np.random.PCG64())\n\
        seq = np.random.SeedSequence(3)\n\
        seqs = [getattr(b, 'seed_seq', None) or b._seed_seq for b in bits]";
    // The state at the capture, the same each time. Normal deviates come in pairs, and the second one is kept.
    let seed = "random.seed(1); own.seed(1); np.random.seed(1); old.seed(2)\n\
        for n, b in enumerate(bits + [other._bit_generator]): b.state = type(b)(n).state\n\
        for n, s in enumerate([seq] + seqs): s.__init__(n)\n\
        for f in (random.gauss, own.gauss, np.random.normal, old.normal, other.normal): f(0, 1)\n\
        uuid._generate_time_safe = None; uuid._node = 1; uuid._last_timestamp = None";
    let draw = "[random.gauss(0, 1), own.gauss(0, 1), np.random.normal(), old.normal(), other.normal()] \
        + [random.random(), own.random(), np.random.random(), old.random(), other.random()] \
        + [g.random() for g in gens] + [int(s.spawn(1)[0].generate_state(1)[0]) for s in [seq] + seqs] \
        + [str(uuid.uuid1())[-12:], next(tempfile._get_candidate_names())]";
    let draws = |become_fork: bool| {
        let (host, supervisor) = warm_python(warm);
        // Quiesce rehearses the event, which must not hide that the event itself does nothing: seed after it.
        supervisor.prepare_quiesce(soon()).unwrap();
        supervisor.abandon_quiesce();
        value(&supervisor, seed);
        if become_fork {
            let identity = fork(&host, "a", &[]);
            let after = supervisor.after_thaw(&identity);
            assert_eq!(after.failure, None);
            let steps: Vec<_> = after.steps.iter().map(|step| (&*step.name, &*step.outcome)).collect();
            assert!(steps.contains(&("runtime.numpy", "reseeded-7")), "{steps:?}");
            assert!(steps.contains(&("runtime.openssl", "stirred")), "{steps:?}");
        }
        let drawn: Vec<serde_json::Value> = serde_json::from_str(&value(&supervisor, draw)).unwrap();
        drawn
    };
    let (first, second) = (draws(true), draws(true));
    for (index, (a, b)) in first.iter().zip(&second).enumerate() {
        assert_ne!(a, b, "draw {index}");
    }
    // Without the event they are the same, but for the names of temporary files, which Python seeds by itself: the test
    // can fail.
    let (mut first, mut second) = (draws(false), draws(false));
    first.pop();
    second.pop();
    assert_eq!(first, second);
}

#[test]
fn a_fork_has_its_own_environment_and_loses_the_one_before() {
    let (host, supervisor) = warm_python(
        "import os, offshoot_guest\noffshoot_guest.on_identity(lambda fork: calls.append(fork['name']))\ncalls = []",
    );
    let mut seen = Vec::new();
    for (name, env) in [("a", &[("COLOR", "red"), ("ONLY_A", "1")][..]), ("b", &[("COLOR", "blue \"\n")])] {
        supervisor.prepare_quiesce(soon()).unwrap();
        let identity = fork(&host, name, env);
        assert_eq!(supervisor.after_thaw(&identity).failure, None);
        seen.push(value(
            &supervisor,
            "[os.environ[k] for k in ('COLOR', 'OFFSHOOT_NAME')] + [os.environ.get('ONLY_A'), calls]",
        ));
    }
    assert_eq!(seen, [r#"["red", "a", "1", ["a"]]"#, r#"["blue \"\n", "b", null, ["a", "b"]]"#]);
}

#[test]
fn a_frozen_runtimes_generators_are_filled_in_place_and_its_environment_is_there_before_the_event() {
    let (host, supervisor) = warm_python(
        "import os, random, numpy\nrandom.seed(1)\nnumpy.random.seed(1)\n\
         generator, keeper = numpy.random.default_rng(1), numpy.random.RandomState(1)",
    );
    let draw = "[random.random(), numpy.random.random(), float(generator.random()), keeper.normal()]";
    let mut draws = Vec::new();
    for name in ["a", "b"] {
        value(&supervisor, "[random.seed(1), numpy.random.seed(1), keeper.seed(1)] and None");
        supervisor.prepare_quiesce(soon()).unwrap();
        assert_eq!(supervisor.before_thaw(), Some("filled"));
        let identity = fork(&host, name, &[("COLOR", "red")]);
        let after = supervisor.after_thaw(&identity);
        assert_eq!((after.failure, after.announce), (None, true));
        let early = error(&supervisor, "1", 100);
        assert_eq!(early.kind, "timeout", "no request comes before it is told");
        supervisor.after_ack(&identity);
        let outcomes: Vec<_> = after.steps.iter().map(|step| (step.name.as_str(), step.outcome.as_str())).collect();
        assert!(outcomes.contains(&("runtime.environ", "set")), "{outcomes:?}");
        assert_eq!(
            value(&supervisor, "[os.environ['COLOR'], os.environ['OFFSHOOT_NAME']]"),
            format!(r#"["red", "{name}"]"#)
        );
        draws.push(value(&supervisor, draw));
    }
    let fields = |draw: &String| draw.split(", ").map(ToOwned::to_owned).collect::<Vec<_>>();
    for (a, b) in fields(&draws[0]).iter().zip(&fields(&draws[1])) {
        assert_ne!(a, b);
    }
    // Filled once: without a new quiesce there is nothing to fill.
    assert_eq!(supervisor.before_thaw(), None);
}

#[test]
fn whoever_looks_at_the_environment_before_the_event_finds_the_forks() {
    let files = std::env::temp_dir().join(format!("offshoot-identity-files-{}", std::process::id()));
    let (_host, supervisor) = warm_python("import os, sys, threading, time");
    let watch = format!(
        "sys._getframe(1).f_globals['IDENTITY_FILES'] = {files:?}\nseen = []\ndef look():\n    \
         while os.environ.get('OFFSHOOT_NAME') != 'early':\n        time.sleep(0.01)\n    \
         seen.append([os.environ['COLOR'], type(os.environ._data).__name__, os.getenv('OFFSHOOT_ID')])\n\
         os.environ['COLOR'] = 'template'\nlooker = threading.Thread(target=look, daemon=True)\nlooker.start()"
    );
    value(&supervisor, &watch);
    supervisor.prepare_quiesce(soon()).unwrap();
    std::fs::create_dir_all(files.join("env")).unwrap();
    for (name, content) in [("env/COLOR", "red"), ("id", "x"), ("name", "early"), ("hostname", "h"), ("template", "t")]
    {
        std::fs::write(files.join(name), content).unwrap();
    }
    // There is no event: what the thread finds stands in the files.
    supervisor.abandon_quiesce();
    let seen = value(&supervisor, "looker.join(10)\nseen");
    std::fs::remove_dir_all(&files).unwrap();
    assert_eq!(seen, r#"[["red", "dict", "x"]]"#);
}

#[test]
fn a_runtime_that_fails_an_identity_it_was_only_told_of_answers_nothing_more() {
    let (host, supervisor) = warm_python("import random");
    supervisor.prepare_quiesce(soon()).unwrap();
    assert_eq!(supervisor.before_thaw(), Some("filled"));
    // What is set by then makes the event fail.
    let identity = fork(&host, "a", &[("A", "\u{0}")]);
    assert_eq!(supervisor.after_thaw(&identity).failure, None);
    supervisor.after_ack(&identity);
    let failure = error(&supervisor, "1", 0);
    assert_eq!(failure.kind, "runtime-died");
    assert!(failure.message.contains("its identity: ValueError: embedded null byte"), "{}", failure.message);
}

#[test]
fn a_dying_runtime_says_its_last_words_and_comes_back_if_it_may() {
    let (_host, supervisor) = supervisor();
    let request =
        WarmRequest { runtime: Some(Runtime { restart: "on-failure".into(), ..python("") }), ..WarmRequest::default() };
    supervisor.warm(request, |_| ()).unwrap();
    let failure = error(&supervisor, "import os, sys; os.write(2, b'last words\\n'); os._exit(3)", 0);
    assert_eq!(failure.kind, "runtime-died");
    assert!(failure.message.contains("exit code 3") && failure.message.contains("last words"), "{}", failure.message);
    wait_for_log(&supervisor, "runtime", "starting it again");
    let deadline = soon();
    while supervisor.eval("1", 20_000).value_json != "1" {
        assert!(Instant::now() < deadline, "the runtime did not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_warm_up_that_fails_is_an_error_with_its_output() {
    let (_host, supervisor) = supervisor();
    let request = WarmRequest { runtime: Some(python("raise ImportError('no such thing')")), ..WarmRequest::default() };
    let error = supervisor.warm(request, |_| ()).unwrap_err().to_string();
    assert!(error.contains("exit code 1") && error.contains("ImportError: no such thing"), "{error}");
}

#[test]
fn no_evaluation_starts_between_quiesce_and_identity() {
    let (host, supervisor) = warm_python("");
    supervisor.prepare_quiesce(soon()).unwrap();
    assert_eq!(error(&supervisor, "1", 100).kind, "timeout");
    supervisor.abandon_quiesce();
    assert_eq!(value(&supervisor, "1"), "1");
    supervisor.prepare_quiesce(soon()).unwrap();
    std::thread::scope(|scope| {
        let (sender, waiting) = std::sync::mpsc::channel();
        let supervisor = &supervisor;
        let of_template = scope.spawn(move || {
            sender.send(()).unwrap();
            supervisor.eval("open('/dev/null'); leaked = 1", 3_000)
        });
        waiting.recv().unwrap();
        // It may not have reached the gate yet: then it counts as the fork's, and that is right too.
        let identity = fork(&host, "a", &[]);
        supervisor.after_thaw(&identity);
        let _ = of_template.join().unwrap();
    });
    assert_eq!(value(&supervisor, "2"), "2");
}

#[test]
fn services_start_in_order_and_are_told_in_a_fork() {
    let (host, supervisor) = supervisor();
    let told = |name: &str, on_fork: OnFork, script: &str| Service {
        on_fork: on_fork.into(),
        ready_line: "ready".into(),
        ..shell(name, script)
    };
    // It waits in the shell itself: while dash starts a command (by vfork) a signal to it is lost.
    let wait = "trap 'echo hup' HUP; echo ready as $OFFSHOOT_NAME; (trap '' HUP; exec sleep 100) & wait; wait";
    let command = ["/usr/bin/python3", "-c", LISTENER].map(str::to_owned).into();
    let services = vec![
        Service { start_in_template: false, ..told("late", OnFork::Keep, "echo ready as $OFFSHOOT_NAME; sleep 100") },
        Service { command, ready_line: "listening".into(), ..told("told", OnFork::Event, "") },
        told("kept", OnFork::Keep, wait),
        Service { signal: "HUP".into(), ..told("signalled", OnFork::Signal, wait) },
        told("restarted", OnFork::Restart, wait),
        Service {
            hook: ["/bin/sh", "-c", "echo hook of $OFFSHOOT_NAME"].map(str::to_owned).into(),
            ..told("hooked", OnFork::Hook, wait)
        },
    ];
    let mut progress = Vec::new();
    supervisor.warm(WarmRequest { services, ..WarmRequest::default() }, |line| progress.push(line)).unwrap();
    let order: Vec<_> = progress.iter().map(|line| line.split(' ').nth(1).unwrap()).collect();
    assert_eq!(order, ["told", "kept", "signalled", "restarted", "hooked"]);
    supervisor.prepare_quiesce(soon()).unwrap();
    let identity = fork(&host, "a", &[("REGION", "eu")]);
    let after = supervisor.after_thaw(&identity);
    assert_eq!(after.failure, None);
    let steps: Vec<_> = after.steps.iter().map(|step| format!("{}:{}", step.name, step.outcome)).collect();
    let expected = [
        "service.told:told",
        "service.signalled:signalled-HUP",
        "service.restarted:restarted",
        "service.hooked:hook-ran",
        "service.late:started",
    ];
    assert_eq!(steps, expected);
    wait_for_log(&supervisor, "signalled", "hup");
    wait_for_log(&supervisor, "restarted", "ready as a");
    wait_for_log(&supervisor, "hooked", "hook of a");
    wait_for_log(&supervisor, "late", "ready as a");
    wait_for_log(&supervisor, "told", "told that it is a in eu");
    let mut follower = supervisor.logs().follow();
    while let Some((source, bytes)) = follower.take() {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(!text.contains("ready as \n"), "{source} shows the template's lines: {text}");
    }
    for unit in supervisor.parts().0 {
        unit.stop().unwrap();
    }
}

/// A service that is told in-process, and says so.
const LISTENER: &str = "
import json, os, socket
events = socket.socket(fileno=int(os.environ['OFFSHOOT_EVENT_FD'])).makefile('rw')
print('listening', flush=True)
for line in events:
    event = json.loads(line)
    answer = {'type': 'done', 'id': event['id']}
    match event['env'].get('MOOD'):
        case 'sour': answer = {'type': 'error', 'id': event['id'], 'message': 'not today'}
        case 'deaf': continue
        case 'gone': raise SystemExit('I am off')
        case _: print('told that it is', event['fork']['name'], 'in', event['env'].get('REGION'), flush=True)
    print(json.dumps(answer), file=events, flush=True)
";

#[test]
fn i13_a_service_that_does_not_take_its_event_fails_the_fork() {
    for (mood, expected) in [
        ("sour", "failed its identity event: not today"),
        ("deaf", "did not answer its identity event in time"),
        ("gone", "before it answered its identity event"),
    ] {
        let (host, supervisor) = supervisor();
        let service = Service {
            command: ["/usr/bin/python3", "-c", LISTENER].map(str::to_owned).into(),
            on_fork: OnFork::Event.into(),
            ready_line: "listening".into(),
            timeout_ms: 2000,
            ..shell("told", "")
        };
        supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ()).unwrap();
        supervisor.prepare_quiesce(soon()).unwrap();
        let failure = supervisor.after_thaw(&fork(&host, "a", &[("MOOD", mood)])).failure.unwrap();
        assert!(failure.contains(expected), "{mood}: {failure}");
        supervisor.parts().0[0].stop().unwrap();
    }
}

#[test]
fn i13_until_its_payload_is_there_a_service_waits_or_is_stopped() {
    let (host, supervisor) = supervisor();
    let services = vec![
        Service { start_in_template: false, ready_line: "ready".into(), ..shell("late", "echo ready; sleep 100") },
        Service {
            on_fork: OnFork::Restart.into(),
            ready_line: "ready".into(),
            ..shell("again", "echo ready; sleep 100")
        },
        Service {
            on_fork: OnFork::Hook.into(),
            hook: ["/bin/sh", "-c", "echo hook"].map(str::to_owned).into(),
            hook_before_thaw: true,
            ..shell("hooked", "sleep 100")
        },
    ];
    supervisor.warm(WarmRequest { services, ..WarmRequest::default() }, |_| ()).unwrap();
    supervisor.prepare_quiesce(soon()).unwrap();
    let complete = fork(&host, "a", &[]);
    let identity = Arc::new(Identity { payload: None, ..Identity::clone(&complete) });
    *host.identity.lock().unwrap() = Some(Arc::clone(&identity));
    let told = |steps: &[Step]| steps.iter().map(|step| format!("{}:{}", step.name, step.outcome)).collect::<Vec<_>>();
    assert_eq!(told(&supervisor.hooks_before_thaw().unwrap()), ["service.hooked:hook-ran-before-thaw"]);
    let after = supervisor.after_thaw(&identity);
    assert_eq!(told(&after.steps), ["service.again:stopped", "service.late:waits"]);
    let steps = supervisor.complete(&identity.fork.id, Payload::new(), soon()).unwrap();
    assert_eq!(told(&steps), ["service.again:restarted", "service.hooked:hook-ran", "service.late:started"]);
    assert_eq!(supervisor.complete(&identity.fork.id, Payload::new(), soon()).unwrap(), []);
    for unit in supervisor.parts().0 {
        unit.stop().unwrap();
    }
}

#[test]
fn a_fork_does_not_wait_for_what_is_not_awaited() {
    let (host, supervisor) = supervisor();
    let slow = Service { start_in_template: false, ready_line: "never".into(), ..shell("slow", "sleep 100") };
    let services = vec![Service { not_awaited: true, ..slow.clone() }];
    supervisor.warm(WarmRequest { services, ..WarmRequest::default() }, |_| ()).unwrap();
    assert_eq!(supervisor.after_thaw(&fork(&host, "a", &[])).failure, None);
    supervisor.parts().0[0].stop().unwrap();

    let (host, supervisor) = self::supervisor();
    let services = vec![Service { timeout_ms: 300, ..slow }];
    supervisor.warm(WarmRequest { services, ..WarmRequest::default() }, |_| ()).unwrap();
    let failure = supervisor.after_thaw(&fork(&host, "a", &[])).failure.unwrap();
    assert!(failure.contains("did not write"), "{failure}");
    supervisor.parts().0[0].stop().unwrap();
}

#[test]
fn a_failing_hook_fails_the_fork_and_an_early_end_fails_the_build() {
    let (host, supervisor) = supervisor();
    let hook = ["/bin/sh", "-c", "echo no luck; exit 7"].map(str::to_owned).into();
    let service = Service { on_fork: OnFork::Hook.into(), hook, ..shell("web", "sleep 100") };
    supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ()).unwrap();
    supervisor.prepare_quiesce(soon()).unwrap();
    let identity = fork(&host, "a", &[]);
    let failure = supervisor.after_thaw(&identity).failure.unwrap();
    assert!(failure.contains("exit code 7") && failure.contains("no luck"), "{failure}");
    supervisor.parts().0[0].stop().unwrap();

    let (_host, supervisor) = self::supervisor();
    let service = Service { ready_line: "up".into(), ..shell("web", "echo broken config; exit 2") };
    let error = supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("exit code 2") && error.contains("broken config"), "{error}");
}

#[test]
fn a_service_that_dies_is_started_again_as_its_recipe_says() {
    let (_host, supervisor) = supervisor();
    let service = Service { restart: "on-failure".into(), ..shell("web", "echo hello; sleep 0.05; exit 1") };
    supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ()).unwrap();
    wait_for_log(&supervisor, "web", "starting it again\nhello\n");
    supervisor.parts().0[0].stop().unwrap();
}

#[test]
fn a_service_that_was_ended_meanwhile_is_not_started_again() {
    let (_host, supervisor) = supervisor();
    let service = Service { restart: "always".into(), ..shell("web", "echo hello; exec sleep 100") };
    supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ()).unwrap();
    let unit = Arc::clone(&supervisor.parts().0[0]);
    // Whoever minds its life, which is the second after the stop before the first start, has paused, and looked, and is about to start the next one.
    unit.stop().unwrap();
    assert!(matches!(unit.launch(Some(2)), Err(NoLife::Superseded)));
    assert!(unit.signal(rustix::process::Signal::USR1).is_err(), "nothing runs");
    let life = unit.launch(Some(3)).unwrap();
    assert!(matches!(unit.launch(Some(3)), Err(NoLife::Superseded)));
    drop(life);
    unit.stop().unwrap();
}

#[test]
fn f1_a_service_that_ends_while_it_warms_up_is_tried_again_as_its_recipe_says() {
    let dir = tempfile::tempdir().unwrap();
    let marks = dir.path().join("marks");
    let script = format!("echo x >> {0}; [ $(wc -l < {0}) -ge 3 ] || exit 1; echo up; exec sleep 100", marks.display());
    let warm = |restart: &str| {
        let _ = std::fs::remove_file(&marks);
        let (_host, supervisor) = supervisor();
        let service = Service { restart: restart.into(), ready_line: "up".into(), ..shell("web", &script) };
        let warmed = supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ());
        supervisor.parts().0[0].stop().unwrap();
        (warmed.is_ok(), std::fs::read_to_string(&marks).unwrap().lines().count())
    };
    assert_eq!(warm("never"), (false, 1));
    assert_eq!(warm("on-failure"), (true, 3));
}

#[test]
fn f9_a_service_whose_limit_can_not_be_given_is_not_run() {
    let (_host, supervisor) = supervisor();
    let limits = Some(guest_api::proto::Limits { pids: 8, ..guest_api::proto::Limits::default() });
    let service = Service { limits, ..shell("web", "echo it runs; sleep 100") };
    let error = supervisor.warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the limits of cgroup service-web could not be set"), "{error}");
    assert_eq!(supervisor.logs().position("web"), 0);
}

#[test]
fn bad_recipes_are_refused_by_name() {
    let refused = |service: Service| {
        let (_host, supervisor) = supervisor();
        supervisor
            .warm(WarmRequest { services: vec![service], ..WarmRequest::default() }, |_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(refused(shell("../x", "")).contains("service name"));
    assert!(refused(Service { command: vec![], ..shell("a", "") }).contains("command of service a"));
    assert!(refused(Service { on_fork: OnFork::Signal.into(), ..shell("a", "") }).contains("signal of service a"));
    assert!(refused(Service { on_fork: OnFork::Hook.into(), ..shell("a", "") }).contains("hook of service a"));
    assert!(refused(Service { restart: "often".into(), ..shell("a", "") }).contains("restart of service a"));
    let (_host, supervisor) = supervisor();
    assert_eq!(supervisor.eval("1", 0).error.unwrap().kind, "no-runtime");
}
