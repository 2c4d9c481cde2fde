//! `pageferry agent`.

use super::AgentArgs;
use crate::server::Server;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Each block, stream and stranger is a descriptor, and 509 blocks alone come close to the usual soft limit of 1024.
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

/// Serves until the VMM is gone or a signal comes.
///
/// # Errors
/// If it cannot listen, or the kernel refuses otherwise.
pub fn run(args: &AgentArgs) -> Result<ExitCode, Box<dyn Error>> {
    allow_descriptors();
    let mut server = Server::new()?;
    let (signals, wake) = UnixStream::pair()?;
    let ends = [SIGINT, SIGTERM, SIGHUP];
    for signal in ends.into_iter().filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP)) {
        signal_hook::low_level::pipe::register(signal, wake.try_clone()?)?;
    }
    server.stop_on(signals.into())?;
    if let Some(path) = &args.socket {
        let failed = |error| format!("cannot listen on {}: {}", path.display(), crate::error::chain(&error));
        server.listen(path).map_err(failed)?;
        log::info!("listening on {}", path.display());
    }
    if args.stdin {
        server.inherit(std::io::stdin().as_fd().try_clone_to_owned()?)?;
    }
    server.run()?;
    Ok(ExitCode::SUCCESS)
}
