#![allow(clippy::unwrap_used)]

use clap::{CommandFactory, error::ErrorKind};

use super::*;

fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([&["offshoot"], line].concat())
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn t3_bad_tags_are_refused_by_every_verb_that_takes_one() {
    let long = "a".repeat(65);
    for tag in ["../x", "/etc", "", "-", "a/b", "a b", ".hidden", long.as_str()] {
        let verbs: [&[&str]; 6] = [
            &["build", "python", "--tag", tag],
            &["rmi", tag],
            &["mailboxes", tag],
            &["fork", tag],
            &["verify", tag],
            &["bench", tag],
        ];
        for line in verbs {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{line:?}");
            assert!(error.to_string().contains("a tag is 1 to 64"), "{error}");
        }
    }
    assert!(parse(&["fork", &"a".repeat(64)]).is_ok());
}

#[test]
fn a_fork_name_is_a_dns_label() {
    let long = "a".repeat(64);
    for name in ["", "A", "a_b", "a.b", "ends-", "ü", "a b", long.as_str()] {
        let error = parse(&["fork", "py", "--name", name]).unwrap_err();
        assert!(error.to_string().contains("1 to 63 lower-case"), "{name:?}: {error}");
    }
    assert!(parse(&["fork", "py", "--name=-begins"]).is_err());
    assert!(parse(&["fork", "py", "--name", "worker-7"]).is_ok());
}

#[test]
fn sizes_and_cpus_are_parsed_at_the_door() {
    let Command::Fork(fork) = parse(&["fork", "py", "--memory-limit", "256M", "--cpus", "1.5"]).unwrap().command else {
        panic!("another verb");
    };
    assert_eq!((fork.memory_limit, fork.cpus, fork.count), (Some(256 << 20), Some(1500), 1));
    for bad in [["--memory-limit", "lots"], ["--cpus", "-1"], ["--cpus", "two"], ["--pids", "-1"], ["-n", "-1"]] {
        assert!(parse(&["fork", "py", bad[0], bad[1]]).is_err(), "{bad:?}");
    }
}

#[test]
fn a_negative_ack_timeout_reaches_the_verb_which_refuses_it_by_type() {
    let Command::Fork(fork) = parse(&["fork", "py", "--ack-timeout-ms", "-5"]).unwrap().command else {
        panic!("another verb");
    };
    assert_eq!(fork.ack_timeout_ms, -5);
}

#[test]
fn a_negative_time_limit_is_refused() {
    for line in [["exec", "f", "--timeout", "-1", "--", "ls"], ["eval", "f", "--timeout", "-1", "--", "1"]] {
        let error = parse(&line).unwrap_err();
        assert!(error.to_string().contains("can not be negative"), "{error}");
    }
}

#[test]
fn exec_takes_its_command_after_two_dashes() {
    let Command::Exec(exec) = parse(&["exec", "f", "-it", "-e", "A=1", "--", "ls", "-l", "--json"]).unwrap().command
    else {
        panic!("another verb");
    };
    assert!(exec.interactive && exec.tty);
    assert_eq!(exec.command, ["ls", "-l", "--json"]);
    assert!(parse(&["exec", "f"]).is_err());
    assert!(parse(&["exec", "f", "--"]).is_err());
}

#[test]
fn eval_takes_code_or_a_dash() {
    let source = |line: &[&str]| match parse(line).unwrap().command {
        Command::Eval(eval) => (eval.source, eval.code.join(" ")),
        _ => panic!("another verb"),
    };
    assert_eq!(source(&["eval", "f", "-"]), (Some("-".into()), String::new()));
    assert_eq!(source(&["eval", "f", "--", "-1 + 2"]), (None, "-1 + 2".into()));
    assert!(parse(&["eval", "f", "-", "--", "1"]).is_err());
}

#[test]
fn kill_needs_to_know_whom() {
    assert!(parse(&["kill"]).is_err());
    assert!(parse(&["kill", "a", "--all"]).is_err());
    assert!(parse(&["kill", "a", "b"]).is_ok());
    assert!(parse(&["kill", "--all"]).is_ok());
}

#[test]
fn bench_takes_a_list() {
    let Command::Bench(bench) = parse(&["bench", "py", "-n", "1,10,50"]).unwrap().command else {
        panic!("another verb");
    };
    assert_eq!(bench.at_once, [1, 10, 50]);
    for bad in ["0", "1,,2", "1,x", ""] {
        assert!(parse(&["bench", "py", "-n", bad]).is_err(), "{bad:?}");
    }
    assert!(parse(&["bench", "py", "--rounds", "0"]).is_err());
}

#[test]
fn global_options_stand_anywhere_before_a_command() {
    assert!(parse(&["--json", "ls"]).unwrap().json);
    assert!(parse(&["ls", "--json", "-q"]).unwrap().quiet);
}
