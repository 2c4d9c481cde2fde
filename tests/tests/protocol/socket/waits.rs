// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests that wait for a name server, a VMM or a full queue, while other requests are answered.

use pageferry_client::{Error, IncomingOptions, Ownership, Parameters, Phase, Target, Trackers};
use pageferry_protocol::control::Frame;
use pageferry_protocol::control::devices::DeviceSpec;
use pageferry_protocol::control::frame::FLAG_NEED_REPLY;
use pageferry_protocol::control::job::{IncomingOptions as WireIncoming, OutgoingOptions};
use pageferry_protocol::control::job::{RestoreOptions, SnapshotOptions};
use pageferry_protocol::control::journal::Journal;
use pageferry_protocol::control::request::{
    BlockRange, CONTROL_VERSION, FIRST_NATIVE_REQUEST, Request, code,
};
use pageferry_protocol::control::unix_path::socket_address;
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
use pageferry_protocol::stream::Kind;
use pageferry_tests::deadline::wait_until;
use pageferry_tests::files::memfd;
use pageferry_tests::process::{AgentProcess, program};
use pageferry_tests::require;
use pageferry_tests::scenario::{
    At, Attached, Listening, Ram, RawClient, Relay, SOON, Side, Wire, passes,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
fn everybody_is_answered_while_a_vmm_is_asked_to_resume() {
    let agent = Listening::start();
    let source = Attached::new(&agent.path, Ram::odd(16));
    let destination = Side::new(Ram::odd(16));
    let mut relay = Relay::over(Wire::Unix);
    relay.listen(&destination.client, &IncomingOptions::default());
    let outgoing = relay.send(&source.client, &passes(1));
    let _resumed = relay.until(|record| record.kind == Kind::Resumed);
    relay.cut();
    assert_eq!(source.wait(outgoing).phase, Phase::Unconfirmed);

    let (asked, release) =
        (std::sync::Arc::new(AtomicBool::new(false)), std::sync::mpsc::channel::<()>());
    let (told, (release, released)) = (asked.clone(), release);
    source.vmm.on(At::Resume, move || {
        told.store(true, Ordering::Relaxed);
        // Nothing is sent: this returns when the sender is dropped.
        let _ = released.recv();
        Ok(())
    });
    std::thread::scope(|scope| {
        let resume =
            scope.spawn(|| agent.connect().ask(&Request::Resume { force: true }, Vec::new()));
        wait_until("the VMM to be asked", SOON, || asked.load(Ordering::Relaxed)).unwrap();
        assert_eq!(source.client.status().unwrap().phase, Phase::Unconfirmed);
        assert_eq!(agent.connect().status().phase, Phase::Unconfirmed);
        let again = agent.connect().ask(&Request::Resume { force: true }, Vec::new()).unwrap_err();
        assert!(again.sentence.contains("already"), "{again}");
        assert!(!resume.is_finished(), "all these replies came before that of the resume");
        drop(release);
        resume.join().unwrap().unwrap();
    });
    assert_eq!(source.vmm.resumes(), 1);
    assert_eq!(source.client.ownership(), Ownership::Ours);
}

#[test]
fn a_path_with_a_full_accept_queue_is_in_use() {
    let agent = Listening::start();
    let vmm = Attached::new(&agent.path, Ram::odd(16));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full");
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &socket_address(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let _fills_the_queue = UnixStream::connect(&path).unwrap();
    let listen = Target::Address(format!("unix:{}", path.display()));
    match vmm.client.start_incoming(listen, &IncomingOptions::default()) {
        Err(Error::Refused { sentence, .. }) => assert!(sentence.contains("in use"), "{sentence}"),
        other => panic!("not refused: {other:?}"),
    }
    vmm.client.status().unwrap();
}

/// A command that runs the agent with a name server that never answers. `None` if this machine
/// cannot do that.
fn without_names(folder: &std::path::Path) -> Option<Command> {
    let resolv = folder.join("resolv.conf");
    std::fs::write(&resolv, "nameserver 10.255.255.1\noptions timeout:30\n").unwrap();
    let namespaces = require::net_namespace()?;
    let script = format!(
        "ip link set lo up && ip route add default dev lo && mount --bind {} /etc/resolv.conf && exec \"$0\" \"$@\"",
        resolv.display()
    );
    let mut command = Command::new("unshare");
    command.args([namespaces, "sh", "-c", &script]).arg(program());
    Some(command)
}

#[test]
fn a_silent_name_server_delays_one_request_only() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut command) = without_names(folder.path()) else { return };
    let agent = AgentProcess::start(&mut command, folder.path(), "agent").unwrap();
    let vmm = Attached::new(agent.socket(), Ram::odd(16));
    std::thread::scope(|scope| {
        let listen = || {
            vmm.client.start_incoming(
                Target::Address("tcp:name.invalid:7".into()),
                &IncomingOptions::default(),
            )
        };
        let listening = scope.spawn(listen);
        let mut operator = RawClient::connect(agent.socket());
        let mut answers = 0;
        while !listening.is_finished() {
            operator.status();
            answers += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(answers > 10, "{answers} replies during a look-up");
        match listening.join().unwrap() {
            Err(Error::Refused { sentence, .. }) => {
                assert!(sentence.contains("no answer from the name server"), "{sentence}");
            }
            other => panic!("not refused: {other:?}"),
        }
    });
    // The VMM still has its agent, and a job that looks up a name can be cancelled.
    let job = vmm
        .client
        .start_outgoing(Target::Address("tcp:name.invalid:7".into()), &passes(1))
        .unwrap()
        .job;
    vmm.client.cancel().unwrap();
    assert_eq!(vmm.wait(job).phase, Phase::Cancelled);
}

#[test]
fn nobody_waits_for_a_log_that_nobody_reads() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let mut command = Command::new(program());
    let command = command
        .arg("agent")
        .arg("--socket")
        .arg(&socket)
        .stderr(Stdio::piped())
        .stdout(Stdio::null());
    let _agent = Killed(command.spawn().unwrap());
    wait_until("the agent to listen", SOON, || UnixStream::connect(&socket).is_ok()).unwrap();
    let mut operator = RawClient::connect(&socket);
    // Each refusal is a line of some 100 bytes, and a pipe holds 64 KiB.
    for _ in 0..3000 {
        operator.ask(&Request::Cancel, Vec::new()).unwrap_err();
    }
    assert_eq!(RawClient::connect(&socket).status().phase, Phase::Idle);
}

/// A child whose output is not read. It is killed on drop.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only if the process is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// In a debug build a request that waits on the reactor's thread, or under the session's lock,
/// panics. Then its connection ends.
#[test]
fn no_request_waits_on_the_reactors_thread_or_under_the_lock() {
    let agent = Listening::start();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let vmm = Attached::new(&agent.path, Ram::odd(16));
    let block = vmm.ram.id;
    let page = BlockRange { block, offset: 0, length: PAGE_SIZE };
    let options = OutgoingOptions::default;
    let requests = || {
        let (path, image) = (at("image"), [0; 16]);
        let journal = Journal::Restore { path, image, options: RestoreOptions::default() };
        let images = (SnapshotOptions::default(), RestoreOptions::default());
        vec![
            Request::Hello {
                version_min: CONTROL_VERSION,
                version_max: CONTROL_VERSION,
                features: 0,
                agent: 0,
                name: String::new(),
            },
            Request::AddBlock {
                geometry: geometry(block + 1),
                fd_offset: 0,
                vmm_address: 0,
                flags: 0,
            },
            Request::Discard { flags: 1, ranges: vec![page] },
            Request::Free { ranges: vec![page] },
            Request::Populate { ranges: vec![page] },
            Request::SetTrackers { sources: Trackers::LOG_IS_COMPLETE },
            Request::StartOutgoing { target: "tcp:localhost:1".into(), options: options() },
            Request::StartOutgoing { target: format!("unix:{}", at("nobody")), options: options() },
            Request::StartIncoming {
                listen: "tcp:localhost:0".into(),
                options: WireIncoming::default(),
            },
            Request::Cancel,
            Request::StartIncoming {
                listen: format!("unix:{}", at("stream")),
                options: WireIncoming::default(),
            },
            Request::SetParameters { parameters: Parameters::bandwidth(0) },
            Request::QueryStatus,
            Request::QueryAgent,
            Request::Balloon { target: Some(4096), ask_stats: true },
            Request::PluggedMemory { requested: Some(0) },
            Request::ConnectDevice { device: DeviceSpec::Balloon },
            Request::Continue { journal: journal.encode() },
            Request::Upgrade { program: String::new() },
            Request::Upgrade { program: "/bin/true".into() },
            Request::Grant,
            Request::OpenBase { path: at("image") },
            Request::Subscribe { interval: Duration::from_millis(10) },
            Request::StartPostcopy,
            Request::Recover {
                session: [0; 16],
                address: "tcp:localhost:0".into(),
                options: options(),
            },
            Request::Recover {
                session: [7; 16],
                address: "tcp:localhost:0".into(),
                options: options(),
            },
            Request::Cancel,
            Request::StartSnapshot { path: at("image"), options: images.0 },
            Request::StartRestore { path: at("image"), options: images.1 },
            Request::Resume { force: true },
            Request::Resume { force: false },
            Request::RemoveBlock { id: block },
        ]
    };
    // Every code that the decoder knows is a request.
    let known =
        (FIRST_NATIVE_REQUEST..code::EVENT).filter(|code| Request::decode(*code, &[]).is_some());
    let listed: BTreeSet<u32> = requests().iter().map(Request::code).collect();
    assert_eq!(listed, known.collect(), "a request is missing in the list");
    for request in requests() {
        // Accepted or refused, every request gets a reply.
        let _ = agent.connect().ask(&request, Vec::new());
    }
    vmm.client.status().unwrap();
    // The same from the VMM itself, whose hooks are not answered.
    for request in requests() {
        let agent = Listening::start();
        let mut own = agent.connect();
        let _hooks = hand_over(&mut own, block);
        let _ = own.ask(&request, Vec::new());
        agent.connect().status();
    }
}

fn geometry(id: u32) -> BlockGeometry {
    BlockGeometry {
        id,
        name: format!("ram{id}"),
        gpa: u64::from(id) << 20,
        length: 0x1_0000,
        granularity: PAGE_SIZE,
    }
}

/// Makes `peer` the VMM of a small guest. Returns its end of the hook socket.
pub(super) fn hand_over(peer: &mut RawClient, id: u32) -> UnixStream {
    let add = Request::AddBlock { geometry: geometry(id), fd_offset: 0, vmm_address: 0, flags: 0 };
    peer.ask(&add, vec![memfd(0x1_0000).unwrap(), memfd(4096).unwrap()]).unwrap();
    peer.ask(&Request::SetTrackers { sources: Trackers::LOG_IS_COMPLETE }, Vec::new()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // VHOST_USER_SET_BACKEND_REQ_FD.
    let frame =
        Frame { request: 21, flags: FLAG_NEED_REPLY, body: Vec::new(), fds: vec![theirs.into()] };
    peer.socket.send(&frame, Instant::now() + SOON).unwrap();
    assert_eq!(peer.reply().unwrap().body, [0; 8]);
    ours
}
