// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Plain TCP beyond this host, which needs the consent of whoever starts the agent.

use pageferry_client::{Error, IncomingOptions, OutgoingOptions, Phase, Target};
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use pageferry_tests::scenario::{Attached, Ram, SOON, passes};
use std::path::Path;
use std::process::Command;

const PAGES: u64 = 40;

/// A network and a name service of its own, in which `far` is another host and `both` is on this
/// host, too. `None` if this machine cannot do that.
fn beside_a_network(folder: &Path) -> Option<Command> {
    let hosts = folder.join("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost both\n10.9.9.1 far both\n").unwrap();
    let namespaces = require::net_namespace()?;
    let script = format!(
        "ip link set lo up && ip address add 10.9.9.1/32 dev lo && mount --bind {} /etc/hosts && exec \"$0\" \"$@\"",
        hosts.display()
    );
    let mut command = Command::new("unshare");
    command.args([namespaces, "sh", "-c", &script]).arg(program());
    Some(command)
}

#[track_caller]
fn assert_needs_consent(said: &str, address: &str, ip: &str) {
    for words in [address, ip, "in the clear", "tls:", "unix:", "--insecure"] {
        assert!(said.contains(words), "\"{words}\" is missing in: {said}");
    }
}

#[test]
fn plain_tcp_beyond_this_host_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut command) = beside_a_network(folder.path()) else { return };
    let agent = AgentProcess::start(&mut command, folder.path(), "agent").unwrap();
    let vmm = Attached::new(agent.socket(), Ram::odd(PAGES));
    let refused = |outcome| match outcome {
        Err(Error::Refused { sentence, .. }) => sentence,
        other => panic!("{other:?}"),
    };
    for (address, ip) in [
        ("tcp:0.0.0.0:0", "0.0.0.0"),
        ("tcp:[::]:0", "::"),
        ("tcp:10.9.9.1:0", "10.9.9.1"),
        ("tcp:far:0", "10.9.9.1"),
        ("tcp:both:0", "10.9.9.1"),
    ] {
        let target = Target::Address(address.into());
        let outcome = vmm.client.start_incoming(target, &IncomingOptions::default());
        assert_needs_consent(&refused(outcome), address, ip);
    }
    let to = |address: &str| {
        vmm.client.start_outgoing(Target::Address(address.into()), &OutgoingOptions::default())
    };
    assert_needs_consent(&refused(to("tcp:10.9.9.1:7")), "tcp:10.9.9.1:7", "10.9.9.1");
    // A name is looked up by the job.
    for address in ["tcp:far:7", "tcp:both:7"] {
        let job = to(address).unwrap().job;
        let status = vmm.wait(job);
        assert_eq!(status.phase, Phase::Failed);
        assert_needs_consent(status.error_text(), address, "10.9.9.1");
    }
    for address in ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0"] {
        let target = Target::Address(address.into());
        let started = vmm.client.start_incoming(target, &IncomingOptions::default()).unwrap();
        vmm.client.cancel().unwrap();
        assert_eq!(vmm.wait(started.job).phase, Phase::Cancelled);
    }
}

#[test]
fn plain_tcp_goes_anywhere_with_consent_and_the_log_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let start = |name: &str, more: &[&str]| {
        AgentProcess::start_with(&mut Command::new(program()), folder.path(), name, more).unwrap()
    };
    let mut theirs = start("destination", &["--insecure"]);
    let destination = Attached::new(theirs.socket(), Ram::odd(PAGES));
    let listen = Target::Address("tcp:0.0.0.0:0".into());
    let options = IncomingOptions::default();
    let started = destination.client.start_incoming(listen, &options).unwrap();
    let line = theirs.process().wait_for_line("in the clear", SOON).unwrap();
    assert!(line.contains("WARN") && line.contains("tcp:0.0.0.0:0"), "{line}");
    // The source stays on this host, and needs no consent.
    let ours = start("source", &[]);
    let source = Attached::new(ours.socket(), Ram::odd(PAGES).stamped());
    let port = started.address.rsplit_once(':').unwrap().1;
    let to = Target::Address(format!("tcp:127.0.0.1:{port}"));
    let job = source.client.start_outgoing(to, &passes(1)).unwrap().job;
    for (side, job) in [(&source, job), (&destination, started.job)] {
        let status = side.wait(job);
        assert_eq!(status.phase, Phase::Completed, "{}", status.error_text());
    }
}
