// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A server of objects that runs as a child of the test.

use super::tools::{ACCESS_KEY, SECRET_KEY, StoreTools};
use crate::Error;
use crate::process::Process;
use crate::vmm::PATIENCE;
use std::net::SocketAddr;
use std::process::Stdio;

/// The account that every Azurite has. It is documented by Microsoft, and no secret.
const AZURE_ACCOUNT: &str = "devstoreaccount1";

/// The key of [`AZURE_ACCOUNT`].
const AZURE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    /// S3: moto, with checks of signatures and of the hashes of bodies.
    S3,
    /// Azure's blob service: Azurite.
    Azure,
}

impl StoreKind {
    /// All.
    pub const ALL: [Self; 2] = [Self::S3, Self::Azure];
}

/// A server whose buckets or containers are there. Its objects are in memory, and are gone when
/// this is dropped. It ends also if the test is killed.
#[derive(Debug)]
pub struct StoreServer {
    kind: StoreKind,
    address: SocketAddr,
    process: Process,
}

impl StoreServer {
    /// Starts a server on a free port, with these buckets or containers.
    ///
    /// # Errors
    /// If it does not start, or refuses the name of a bucket.
    pub fn start(tools: &StoreTools, kind: StoreKind, buckets: &[&str]) -> Result<Self, Error> {
        // The pipe is closed when this process ends, however it does. Then the server ends.
        let mut command = tools.server(kind, buckets);
        let mut process =
            Process::spawn_with_stdin(&format!("{kind:?}"), &mut command, Stdio::piped())?;
        let line = process.wait_for_line("listens on http://", PATIENCE)?;
        let address = line.rsplit('/').next().and_then(|address| address.parse().ok());
        let address = address.ok_or_else(|| Error::Mismatch(format!("no address in: {line}")))?;
        Ok(Self { kind, address, process })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process, for example to freeze it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The URL of an object or of a prefix, as the command line takes it.
    pub fn url(&self, bucket: &str, name: &str) -> String {
        let scheme = match self.kind {
            StoreKind::S3 => "s3",
            StoreKind::Azure => "az",
        };
        format!("{scheme}://{bucket}/{name}")
    }

    /// The environment variables with which the crate object_store finds this server.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        self.environment_at(self.address)
    }

    /// The same, through a proxy that listens at `address`.
    pub fn environment_at(&self, address: SocketAddr) -> Vec<(&'static str, String)> {
        match self.kind {
            StoreKind::S3 => vec![
                ("AWS_ENDPOINT", format!("http://{address}")),
                ("AWS_ALLOW_HTTP", "true".to_owned()),
                ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
                ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
                ("AWS_REGION", "us-east-1".to_owned()),
            ],
            // Not AZURE_STORAGE_USE_EMULATOR: with it object_store takes the address only from
            // the environment of its own process.
            StoreKind::Azure => vec![
                ("AZURE_STORAGE_ENDPOINT", format!("http://{address}/{AZURE_ACCOUNT}")),
                ("AZURE_ALLOW_HTTP", "true".to_owned()),
                ("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT.to_owned()),
                ("AZURE_STORAGE_ACCOUNT_KEY", AZURE_KEY.to_owned()),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::require;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    #[test]
    fn a_server_refuses_who_does_not_sign_and_ends_with_the_test() {
        let Some(tools) = require::stores() else { return };
        for kind in StoreKind::ALL {
            let server = StoreServer::start(&tools, kind, &["images", "more"]).unwrap();
            let mut client = TcpStream::connect(server.address()).unwrap();
            let path = server.environment()[0].1.splitn(4, '/').nth(3).unwrap_or("").to_owned();
            write!(client, "GET /{path}/images/guest HTTP/1.1\r\nHost: localhost\r\n").unwrap();
            write!(client, "Connection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            // Azure does not tell strangers what exists.
            let refused = answer.contains(" 403 ") || answer.contains(" 404 ");
            assert!(refused, "{kind:?}: {answer}");
            let address = server.address();
            drop(server);
            assert!(TcpStream::connect(address).is_err());
        }
    }
}
