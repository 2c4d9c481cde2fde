// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry qemu`: an agent for an unmodified QEMU.
//!
//! The command stays as long as QEMU does. It stands for the VMM: it starts the agent as a child,
//! hands the memory over, and answers the agent's hooks by QMP.

use super::agent_args::AgentOptions;
use super::exit::Exit;
use super::migration::{IncomingArgs, UsageError};
use super::parse::{parse_huge_pages, parse_size};
use crate::transport::unix_path::{UnixPathError, check_may_replace};
use clap::{Args, Subcommand};
use pageferry_attach::process::target::TargetProcess;
use pageferry_attach::qemu::attachment::{Attachment, End, Helpers};
use pageferry_attach::qemu::command_line::Purpose;
use pageferry_attach::qemu::guard;
use pageferry_attach::qemu::launch::{Launch, Launched, monitor_beside};
use pageferry_attach::qemu::monitor::Monitor;
use pageferry_client::{HugePages, IncomingOptions};
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// How long a QEMU that was asked to end may take.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an agent may take to end whose VMM is gone.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval at which this is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// `pageferry qemu`.
#[derive(Debug, Subcommand)]
pub enum QemuCommand {
    /// Start QEMU for a new guest, and an agent for it.
    ///
    /// The command stays in the foreground as long as QEMU does, and ends with its exit code.
    /// SIGINT and SIGTERM end QEMU. Standard input, output and error are QEMU's.
    #[command(after_help = RUN_EXAMPLE)]
    Run(RunArgs),
    /// Start an agent for a QEMU that runs already.
    ///
    /// Its guest memory must be in files that are mapped shared (-object
    /// memory-backend-file,share=on). The command stays in the foreground until QEMU ends or its
    /// guest has moved away. SIGINT and SIGTERM end the agent, not QEMU.
    #[command(after_help = ATTACH_EXAMPLE)]
    Attach(AttachArgs),
    /// Start QEMU for a guest that is migrated here or restored, and an agent for it.
    ///
    /// Give QEMU the same arguments as at the source, without -incoming. The guest comes by
    /// `pageferry migrate` at its source if there is --listen, and otherwise by `pageferry listen`
    /// or `pageferry restore` with the same --socket. From then on the command is like `pageferry
    /// qemu run`. It fails if the guest that it listens for does not arrive.
    #[command(after_help = RECEIVE_EXAMPLE)]
    Receive(ReceiveArgs),
    /// Resume the guest if the standard input ends while a job has it paused.
    #[command(hide = true)]
    Guard(GuardArgs),
}

/// `pageferry qemu guard`, which the others start.
#[derive(Debug, Args)]
pub struct GuardArgs {
    #[arg(long)]
    qmp: PathBuf,
    #[arg(long)]
    pid: u32,
}

const RUN_EXAMPLE: &str = "\
Example:
  pageferry qemu run --socket /run/vm1.sock -- qemu-system-x86_64 -m 4G -drive ...
  pageferry snapshot --socket /run/vm1.sock /images/monday
No disk is moved or saved. docs/qemu.md says what is refused, and what each mode needs.";

const ATTACH_EXAMPLE: &str = "\
Example:
  qemu-system-x86_64 -m 4G -machine memory-backend=ram \\
      -object memory-backend-file,id=ram,size=4G,mem-path=/dev/shm/vm1,share=on \\
      -qmp unix:/run/vm1.qmp,server=on,wait=off -drive ... &
  pageferry qemu attach --socket /run/vm1.sock --qmp /run/vm1.qmp --pid $!";

const RECEIVE_EXAMPLE: &str = "\
Example, a migration:
  pageferry qemu receive --socket /run/vm1.sock --tls /etc/pageferry/tls \\
      --listen tls:host-b:4444 -- qemu-system-x86_64 -m 4G -drive ...
  pageferry migrate --socket /run/vm1.sock --to tls:host-b:4444          (at the source)
Example, a restore:
  pageferry qemu receive --socket /run/vm1.sock -- qemu-system-x86_64 -m 4G -drive ... &
  pageferry restore --socket /run/vm1.sock /images/monday --lazy";

/// The agent.
#[derive(Debug, Args)]
struct OwnAgent {
    /// Socket of the agent. Give it to `pageferry status`, `migrate`, `snapshot` and the others.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    #[command(flatten)]
    options: AgentOptions,
}

/// QEMU's command line.
#[derive(Debug, Args)]
struct QemuLine {
    /// QEMU and its arguments. Guest memory is moved to shared files, whatever -m, -object
    /// memory-backend-... and -mem-path say about it. A QMP monitor for pageferry is added, at the
    /// path of --socket with .qmp at its end.
    #[arg(last = true, required = true, value_name = "QEMU")]
    qemu: Vec<OsString>,
}

/// `pageferry qemu run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    agent: OwnAgent,
    /// Put the memory of -m into huge pages of this size, such as 2M. The kernel must have them.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    huge_pages: Option<u64>,
    #[command(flatten)]
    line: QemuLine,
}

/// `pageferry qemu attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    #[command(flatten)]
    agent: OwnAgent,
    /// Socket of a QMP monitor of QEMU that no other program uses, such as libvirt (-qmp
    /// unix:PATH,server=on,wait=off).
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Process id of QEMU. Without it, the process that listens at --qmp.
    #[arg(long)]
    pid: Option<u32>,
}

/// `pageferry qemu receive`.
#[derive(Debug, Args)]
#[command(mut_group("IncomingArgs", |group| group.requires("listen")))]
pub struct ReceiveArgs {
    #[command(flatten)]
    agent: OwnAgent,
    /// Wait at this address for a source (tls:HOST:PORT, tcp:HOST:PORT or unix:PATH). With port 0
    /// the kernel chooses one, and the command prints it.
    #[arg(long, value_name = "ADDRESS", value_parser = super::parse::parse_address)]
    listen: Option<String>,
    #[command(flatten)]
    incoming: IncomingArgs,
    /// Put the memory of -m into huge pages of this size, such as 2M. The kernel must have them. Or
    /// with --listen, for other memory: auto, the guest gets huge pages where its source uses all
    /// of 2 MiB; never, it gets none.
    #[arg(long, value_name = "SIZE|auto|never", value_parser = parse_receive_huge_pages,
          default_value = "auto")]
    huge_pages: ReceiveHugePages,
    #[command(flatten)]
    line: QemuLine,
}

/// Which huge pages a guest gets that is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReceiveHugePages {
    /// The kernel's huge pages of this size.
    Pool(u64),
    /// Transparent ones.
    Transparent(HugePages),
}

fn parse_receive_huge_pages(text: &str) -> Result<ReceiveHugePages, String> {
    if let Ok(choice) = parse_huge_pages(text) {
        return Ok(ReceiveHugePages::Transparent(choice));
    }
    let size = parse_size(text).map(ReceiveHugePages::Pool);
    size.map_err(|_| format!("\"{text}\": write auto, never, or a size such as 2M"))
}

impl ReceiveArgs {
    /// The address at which it listens, with the options of the migration.
    fn listens(&self) -> Result<Option<(&str, IncomingOptions)>, UsageError> {
        let choice = match self.huge_pages {
            ReceiveHugePages::Pool(_) => HugePages::Auto,
            ReceiveHugePages::Transparent(choice) => choice,
        };
        match self.listen.as_deref() {
            Some(address) => Ok(Some((address, self.incoming.options(choice)))),
            None if choice == HugePages::Never => Err(UsageError(
                "--huge-pages never needs --listen; without it, give it to pageferry listen or \
                 pageferry restore"
                    .into(),
            )),
            None => Ok(None),
        }
    }

    /// The size of the kernel's huge pages for the memory of -m.
    fn huge_page_size(&self) -> Option<u64> {
        match self.huge_pages {
            ReceiveHugePages::Pool(size) => Some(size),
            ReceiveHugePages::Transparent(_) => None,
        }
    }
}

impl OwnAgent {
    /// The processes for the QEMU with this monitor and process. They are this program.
    fn helpers(&self, monitor: &Path, pid: u32) -> Result<Helpers, Box<dyn Error>> {
        let program = OsString::from(std::env::current_exe()?);
        let mut agent = vec![program.clone()];
        agent.extend(["agent", "--stdin", "--socket"].map(OsString::from));
        agent.push(std::path::absolute(&self.socket)?.into());
        agent.extend(self.options.to_arguments()?);
        let mut guard = vec![program];
        guard.extend(["qemu", "guard", "--qmp"].map(OsString::from));
        guard.extend([
            std::path::absolute(monitor)?.into(),
            "--pid".into(),
            pid.to_string().into(),
        ]);
        Ok(Helpers { agent, guard, vm_name: self.options.name.clone().unwrap_or_default() })
    }
}

/// Runs one of the commands.
///
/// # Errors
/// If QEMU cannot be started or served, or the guest that it was started for does not come.
pub fn run(command: &QemuCommand) -> Result<Exit, Box<dyn Error>> {
    if !matches!(command, QemuCommand::Guard(_)) {
        super::open_files::check_limit()?;
    }
    match command {
        QemuCommand::Run(args) => launch(&args.agent, &args.line, args.huge_pages, None),
        QemuCommand::Receive(args) => {
            launch(&args.agent, &args.line, args.huge_page_size(), Some(args.listens()?))
        }
        QemuCommand::Attach(args) => attach(args),
        QemuCommand::Guard(args) => {
            guard::run(std::io::stdin().lock(), &args.qmp, args.pid)?;
            Ok(Exit::Done)
        }
    }
}

/// Refuses a path that another agent or another QEMU has, or a file that is no socket. Before QEMU
/// is started or asked: a QEMU takes the path of its monitor from whoever has it.
fn check_free(path: &Path) -> Result<(), UnixPathError> {
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        match check_may_replace(path) {
            // The agent of a command that was killed a moment ago is about to end.
            Err(UnixPathError::InUse(_)) if Instant::now() < deadline => std::thread::sleep(LOOK),
            checked => return checked,
        }
    }
}

/// A descriptor that is readable after a signal that asks this process to end.
fn signals() -> std::io::Result<UnixStream> {
    let (signals, wake) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, wake.try_clone()?)?;
    }
    Ok(signals)
}

fn launch(
    agent: &OwnAgent, line: &QemuLine, huge_page_size: Option<u64>,
    receive: Option<Option<(&str, IncomingOptions)>>,
) -> Result<Exit, Box<dyn Error>> {
    check_free(&agent.socket)?;
    check_free(&monitor_beside(&agent.socket))?;
    let signals = signals()?;
    let launch = Launch {
        arguments: line.qemu.clone(),
        monitor: std::path::absolute(monitor_beside(&agent.socket))?,
        huge_page_size,
        purpose: if receive.is_some() { Purpose::Receive } else { Purpose::Run },
    };
    let Launched { monitor, process, mut child } = launch.start()?;
    // The guest that was just started is nothing without its agent: the command line was wrong.
    let mut kill = |error: Box<dyn Error>| {
        let _ = child.kill();
        let _ = child.wait();
        error
    };
    let awaits_guest = receive.is_some();
    let helpers = agent.helpers(&launch.monitor, process.pid()).map_err(&mut kill)?;
    let attachment = Attachment::new(monitor, process, helpers, awaits_guest)
        .map_err(|error| kill(error.into()))?;
    let mut sentence = format!("{}; agent at {}", attachment.summary(), agent.socket.display());
    if let Some(Some((address, options))) = &receive {
        let address = attachment.listen(address, options).map_err(|error| kill(error.into()))?;
        sentence += &format!("; it listens at {address}");
    }
    say(&sentence);
    let end = match attachment.serve(signals.as_fd()) {
        Ok(end) => end,
        Err(error) => {
            // The guest goes on, and its QEMU is waited for as long as it takes.
            log::error!("{}", crate::error::chain(&error));
            child.wait()?;
            End::Exited
        }
    };
    let outcome = match end {
        End::Exited => None,
        End::Moved(_) => {
            say("the guest has moved away; its QEMU here is ended");
            let _ = attachment.quit_qemu();
            Some(Ok(Exit::Done))
        }
        End::Useless(why) => {
            let _ = attachment.quit_qemu();
            Some(Err(why))
        }
        End::Stopped => {
            let _ = rustix::process::kill_process(pid(&child)?, Signal::TERM);
            None
        }
    };
    let code = wait(&mut child)?;
    attachment.detach();
    match outcome {
        Some(Ok(exit)) => Ok(exit),
        Some(Err(why)) => Err(why.into()),
        None => Ok(Exit::OfProgram(code)),
    }
}

fn attach(args: &AttachArgs) -> Result<Exit, Box<dyn Error>> {
    check_free(&args.agent.socket)?;
    let signals = signals()?;
    let monitor = Monitor::connect(&args.qmp)?;
    let listens = monitor.process();
    let process = match (args.pid, listens) {
        (Some(pid), Some(other)) if pid != other && TargetProcess::open(other).is_ok() => {
            let path = args.qmp.display();
            return Err(
                format!("--pid {pid}: the monitor at {path} is that of process {other}").into()
            );
        }
        (Some(pid), _) | (None, Some(pid)) => TargetProcess::open(pid)?,
        (None, None) => return Err("--pid is needed: the kernel does not tell it".into()),
    };
    let helpers = args.agent.helpers(&args.qmp, process.pid())?;
    let attachment = Attachment::new(monitor, process, helpers, false)?;
    say(&format!("{}; agent at {}", attachment.summary(), args.agent.socket.display()));
    let end = attachment.serve(signals.as_fd())?;
    let gave_up = attachment.gave_guest_up();
    attachment.detach();
    match end {
        End::Exited => say("QEMU has ended"),
        End::Moved(_) => say("the guest has moved away; its QEMU here is paused, and can be ended"),
        End::Stopped if gave_up => {
            say("the agent has ended; the guest was given up, so leave this QEMU paused")
        }
        End::Stopped => say("the agent has ended; QEMU goes on"),
        End::Useless(why) => return Err(why.into()),
    }
    Ok(Exit::Done)
}

/// Tells the operator. Standard output is QEMU's.
fn say(sentence: &str) {
    // Nobody can be told if standard error cannot be written.
    // In one write: the agent and QEMU write there, too.
    let _ = std::io::stderr().write_all(format!("pageferry: {sentence}\n").as_bytes());
}

fn pid(child: &Child) -> Result<rustix::process::Pid, Box<dyn Error>> {
    Ok(rustix::process::Pid::from_child(child))
}

/// Waits for the end of QEMU, which was asked to end or has ended. Returns its exit code; for a
/// signal 128 and its number, as shells do.
fn wait(child: &mut Child) -> Result<u8, Box<dyn Error>> {
    use std::os::unix::process::ExitStatusExt;
    let process = TargetProcess::open(child.id()).ok();
    if let Some(process) = process
        && !process.wait(Some(QUIT_TIMEOUT))?
    {
        log::warn!("QEMU has not ended in {QUIT_TIMEOUT:?} and is killed");
        child.kill()?;
    }
    let status = child.wait()?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(u8::try_from(code).unwrap_or(1))
}
