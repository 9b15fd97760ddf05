//! Who may do what over the API, and what was tried against it. SECURITY.md names these tests.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::Command,
    time::{Duration, Instant},
};

use offshoot_tests::{
    Bench, Daemon, Kind,
    daemon::{Answer, ask, ask_tcp, free_port},
};
use serde_json::{Value, json};

/// A daemon on loopback besides, and a token of each scope.
fn with_tokens(bench: &Bench) -> (Daemon, u16, [String; 3]) {
    let daemon = Daemon::start(bench, &["--listen", "127.0.0.1:0"]);
    let port = daemon.port();
    let token = |scope: &str| {
        let made = bench.offshoot(&["token", "create", scope, "--scope", scope]).ok().json();
        made["token"].as_str().unwrap().to_owned()
    };
    (daemon, port, ["read", "fork", "admin"].map(token))
}

fn with(port: u16, token: &str, method: &str, path: &str, body: &Value) -> Answer {
    let head = [&format!("Authorization: Bearer {token}"), "Content-Type: application/json"];
    ask_tcp(port, method, path, &head, body.to_string().as_bytes()).unwrap()
}

/// Every route of the document, with something for each parameter.
fn routes(daemon: &Daemon) -> Vec<(String, String)> {
    let document = daemon.get("/openapi.json").expect(200).json();
    let mut routes = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = ["{tag}", "{fork}", "{job}", "{id}"].iter().fold(path.clone(), |path, name| path.replace(name, "x"));
        routes.extend(methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone())));
    }
    assert!(routes.len() > 25, "{routes:?}");
    routes
}

#[test]
fn o1_nothing_but_health_is_answered_without_a_token_over_tcp() {
    let bench = Bench::new();
    let (daemon, port, [read, ..]) = with_tokens(&bench);
    for (method, path) in routes(&daemon) {
        let open = path == "/healthz" || path == "/readyz";
        let without = ask_tcp(port, &method, &path, &[], b"").unwrap();
        if open {
            assert_eq!(without.status, 200, "{path}");
            continue;
        }
        without.refused(401, "unauthorized");
        for wrong in [
            "Bearer",
            "Bearer x",
            "Basic eDp4",
            &format!("Bearer {}x", read),
            &format!("Bearer {}", &read[..read.len() - 1]),
        ] {
            let answer = ask_tcp(port, &method, &path, &[&format!("Authorization: {wrong}")], b"").unwrap();
            assert_eq!(answer.status, 401, "{method} {path} with {wrong}");
        }
    }
    // The check can fail: with the token it is answered.
    assert_eq!(with(port, &read, "GET", "/v1/forks", &Value::Null).status, 200);
    drop(daemon);
    bench.end();
}

#[test]
fn o1_a_scope_allows_what_it_says_and_no_more() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let (daemon, port, [read, fork, admin]) = with_tokens(&bench);
    let body = json!({"template": template.tag, "count": 2});
    with(port, &read, "POST", "/v1/forks", &body).refused(403, "forbidden");
    let made = with(port, &fork, "POST", "/v1/forks", &body).expect(201).json();
    let id = made["results"][0]["fork"]["id"].as_str().unwrap();
    for path in ["exec", "eval", "standby", "resume"] {
        with(port, &read, "POST", &format!("/v1/forks/{id}/{path}"), &json!({})).refused(403, "forbidden");
    }
    with(port, &read, "GET", &format!("/v1/forks/{id}/files?path=/etc/shadow"), &Value::Null).refused(403, "forbidden");
    with(port, &read, "GET", &format!("/v1/forks/{id}/ports/80"), &Value::Null).refused(403, "forbidden");
    with(port, &read, "DELETE", &format!("/v1/forks/{id}"), &Value::Null).refused(403, "forbidden");
    assert_eq!(with(port, &read, "GET", &format!("/v1/forks/{id}"), &Value::Null).status, 200);
    for (method, path) in
        [("DELETE", "/v1/templates/x"), ("POST", "/v1/templates"), ("PUT", "/v1/pools/x"), ("GET", "/v1/tokens")]
    {
        with(port, &fork, method, path, &json!({})).refused(403, "forbidden");
    }
    let tokens = with(port, &admin, "GET", "/v1/tokens", &Value::Null).expect(200);
    assert!(!tokens.text().contains(&read[20..]), "a token is shown once");
    // Revoked by the command line, it ends at once.
    let listed = tokens.json();
    // Other tests have tokens here as well.
    let id = fork.split('_').nth(1).unwrap();
    assert!(listed["tokens"].as_array().unwrap().iter().any(|token| token["id"] == id && token["name"] == "fork"));
    let _ = bench.offshoot(&["token", "rm", id]).ok();
    with(port, &fork, "GET", "/v1/forks", &Value::Null).refused(401, "unauthorized");
    drop(daemon);
    bench.end();
}

#[test]
fn o1_each_request_is_in_the_audit_of_whom_it_was_and_no_secret_is() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    let (daemon, port, [_, fork, _]) = with_tokens(&bench);
    let body = json!({"template": template.tag, "secrets": {"KEY": "hunter2-secret"}, "env": {"A": "hunter2-env"}, "count": 2});
    let _ = with(port, &fork, "POST", "/v1/forks", &body).expect(201);
    with(port, &fork, "GET", "/v1/tokens?hunter2-query", &Value::Null).refused(403, "forbidden");
    let _ = ask_tcp(port, "GET", "/v1/forks", &["Authorization: Bearer hunter2-token"], b"").unwrap();
    let _ = daemon.get("/v1/forks");
    let dir = bench.data().join("api/audit");
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
    let of_token = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let of_token: Vec<String> = of_token.filter(|name| name.starts_with("token-")).collect();
    assert_eq!(of_token.len(), 1);
    let lines: Vec<Value> = read(&of_token[0]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        lines.iter().map(|line| (line["path"].as_str().unwrap(), line["status"].as_u64().unwrap())).collect::<Vec<_>>(),
        [("/v1/forks", 201), ("/v1/tokens", 403)]
    );
    assert_eq!((&lines[0]["name"], &lines[1]["code"]), (&"fork".into(), &"forbidden".into()));
    assert!(read("nobody.jsonl").contains("unauthorized") && read("uid-0.jsonl").contains("/v1/forks"));
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        assert!(!fs::read_to_string(&path).unwrap().contains("hunter2"), "{}", path.display());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o77, 0);
    }
    assert!(!daemon.said().concat().contains("hunter2"));
    drop(daemon);
    bench.end();
}

#[test]
fn o1_the_socket_belongs_to_its_user_and_others_have_the_scope_that_was_given() {
    let bench = Bench::new();
    let state = bench.state().to_owned();
    let mut daemon = Daemon::start(&bench, &[]);
    let socket = state.join("api/offshoot.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(state.join("api")).unwrap().permissions().mode() & 0o77, 0);
    assert!(daemon.end().success());
    assert!(!socket.exists(), "a daemon that has ended leaves no socket");

    // Somebody else, let in by the socket's mode, may do what --socket-scope says.
    let open = tempfile::tempdir().unwrap();
    fs::set_permissions(open.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let place = open.path().join("s");
    let place = place.to_str().unwrap();
    let daemon = Daemon::start(&bench, &["--socket", place, "--socket-mode", "0666", "--socket-scope", "read"]);
    let asked = |method: &str, path: &str| {
        let perl = format!(
            "my $s = IO::Socket::UNIX->new(Peer => '{place}') or die $!; print $s \"{method} {path} HTTP/1.0\\r\\n\\r\\n\"; print((split ' ', <$s>)[1])"
        );
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-MIO::Socket::UNIX", "-e", &perl])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(asked("GET", "/v1/forks"), "200");
    assert_eq!(asked("DELETE", "/v1/forks/x"), "403");
    let stream = UnixStream::connect(place).unwrap();
    ask(stream, "DELETE", "/v1/forks/x", &[], b"").unwrap().refused(404, "fork_not_found");
    drop(daemon);
    bench.end();
}

#[test]
fn o1_from_elsewhere_only_with_tls() {
    let bench = Bench::new();
    let refused = bench.offshoot(&["serve", "--listen", "0.0.0.0:0"]).exits(2);
    refused.refused("tls_needed");
    let dir = tempfile::tempdir().unwrap();
    let [cert, key] = ["c.pem", "k.pem"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    fs::write(&cert, "no certificate").unwrap();
    let args = ["serve", "--listen", "127.0.0.1:0", "--tls-cert", &cert, "--tls-key", &key];
    bench.offshoot(&args).exits(1).refused("tls_unusable");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", &key, "-out", &cert])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let daemon = Daemon::start(&bench, &["--listen", &listen, "--tls-cert", &cert, "--tls-key", &key]);
    let client = |request: &str| {
        let mut child = Command::new("openssl")
            .args([
                "s_client",
                "-connect",
                &listen,
                "-CAfile",
                &cert,
                "-verify_return_error",
                "-servername",
                "localhost",
                "-quiet",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        let _ = child.stdout.take().unwrap().read_to_string(&mut text);
        drop(stdin);
        let _ = child.wait();
        text
    };
    assert!(client("GET /healthz HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 200"));
    assert!(client("GET /v1/forks HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 401"));
    assert!(ask_tcp(port, "GET", "/healthz", &[], b"").is_err(), "without TLS nobody answers");
    drop(daemon);
    bench.end();
}

#[test]
fn o1_a_token_that_asks_too_often_is_told_to_wait_and_another_is_not() {
    let bench = Bench::new();
    let daemon = Daemon::start(&bench, &["--listen", "127.0.0.1:0", "--rate", "5"]);
    let port = daemon.port();
    let token = |name: &str| {
        let made = bench.offshoot(&["token", "create", name, "--scope", "read"]).ok().json();
        made["token"].as_str().unwrap().to_owned()
    };
    let (hasty, other) = (token("hasty"), token("other"));
    let statuses: Vec<u16> = (0..40).map(|_| with(port, &hasty, "GET", "/v1/version", &Value::Null).status).collect();
    assert!(statuses[..5].iter().all(|status| *status == 200) && statuses.contains(&429), "{statuses:?}");
    let refused =
        (0..40).map(|_| with(port, &hasty, "GET", "/v1/version", &Value::Null)).find(|answer| answer.status == 429);
    assert_eq!(refused.unwrap().headers["retry-after"], "1");
    assert_eq!(with(port, &other, "GET", "/v1/version", &Value::Null).status, 200);
    assert_eq!(daemon.get("/v1/version").status, 200, "the local user is not counted");
    drop(daemon);
    bench.end();
}

#[test]
fn o1_hostile_bytes_cost_their_sender_only() {
    let bench = Bench::new();
    let daemon = Daemon::start(&bench, &[]);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100_000));
    let raw: [&[u8]; 7] = [
        b"\x00\xff\xfe",
        b"GET /v1/forks HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/forks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"GET /v1/forks/%2e%2e%2f%2e%2e%2fetc HTTP/1.0\r\n\r\n",
        b"GET /v1/forks/%00 HTTP/1.0\r\n\r\n",
        long.as_bytes(),
        many.as_bytes(),
    ];
    for bytes in raw {
        let mut stream = daemon.connect();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let _ = stream.write_all(bytes);
        let mut answer = vec![0; 256];
        let count = stream.read(&mut answer).unwrap_or(0);
        let text = String::from_utf8_lossy(&answer[..count]).into_owned();
        // Closed without an answer, or refused.
        let refused = ["HTTP/1.1 4", "HTTP/1.0 4"].iter().any(|begin| text.starts_with(begin));
        assert!(count == 0 || refused, "{text}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    daemon
        .request("POST", "/v1/forks", &["Content-Type: application/json"], deep.as_bytes())
        .refused(400, "invalid_request");
    // Half a head: who stalls is sent away, and does not hold up others.
    let mut slow = daemon.connect();
    slow.write_all(b"GET /v1/forks HTTP/1.1\r\nHost:").unwrap();
    let begun = Instant::now();
    assert_eq!(daemon.get("/v1/version").status, 200);
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(begun.elapsed() < Duration::from_secs(60), "the connection is closed");
    assert_eq!(daemon.get("/healthz").status, 200);
    drop(daemon);
    bench.end();
}

#[test]
fn o1_pages_bring_nothing_from_elsewhere() {
    let bench = Bench::new();
    let (daemon, port, _) = with_tokens(&bench);
    let page = ask_tcp(port, "GET", "/docs", &[], b"").unwrap().expect(200);
    assert!(page.headers["content-security-policy"].contains("default-src 'none'"));
    for path in ["/docs", "/docs/page.js", "/docs/page.css"] {
        let text = ask_tcp(port, "GET", path, &[], b"").unwrap().expect(200).text();
        assert!(!text.contains("http://") && !text.contains("https://") && !text.contains("innerHTML"), "{path}");
    }
    let document = ask_tcp(port, "GET", "/openapi.json", &[], b"").unwrap().expect(200).json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let _ = TcpStream::connect(("127.0.0.1", port));
    drop(daemon);
    bench.end();
}
