//! A guest whose kernel has a driver for the generation identifier (VMGenID) is told by its machine that it is a
//! copy, whatever the agent does.

use std::{collections::BTreeSet, env, fs::File, os::unix::fs::FileExt, time::Duration};

use offshoot_tests::{Bench, Fork, Template, bench::wait_until, processes, programs};

/// Where the kvm engine keeps the 16 bytes (`vmm::layout::GENERATION`): low memory, whose addresses are offsets in the
/// memory file.
const IDENTIFIER: u64 = 0xf_f000;
const BYTES: usize = 16;
/// What Linux says when the notification has reached the driver, and the identifier is another one.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// The driver's devices, as links.
const BOUND: &str = "ls /sys/bus/acpi/drivers/vmgenid | grep -c :";

/// How often the fork's kernel has said it.
fn reseeded(bench: &Bench, fork: &Fork) -> usize {
    let said = bench.sh(fork, "dmesg");
    let lines = said.lines().filter(|line| line.contains(RESEEDED)).inspect(|line| println!("{}: {line}", fork.name()));
    lines.count()
}

#[test]
#[ignore = "needs the engine kvm and a kernel with the driver, which scripts/test --rig gives it"]
fn the_kernel_of_every_fork_learns_that_it_is_a_copy() {
    let kernel = env::var("OFFSHOOT_TEST_VMGENID_KERNEL")
        .expect("OFFSHOOT_TEST_VMGENID_KERNEL names a kernel with the driver; run: scripts/test --rig generation");
    let bench = Bench::with_own_data();
    let recipe = programs::source().join("tests/recipes/generation");
    let tag = "generation";
    // QEMU has no such device for a guest of ours: with it the test could show nothing.
    let build = ["build", recipe.to_str().unwrap(), "--tag", tag, "--kernel", &kernel, "--engine", "kvm"];
    let _ = bench.offshoot(&build).ok();
    let template = Template::read(&bench.data(), tag);

    let mut identifiers = BTreeSet::new();
    let mut identifier = [0; BYTES];
    File::open(template.memory_file()).unwrap().read_exact_at(&mut identifier, IDENTIFIER).unwrap();
    assert_ne!(identifier, [0; BYTES], "the template has an identifier of its own");
    identifiers.insert(identifier.to_vec());
    for fork in bench.fork(&template, &["-n", "2"]) {
        assert_eq!(bench.sh(&fork, BOUND), "1", "the driver has found the device");
        // The template's kernel did not say it: only a copy does, and once.
        let template_said = bench.sh(&fork, "cat /template-said");
        assert!(template_said.contains("random: crng init done"), "the log is readable: {template_said}");
        assert!(!template_said.contains(RESEEDED), "{template_said}");
        // The notification runs on a kernel thread, beside the agent.
        wait_until("the kernel's word on its copy", Duration::from_secs(30), || reseeded(&bench, &fork) > 0);
        assert_eq!(reseeded(&bench, &fork), 1, "{}", fork.name());
        let own = processes::guest_memory(fork.pid(), &template.memory_file(), IDENTIFIER, BYTES);
        assert!(identifiers.insert(own), "{} has the identifier of another", fork.name());
    }
    bench.end();
}
