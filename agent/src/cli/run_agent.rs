// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry agent`: sets the process up, which is in its sandbox, and runs the server.
//!
//! The server listens on a UNIX socket, or on one that systemd has handed over, or serves the
//! connection that the process inherited as standard input, or both. It ends on SIGINT, SIGTERM or
//! SIGHUP, and when the inherited connection ends. On SIGUSR2 the process executes its program
//! again ([`crate::upgrade`]).

use super::agent_args::AgentArgs;
use super::exit::Exit;
use super::log_writer::LogEnd;
use super::open_files;
use super::signals;
use crate::devices::mem::port::MemOptions;
use crate::devices::registry::NewDevice;
use crate::image::ImageKey;
use crate::image::seal::{KeySource, handover};
use crate::memory::bus_guard;
use crate::sandbox::Sandbox;
use crate::server::Server;
use crate::systemd::{Notifier, inherited_listener};
use crate::transport::unix_socket::not_connected;
use crate::transport::{Address, Listener, PlainNetworks};
use crate::upgrade::program::Program;
use crate::upgrade::{self, handed_over};
use crate::vm_name::VmName;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The connection to the VMM that this process has inherited as its standard input.
fn inherited() -> Result<OwnedFd, String> {
    let stdin = std::io::stdin();
    match not_connected(stdin.as_fd()) {
        Some(found) => {
            // If standard input is closed, the Rust library opens /dev/null in its place.
            let null = rustix::fs::fstat(&stdin).ok().map(|stat| stat.st_rdev)
                == Some(rustix::fs::makedev(1, 3));
            let closed = if null { " (/dev/null, or it is closed)" } else { "" };
            Err(format!(
                "--stdin: standard input is {found}{closed}, \
                 but must be a connected UNIX stream socket"
            ))
        }
        None => {
            let socket = stdin.as_fd().try_clone_to_owned();
            socket.map_err(|error| format!("--stdin: cannot duplicate the socket: {error}"))
        }
    }
}

/// The connection to the VMM and the listening socket that this process has inherited. Refuses
/// arguments without any socket, and with two listening sockets.
fn inherited_sockets(args: &AgentArgs) -> Result<(Option<OwnedFd>, Option<OwnedFd>), String> {
    let activated = inherited_listener().map_err(|error| crate::error::chain(&error))?;
    match (&args.socket, &activated) {
        (Some(_), Some(_)) => Err("--socket: systemd has handed over a socket already \
                                   (LISTEN_FDS): leave the option out"
            .to_owned()),
        (None, None) if !args.stdin => Err("no socket: give --socket PATH or --stdin, or have a \
                                            socket unit of systemd start the agent (LISTEN_FDS)"
            .to_owned()),
        _ => Ok((args.stdin.then(inherited).transpose()?, activated)),
    }
}

/// The notifier for the service manager, if this process is a service. An agent with `--stdin` is
/// none: its variables would be those of its VMM.
fn notifier() -> Option<Notifier> {
    Notifier::from_environment().unwrap_or_else(|error| {
        // It may be the variable of another service, so this is no reason to end.
        log::warn!("{}", crate::error::chain(&error));
        None
    })
}

/// Listens for scrapes of the metrics.
fn listen_for_metrics(address: &Address) -> Result<Listener, String> {
    let listening = crate::metrics::address::listen(address);
    listening.map_err(|error| format!("--metrics: {}", crate::error::chain(&error)))
}

/// The key of images. A program that was upgraded has that of the program before it.
fn image_key(source: Option<&KeySource>, is_upgraded: bool) -> Result<Option<ImageKey>, String> {
    if is_upgraded {
        match handover::kept() {
            Ok(Some(key)) => return Ok(Some(key)),
            Ok(None) => {}
            Err(error) => log::error!("the image key is lost: {}", crate::error::chain(&error)),
        }
    }
    let Some(source) = source else { return Ok(None) };
    let read = source.read();
    let key =
        read.map_err(|error| format!("--image-key {source}: {}", crate::error::chain(&error)))?;
    log::info!("images are sealed with the key in {source}");
    Ok(Some(key))
}

/// Runs the agent until the inherited connection ends or a signal is received.
///
/// # Errors
/// If the agent cannot listen, or the kernel refuses a descriptor or a signal handler.
pub fn run(
    args: &AgentArgs, sandbox: Sandbox, vm_name: VmName, log: Option<&LogEnd>,
) -> Result<Exit, Box<dyn Error>> {
    let options = &args.options;
    if let Some(warning) = sandbox.warning {
        log::warn!("{warning}");
    }
    bus_guard::install();
    let program = Program::of_this_process()?;
    let handed_over = handed_over()?;
    // The variables of systemd are about a socket that was taken over before.
    let sockets = if handed_over.is_some() { Ok((None, None)) } else { inherited_sockets(args) };
    let (inherited, activated) = match sockets {
        Ok(sockets) => sockets,
        Err(sentence) => {
            eprintln!("pageferry: {sentence}");
            return Ok(Exit::BadInput);
        }
    };
    let notifier = if args.stdin { None } else { notifier() };
    open_files::raise_limit();
    open_files::check_limit()?;
    let is_upgraded = handed_over.is_some();
    // The guest may need this agent, and can do without what else it serves.
    let unless_upgraded = |failed: String| match is_upgraded {
        true => {
            log::error!("{failed}; the agent goes on all the same");
            Ok(())
        }
        false => Err(failed),
    };
    let metrics = match options.metrics().as_ref().map(listen_for_metrics) {
        Some(Err(failed)) => unless_upgraded(failed).map(|()| None)?,
        listening => listening.transpose()?,
    };
    let trust = options.trust()?;
    let checked = trust.check().map_err(|error| options.not_trusted(&error));
    checked.or_else(unless_upgraded)?;
    // No error: an agent that takes over may do without.
    for (option, folder) in options
        .folder
        .iter()
        .map(|folder| ("--folder", folder))
        .chain(args.programs.iter().map(|folder| ("--programs", folder)))
    {
        if !folder.is_dir() {
            log::warn!("{option} {}: there is no such folder", folder.display());
        }
    }
    for doubt in trust.doubts() {
        log::warn!("{}", options.not_trusted(&doubt));
    }
    let image_key = image_key(options.image_key.as_ref(), is_upgraded)?;
    let mut server = Server::new(vm_name)?;
    server.trust(trust);
    if let Some(refusals) = sandbox.refusals {
        server.log_refusals(refusals)?;
    }
    if let Some(key) = image_key.clone() {
        server.seal_images_with(key);
    }
    if options.insecure {
        server.plain_networks(PlainNetworks::Allowed);
    }
    let (signals, wake) = UnixStream::pair()?;
    let mut ends = vec![SIGINT, SIGTERM];
    // As `nohup` starts it.
    if !signals::is_ignored(SIGHUP) {
        ends.push(SIGHUP);
    }
    for signal in &ends {
        signal_hook::low_level::pipe::register(*signal, wake.try_clone()?)?;
    }
    server.stop_on(signals.into())?;
    if args.stdin {
        // It is a part of its VMM, which starts the next one.
        upgrade::ignore_requests();
    } else {
        let (upgrades, wake) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(SIGUSR2, wake)?;
        server.upgrade_on(upgrades, program)?;
    }
    if let Some(handed_over) = handed_over {
        log::info!("upgraded to version {}", env!("CARGO_PKG_VERSION"));
        server.listen_again(handed_over, args.socket.as_deref())?;
    } else if let Some(path) = &args.socket {
        let failed =
            |error| format!("cannot listen on {}: {}", path.display(), crate::error::chain(&error));
        server.listen(path).map_err(failed)?;
        log::info!("listening on {}", path.display());
    }
    if let Some(socket) = activated {
        server.listen_on_inherited(socket)?;
        log::info!("listening on the socket of systemd");
    }
    if let Some(socket) = inherited {
        server.inherit(socket)?;
    }
    if let Some(listener) = metrics {
        log::info!("metrics on {}", listener.address());
        server.serve_metrics(listener)?;
    }
    if let Some(path) = &args.balloon {
        let failed =
            |error| format!("--balloon {}: {}", path.display(), crate::error::chain(&error));
        match server.serve_device(NewDevice::Balloon, path).map_err(failed) {
            Ok(()) => log::info!("balloon on {}", path.display()),
            Err(failed) => unless_upgraded(failed)?,
        }
    }
    if let Some((path, block)) = args.mem.as_ref().zip(args.mem_block.clone()) {
        let failed = |error| format!("--mem {}: {}", path.display(), crate::error::chain(&error));
        let options = MemOptions { block, block_size: args.mem_block_size };
        match server.serve_device(NewDevice::Mem(options), path).map_err(failed) {
            Ok(()) => log::info!("virtio-mem on {}", path.display()),
            Err(failed) => unless_upgraded(failed)?,
        }
    }
    if let Some(notifier) = notifier {
        notifier.ready();
        server.report_to(notifier);
    }
    let Some(upgrade) = server.run()? else { return Ok(Exit::Done) };
    // From here on a signal ends the process, which then has no handler any more.
    upgrade::default_signals(&ends);
    if server.was_asked_to_end() {
        upgrade.control.forget(args.socket.as_deref());
        return Ok(Exit::Done);
    }
    if upgrade.job_continues {
        std::mem::forget(server);
    } else {
        // Its paths are bound again by the next program.
        drop(server);
    }
    log::info!("executing {}", upgrade.program.path().display());
    let write_log = || log.iter().for_each(|log| log.finish());
    let control = upgrade.control.with_image_key(image_key.as_ref())?;
    drop(image_key);
    Err(control.execute(&upgrade.program, write_log).into())
}
