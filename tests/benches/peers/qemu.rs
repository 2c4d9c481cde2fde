// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU, driven by QMP: a guest under TCG whose memory is a shared file, prepared like that of the
//! other programs. It is paused unless it must run.

use super::image::Image;
use pageferry_tests::deadline::wait_for;
use pageferry_tests::process::Process;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);
const LIMIT: Duration = Duration::from_secs(600);
/// Practically no limit, in bytes per second.
const BANDWIDTH: u64 = 100 << 30;

/// The name in the certificate of a destination.
pub const TLS_HOST: &str = "localhost";

/// An installed QEMU.
#[derive(Debug)]
pub struct Qemu {
    /// Its version text.
    pub version: String,
}

/// How it migrates.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    /// Channels of multifd. 0 is without multifd.
    pub channels: u32,
    /// Level of zstd, with multifd. 0 is no compression.
    pub zstd: u32,
}

impl Mode {
    /// This many channels, without compression.
    pub const fn multifd(channels: u32) -> Self {
        Self { channels, zstd: 0 }
    }
}

/// The cost of a migration.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// From the command to the end.
    pub time: Duration,
    /// Bytes on the wire, by its own count.
    pub wire_bytes: u64,
}

impl Qemu {
    /// QEMU, if it is installed.
    pub fn find() -> Option<Self> {
        let output = Command::new(PROGRAM).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(Self { version: text.lines().next()?.to_owned() })
    }

    /// Migrates the guest.
    pub fn migrate(&self, source: &Image, destination: &Image, mode: Mode) -> Took {
        self.migrate_with(source, destination, mode, None)
    }

    /// The same, with the certificates in this folder if there is one.
    pub fn migrate_with(
        &self, source: &Image, destination: &Image, mode: Mode, certificates: Option<&Path>,
    ) -> Took {
        let folder = tempfile::tempdir().unwrap();
        let side = |name, image, more: &[&str], endpoint| {
            let object = certificates.map(|folder| {
                let dir = folder.display();
                format!("tls-creds-x509,id=tls,dir={dir},endpoint={endpoint},verify-peer=on")
            });
            let object = object.iter().flat_map(|object| ["-object", object]);
            let more: Vec<&str> = more.iter().copied().chain(object).collect();
            let mut machine = Machine::start(folder.path(), name, image, &more);
            machine.set_up(mode, certificates.is_some());
            machine
        };
        let mut to = side("destination", destination, &["-S", "-incoming", "defer"], "server");
        let mut from = side("source", source, &["-S"], "client");
        let address = format!("tcp:127.0.0.1:{}", free_port());
        to.execute("migrate-incoming", json!({ "uri": address }));
        let started = Instant::now();
        from.execute("migrate", json!({ "uri": address }));
        let done = wait_for("QEMU's migration", LIMIT, || {
            let status = from.execute("query-migrate", json!({}));
            match status["status"].as_str() {
                Some("completed") => Some((status, started.elapsed())),
                Some("failed" | "cancelled") => panic!("QEMU's migration failed: {status}"),
                _ => None,
            }
        });
        let (status, time) = done.unwrap();
        Took { time, wire_bytes: status["ram"]["transferred"].as_u64().unwrap_or_default() }
    }
}

/// A free port. If another process takes it before QEMU does, the bench fails with an error.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Parameters that set practically no limit.
pub fn unlimited() -> Value {
    json!({ "max-bandwidth": BANDWIDTH })
}

/// One QEMU process.
pub struct Machine {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    process: Process,
}

impl Machine {
    /// Starts it with the additional arguments `more`.
    pub fn start(folder: &Path, name: &str, image: &Image, more: &[&str]) -> Self {
        let socket = folder.join(name);
        let memory = format!("memory-backend-file,mem-path={},share=on", image.path.display());
        let [program, options @ ..] = Self::command_line(image.size, &memory);
        let mut command = Command::new(program);
        command.args(options);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]).args(more);
        let mut process = Process::spawn(name, &mut command).unwrap();
        let stream = wait_for("QEMU's control socket", PATIENCE, || {
            assert!(!process.has_ended(), "QEMU ended: {:?}", process.lines());
            UnixStream::connect(&socket).ok()
        })
        .unwrap();
        let mut machine =
            Self { writer: stream.try_clone().unwrap(), reader: BufReader::new(stream), process };
        machine.read();
        machine.execute("qmp_capabilities", json!({}));
        machine
    }

    /// The program and its options for a guest of `size` bytes. `memory` is the value of `-object`
    /// without id and size.
    pub fn command_line(size: u64, memory: &str) -> [String; 13] {
        [
            PROGRAM,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-machine",
            "q35,memory-backend=ram",
            "-m",
            &format!("{}M", size >> 20),
            "-object",
            &format!("{memory},id=ram,size={size}"),
        ]
        .map(str::to_owned)
    }

    /// The id of the process.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    fn set_up(&mut self, mode: Mode, is_tls: bool) {
        let capability = json!({ "capability": "multifd", "state": mode.channels > 0 });
        self.execute("migrate-set-capabilities", json!({ "capabilities": [capability] }));
        let mut parameters = unlimited();
        if is_tls {
            parameters["tls-creds"] = json!("tls");
            parameters["tls-hostname"] = json!(TLS_HOST);
        }
        if mode.channels > 0 {
            parameters["multifd-channels"] = json!(mode.channels);
            if mode.zstd > 0 {
                parameters["multifd-compression"] = json!("zstd");
                parameters["multifd-zstd-level"] = json!(mode.zstd);
            }
        }
        self.execute("migrate-set-parameters", parameters);
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.reader.read_line(&mut line).unwrap() > 0, "QEMU closed its control socket");
        serde_json::from_str(&line).unwrap()
    }

    /// Executes a QMP command, and returns the answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.writer.write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let mut answer = self.read();
            if answer.get("error").is_some() {
                panic!("QEMU refused {command}: {answer}");
            }
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }
}
