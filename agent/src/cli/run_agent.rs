//! `pageferry agent`.

use super::AgentArgs;
use crate::server::Server;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Serves until the VMM is gone or a signal comes.
///
/// # Errors
/// If it cannot listen, or the kernel refuses otherwise.
pub fn run(args: &AgentArgs) -> Result<ExitCode, Box<dyn Error>> {
    let mut server = Server::new()?;
    let (signals, wake) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, wake.try_clone()?)?;
    }
    server.stop_on(signals.into())?;
    if let Some(path) = &args.socket {
        server.listen(path).map_err(|error| format!("cannot listen on {}: {error}", path.display()))?;
        log::info!("listening on {}", path.display());
    }
    if args.stdin {
        server.inherit(std::io::stdin().as_fd().try_clone_to_owned()?)?;
    }
    server.run()?;
    Ok(ExitCode::SUCCESS)
}
