// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arguments of `pageferry agent`, and those of them that do not depend on who starts it: an
//! operator, or `pageferry qemu`, which passes them on.

use super::parse::{parse_block_size, parse_name, parse_store};
use crate::image::seal::KeySource;
use crate::metrics::address;
use crate::sandbox;
use crate::transport::Address;
use crate::trust::{self, Folder, Trust};
use clap::{Args, ValueEnum};
use pageferry_protocol::control::Grants;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// The end of the help of `agent`.
pub(super) const ENVIRONMENT: &str = "\
Environment:
  PAGEFERRY_BASES       folder of the bases of clones, on tmpfs; otherwise
                        /dev/shm/pageferry-UID
  PAGEFERRY_CACHE       folder of the cache of images in stores; otherwise
                        $XDG_CACHE_HOME/pageferry, ~/.cache/pageferry, or
                        /var/cache/pageferry
  PAGEFERRY_CACHE_SIZE  how much the cache keeps, as 500M; otherwise 20G
  AWS_*, GOOGLE_*, AZURE_*
                        credentials and options of the stores of --store
  RUST_LOG              what is logged: warn, info (the default), debug

docs/clones.md explains the bases, docs/store.md the cache and the credentials.";

/// The options that both have.
#[derive(Debug, Args)]
pub struct AgentOptions {
    /// Name of the VM in the log, the status and the metrics. Otherwise the VMM may give one, for
    /// the log and the status.
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// Folder of the certificates for tls:HOST:PORT addresses: ca-cert.pem, and server-cert.pem and
    /// server-key.pem for a destination, client-cert.pem and client-key.pem for a source. What is
    /// in ca-crl.pem is revoked. Files that change are read again. docs/tls.md explains it.
    #[arg(long, value_name = "FOLDER")]
    pub tls: Option<PathBuf>,
    /// File with a token for tls:HOST:PORT addresses, instead of certificates: at least 32 bytes
    /// that nobody can guess, the same at both ends. It is never sent. The file is read again when
    /// it changes. docs/tls.md explains it.
    #[arg(long, value_name = "FILE", conflicts_with = "tls")]
    pub token_file: Option<PathBuf>,
    /// Serve only peers whose certificate has this name. May be given more than once.
    #[arg(long, value_name = "NAME", requires = "tls", conflicts_with = "token_file",
          value_parser = parse_tls_peer)]
    pub tls_peer: Vec<String>,
    /// Whether the agent gives up what it does not need: on; log, it only says what it would
    /// refuse; off. In a sandbox the agent opens files only in folders that a command or its VMM
    /// has named, or --folder. docs/sandbox.md explains it.
    #[arg(
        long,
        value_name = "MODE",
        default_value = "on",
        value_enum,
        hide_possible_values = true
    )]
    pub sandbox: sandbox::Mode,
    /// Let the agent open files in this folder and below it, also if nobody names them: images on
    /// which others build. May be given more than once.
    #[arg(long, value_name = "FOLDER")]
    pub folder: Vec<PathBuf>,
    /// Let the agent use images in this object store: s3://BUCKET, gs://BUCKET, az://CONTAINER or
    /// file:///FOLDER, or only names below s3://BUCKET/FOLDER. The agent gets its credentials from
    /// its environment. May be given more than once. docs/store.md explains it.
    #[arg(long, value_name = "STORE", value_parser = parse_store)]
    pub store: Vec<String>,
    /// Seal images with the key in this file: encrypt and authenticate them. Then only images are
    /// restored that are sealed with it. The file has 32 bytes or 64 hexadecimal digits, and only
    /// its owner may read it. fd:N reads the key from descriptor N, which the agent inherits. An
    /// agent that follows one that died reads it again. docs/snapshots.md explains it.
    #[arg(long, value_name = "FILE|fd:N", value_parser = KeySource::parse)]
    pub image_key: Option<KeySource>,
    /// Let guest memory cross networks in the clear: allow tcp:HOST:PORT also where HOST is not a
    /// loopback address. Whoever is on the way can read and change the guest. Without this option
    /// use tls:HOST:PORT, or unix:PATH.
    #[arg(long)]
    pub insecure: bool,
    /// Serve metrics over HTTP at this address, under /metrics, for Prometheus. A UNIX socket gets
    /// mode 0660. Whoever can connect can read them. docs/metrics.md lists them.
    #[arg(long, value_name = "unix:PATH|HOST:PORT", value_parser = parse_metrics)]
    metrics: Option<String>,
}

/// Checks that a certificate can have this name.
fn parse_tls_peer(text: &str) -> Result<String, String> {
    trust::host_name(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// Checks the address of the metrics, which stays as it was written.
fn parse_metrics(text: &str) -> Result<String, String> {
    address::parse(text).map(|_| text.to_owned())
}

impl AgentOptions {
    /// The address of the metrics.
    pub fn metrics(&self) -> Option<Address> {
        self.metrics.as_deref().and_then(|text| address::parse(text).ok())
    }

    /// Whom the agent trusts.
    ///
    /// # Errors
    /// If nobody can be trusted by that.
    pub fn trust(&self) -> Result<Trust, String> {
        let trust = match (&self.tls, &self.token_file) {
            (Some(folder), _) => Trust::in_folder(folder, &self.tls_peer),
            (None, Some(file)) => Ok(Trust::by_token(file)),
            (None, None) => Ok(Trust::default()),
        };
        trust.map_err(|error| self.not_trusted(&error))
    }

    /// Says which option an error of [`Trust`] is about.
    pub fn not_trusted(&self, error: &dyn std::error::Error) -> String {
        let option = if self.token_file.is_some() { "--token-file" } else { "--tls" };
        format!("{option}: {}", crate::error::chain(error))
    }

    /// What the options name.
    pub fn grants(&self) -> Vec<Grants> {
        let metrics = match self.metrics() {
            Some(Address::Unix(path)) => Some(Grants::default().write(&path)),
            _ => None,
        };
        let folders = self.folder.iter().map(|path| Grants::default().write(&path.join("any")));
        let trusted = self.tls.iter().flat_map(|folder| Folder::files(folder));
        let secrets =
            self.key_file().map(Path::to_owned).into_iter().chain(self.token_file.clone());
        let read = trusted.chain(secrets).map(|file| Grants::default().read(&file));
        metrics.into_iter().chain(folders).chain(read).collect()
    }

    fn key_file(&self) -> Option<&Path> {
        match &self.image_key {
            Some(KeySource::File(path)) => Some(path),
            _ => None,
        }
    }

    /// The arguments by which another agent gets the same options. It may have another current
    /// directory.
    ///
    /// # Errors
    /// If this process has no current directory, and a path is relative to it.
    pub fn to_arguments(&self) -> io::Result<Vec<OsString>> {
        // Without the pattern, an option that is added later would be forgotten here.
        let Self {
            name,
            tls,
            token_file,
            tls_peer,
            sandbox,
            folder,
            store,
            image_key,
            insecure,
            metrics,
        } = self;
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |option: &str, value: OsString| arguments.extend([option.into(), value]);
        name.iter().for_each(|name| add("--name", name.into()));
        match self.metrics() {
            Some(Address::Unix(path)) => {
                let mut address = OsString::from("unix:");
                address.push(std::path::absolute(path)?);
                add("--metrics", address);
            }
            _ => metrics.iter().for_each(|address| add("--metrics", address.into())),
        }
        store.iter().for_each(|store| add("--store", store.into()));
        tls_peer.iter().for_each(|peer| add("--tls-peer", peer.into()));
        let paths = [("--tls", tls.as_slice()), ("--token-file", token_file.as_slice())];
        for (option, paths) in paths.into_iter().chain([("--folder", &folder[..])]) {
            for path in paths {
                add(option, std::path::absolute(path)?.into());
            }
        }
        match image_key {
            Some(KeySource::File(path)) => add("--image-key", std::path::absolute(path)?.into()),
            Some(descriptor) => add("--image-key", descriptor.to_string().into()),
            None => {}
        }
        if let Some(mode) = sandbox.to_possible_value() {
            add("--sandbox", mode.get_name().into());
        }
        if *insecure {
            arguments.push("--insecure".into());
        }
        Ok(arguments)
    }
}

/// How the agent is reached, and what it serves.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Listen on this UNIX socket, created with mode 0600. Only the agent's own user and root may
    /// connect. A socket at this path on which nobody listens is replaced. If anything else is
    /// there, the agent refuses to start. At most 107 bytes. Leave the option out if a socket unit
    /// of systemd starts the agent.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Use standard input as the socket to the VMM. The agent ends when this connection ends.
    #[arg(long)]
    pub stdin: bool,
    /// Options that `pageferry qemu` has, too.
    #[command(flatten)]
    pub options: AgentOptions,
    /// Let `upgrade --to` execute programs in this folder and below it, besides the folder of the
    /// agent's own. May be given more than once.
    #[arg(long, value_name = "FOLDER")]
    pub programs: Vec<PathBuf>,
    /// Be the opener of an agent.
    #[arg(long, value_name = "MODE", hide = true, value_enum)]
    pub opener: Option<sandbox::Mode>,
    /// Be the service of stores of an agent.
    #[arg(long, hide = true)]
    pub store_service: bool,
    /// Serve a virtio balloon to a vhost-user front-end that connects to this UNIX socket. What the
    /// guest gives back by it is freed, and left out of migrations and snapshots.
    #[arg(long, value_name = "PATH")]
    pub balloon: Option<PathBuf>,
    /// Serve a virtio-mem device to a vhost-user front-end that connects to this UNIX socket. Its
    /// region is the block --mem-block, which the VMM hands over as discarded.
    #[arg(long, value_name = "PATH", requires = "mem_block")]
    pub mem: Option<PathBuf>,
    /// Name of the block that is the region of --mem.
    #[arg(long, value_name = "NAME", requires = "mem")]
    pub mem_block: Option<String>,
    /// The unit in which the guest plugs and unplugs memory of --mem: a power of two.
    #[arg(long, value_name = "SIZE", requires = "mem", default_value = "2M",
          value_parser = parse_block_size)]
    pub mem_block_size: u64,
}

impl AgentArgs {
    /// What the arguments name.
    pub fn grants(&self) -> Vec<Grants> {
        let sockets = [&self.socket, &self.balloon, &self.mem].into_iter().flatten();
        let sockets = sockets.map(|path| Grants::default().write(path));
        sockets.chain(self.options.grants()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: AgentOptions,
    }

    #[test]
    fn another_agent_gets_the_same_options() {
        for line in [
            "",
            "--name a --tls /t --tls-peer x --tls-peer y --sandbox log --folder /a --folder /b \
             --store s3://a --store file:///b --image-key fd:7 --insecure --metrics 127.0.0.1:9091",
            "--token-file /token --image-key /key --metrics unix:/run/m --sandbox off",
        ] {
            let parse = |words: Vec<OsString>| {
                let program = [OsString::from("agent")];
                Line::try_parse_from(program.into_iter().chain(words)).unwrap().options
            };
            let options = parse(line.split_whitespace().map(OsString::from).collect());
            let again = parse(options.to_arguments().unwrap());
            assert_eq!(format!("{options:?}"), format!("{again:?}"));
        }
        let line = Line::try_parse_from(["agent", "--folder", "here"]).unwrap();
        let folder = std::path::absolute("here").unwrap().into_os_string();
        assert!(line.options.to_arguments().unwrap().contains(&folder));
    }
}
