// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Agents and VMMs as processes of their own, for tests that kill them or make them hang.

use crate::Error;
use crate::deadline::{wait_for, wait_until};
use crate::vmm::PATIENCE;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// The program `pageferry-test-process`. Its first argument says whether it is an agent or a mock
/// VMM. Cargo builds it before it runs a test or a bench of this package.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        const NAME: &str = "pageferry-test-process";
        // Cargo sets this variable since 1.94. Without it, the tests are in a folder beside the
        // program.
        std::env::var_os(format!("CARGO_BIN_EXE_{NAME}")).map_or_else(
            || {
                let test = std::env::current_exe().unwrap_or_default();
                test.ancestors().nth(2).unwrap_or(Path::new("")).join(NAME)
            },
            PathBuf::from,
        )
    })
}

/// A command that runs a mock VMM on the agent at `socket`: `side` is `source` or `destination`,
/// and `memory` a file of `size` bytes.
pub fn mock_vmm(side: &str, size: u64, socket: &Path, memory: &Path) -> Command {
    let mut command = Command::new(program());
    command.args(["mock-vmm", side, "--json", "--size", &size.to_string()]);
    command.arg("--socket").arg(socket).arg("--memory").arg(memory);
    command
}

/// A child process whose output is collected. It is killed and waited for when it is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`. `name` marks its output.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self, Error> {
        Self::spawn_with_stdin(name, command, Stdio::null())
    }

    /// Like [`Process::spawn`], with this standard input.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn_with_stdin(
        name: &str, command: &mut Command, stdin: Stdio,
    ) -> Result<Self, Error> {
        Self::collecting(name, command.stderr(Stdio::piped()), stdin)
    }

    /// Like [`Process::spawn`], but the child's standard error is the one of this process, for
    /// example a terminal.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn_visible(name: &str, command: &mut Command) -> Result<Self, Error> {
        Self::collecting(name, command.stderr(Stdio::inherit()), Stdio::null())
    }

    fn collecting(name: &str, command: &mut Command, stdin: Stdio) -> Result<Self, Error> {
        let spawned = command.stdin(stdin).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(Error::io(format!("start {name}")))?;
        let lines = Arc::default();
        let outputs = [
            child.stdout.take().map(|pipe| collect(pipe, Arc::clone(&lines))),
            child.stderr.take().map(|pipe| collect(pipe, Arc::clone(&lines))),
        ];
        let readers = outputs.into_iter().flatten().collect();
        Ok(Self { name: name.to_owned(), child, lines, readers, status: None })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The lines that it printed so far, on both outputs.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a line that contains `text`, and returns the first such line.
    ///
    /// # Errors
    /// If none came within `timeout`, or the process ended before.
    pub fn wait_for_line(&mut self, text: &str, timeout: Duration) -> Result<String, Error> {
        let what = format!("a line with \"{text}\" from {}", self.name);
        let find = |process: &Self| process.lines().into_iter().find(|line| line.contains(text));
        wait_for(&what, timeout, || {
            // Check for the end first: lines that it printed before its end still count.
            let ended = self.has_ended();
            find(self).map(Some).or_else(|| ended.then_some(None))
        })?
        .ok_or_else(|| {
            Error::Mismatch(format!(
                "{} ended without {what}:\n{}",
                self.name,
                self.lines().join("\n")
            ))
        })
    }

    /// True if it ended and all its output was read.
    pub fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.is_some() && self.readers.iter().all(JoinHandle::is_finished)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it did not within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus, Error> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, timeout, || if self.has_ended() { self.status } else { None })
    }

    /// Kills it at once, as a crash or the kernel would, and waits until it is gone.
    ///
    /// # Errors
    /// If it does not go.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.child.kill().map_err(Error::io(format!("kill {}", self.name)))?;
        self.wait(PATIENCE).map(drop)
    }

    /// Asks it to shut down, as a service manager does (SIGTERM).
    ///
    /// # Errors
    /// If it is gone.
    pub fn terminate(&self) -> Result<(), Error> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(Error::kernel("terminate a process"))
    }

    /// Makes it hang (SIGSTOP). When this returns all its threads have stopped, until
    /// [`Process::thaw`] or a kill.
    ///
    /// # Errors
    /// If it is gone, or does not stop.
    pub fn freeze(&self) -> Result<(), Error> {
        freeze(self.id())
    }

    /// Lets it continue after [`Process::freeze`].
    ///
    /// # Errors
    /// If it is gone.
    pub fn thaw(&self) -> Result<(), Error> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::CONT)
            .map_err(Error::kernel("let a process go on"))
    }

    /// Limits the length of files that it writes, as a file system with such a limit does. `None`
    /// is no limit.
    ///
    /// # Errors
    /// If it is gone.
    pub fn limit_files(&self, bytes: Option<u64>) -> Result<(), Error> {
        use rustix::process::{Resource, Rlimit, prlimit};
        let pid = rustix::process::Pid::from_child(&self.child);
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(pid), Resource::Fsize, limit)
            .map(drop)
            .map_err(Error::kernel("limit the files of a process"))
    }

    /// Limits the number of its descriptors. Descriptors that are open already stay open.
    ///
    /// # Errors
    /// If it is gone.
    pub fn limit_descriptors(&self, count: u64) -> Result<(), Error> {
        use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
        let pid = rustix::process::Pid::from_child(&self.child);
        // Its hard limit is that of this process, which started it.
        let limit = Rlimit { current: Some(count), ..getrlimit(Resource::Nofile) };
        prlimit(Some(pid), Resource::Nofile, limit)
            .map(drop)
            .map_err(Error::kernel("limit the descriptors of a process"))
    }

    /// Resident memory in bytes, as the kernel counts it.
    ///
    /// # Errors
    /// If it is gone.
    pub fn resident_bytes(&self) -> Result<u64, Error> {
        let path = format!("/proc/{}/status", self.id());
        let status = std::fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes =
            line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
        kibibytes
            .map(|count| count * 1024)
            .ok_or_else(|| Error::Argument(format!("{path} has no VmRSS")))
    }
}

/// A failed test shows what its processes have said: often the only trace of the reason.
impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} said: {}", self.name, self.lines().join("\n"));
        }
        if !self.has_ended() {
            // Both fail only if the process is gone already.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Stops a process, which need not be a child of this one, and returns when all its threads have
/// stopped.
///
/// # Errors
/// If it is gone, or does not stop.
pub fn freeze(id: u32) -> Result<(), Error> {
    let pid = i32::try_from(id).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::Argument(format!("{id} is no process")))?;
    rustix::process::kill_process(pid, rustix::process::Signal::STOP)
        .map_err(Error::kernel("stop a process"))?;
    // The signal is only sent so far. Each thread stops at its own time.
    wait_until(&format!("process {id} to stop"), PATIENCE, || {
        let tasks = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
        tasks
            .map(|task| task.path().join("stat"))
            .all(|stat| !matches!(state(&stat), Some('R' | 'S' | 'D')))
    })
}

/// The state letter of a process or a thread, from `stat` in /proc. `None` if it is gone.
pub fn state(stat: &Path) -> Option<char> {
    let stat = std::fs::read_to_string(stat).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

fn collect(pipe: impl Read + Send + 'static, lines: Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            log::debug!("{line}");
            if line.contains("the sandbox has refused system call") {
                // Not by a macro, whose output is shown only if the test fails: CI looks for it.
                let _ = writeln!(std::io::stderr(), "{line}");
            }
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    })
}

/// An agent process that listens at a socket.
#[derive(Debug)]
pub struct AgentProcess {
    process: Process,
    socket: PathBuf,
}

impl AgentProcess {
    /// Starts `program agent --socket DIRECTORY/NAME.sock` and waits until it listens.
    ///
    /// # Errors
    /// If it does not listen.
    pub fn spawn(program: impl AsRef<OsStr>, directory: &Path, name: &str) -> Result<Self, Error> {
        Self::start(&mut Command::new(program), directory, name)
    }

    /// Like [`AgentProcess::spawn`], with another command that runs the program.
    ///
    /// # Errors
    /// If it does not listen.
    pub fn start(command: &mut Command, directory: &Path, name: &str) -> Result<Self, Error> {
        Self::start_with(command, directory, name, &[])
    }

    /// Like [`AgentProcess::start`], with `more` arguments of the agent.
    ///
    /// # Errors
    /// If it does not listen.
    pub fn start_with(
        command: &mut Command, directory: &Path, name: &str, more: &[&str],
    ) -> Result<Self, Error> {
        let socket = directory.join(format!("{name}.sock"));
        let command = command.arg("agent").arg("--socket").arg(&socket).args(more);
        let mut process = Process::spawn(name, command)?;
        let listening = wait_until(&format!("{name} listening"), PATIENCE, || {
            process.has_ended() || UnixStream::connect(&socket).is_ok()
        });
        if process.has_ended() || listening.is_err() {
            return Err(Error::Mismatch(format!(
                "{name} does not listen:\n{}",
                process.lines().join("\n")
            )));
        }
        Ok(Self { process, socket })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
