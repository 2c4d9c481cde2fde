//! `pageferry agent`.

use super::AgentArgs;
use crate::server::Server;
use crate::transport::unix_socket::not_connected;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Each block, stream and stranger is a descriptor, and 509 blocks alone come close to the usual
/// soft limit of 1024.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::debug!("the limit of file descriptors stays {:?}: {errno}", limit.current);
    }
}

/// True if this process was started with `signal` ignored, as `nohup` does with a hangup.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    ignored >> (signal - 1) & 1 == 1
}

/// Exit code for a wrong command line, the same as clap's.
const BAD_INPUT: u8 = 2;

/// The connection that the VMM left to this process as its standard input.
fn inherited() -> Result<OwnedFd, String> {
    let stdin = std::io::stdin();
    match not_connected(stdin.as_fd()) {
        Some(found) => {
            // This is what the Rust library opens in the place of one that is closed.
            let null = rustix::fs::fstat(&stdin).ok().map(|stat| stat.st_rdev)
                == Some(rustix::fs::makedev(1, 3));
            let closed = if null { " (/dev/null, or it is closed)" } else { "" };
            Err(format!(
                "--stdin: standard input is {found}{closed}, allowed is a connected UNIX stream socket"
            ))
        }
        None => {
            let socket = stdin.as_fd().try_clone_to_owned();
            socket.map_err(|error| format!("--stdin: cannot duplicate the socket: {error}"))
        }
    }
}

/// Serves until the VMM is gone or a signal comes.
///
/// # Errors
/// If it cannot listen, or the kernel refuses otherwise.
pub fn run(args: &AgentArgs) -> Result<ExitCode, Box<dyn Error>> {
    let inherited = match args.stdin.then(inherited).transpose() {
        Ok(inherited) => inherited,
        Err(sentence) => {
            eprintln!("pageferry: {sentence}");
            return Ok(ExitCode::from(BAD_INPUT));
        }
    };
    allow_descriptors();
    let mut server = Server::new()?;
    let (signals, wake) = UnixStream::pair()?;
    let ends = [SIGINT, SIGTERM, SIGHUP];
    for signal in ends.into_iter().filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP)) {
        signal_hook::low_level::pipe::register(signal, wake.try_clone()?)?;
    }
    server.stop_on(signals.into())?;
    if let Some(path) = &args.socket {
        let failed =
            |error| format!("cannot listen on {}: {}", path.display(), crate::error::chain(&error));
        server.listen(path).map_err(failed)?;
        log::info!("listening on {}", path.display());
    }
    if let Some(socket) = inherited {
        server.inherit(socket)?;
    }
    server.run()?;
    Ok(ExitCode::SUCCESS)
}
