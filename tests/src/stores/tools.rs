// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the servers are that `tests/stores/install` got.

use super::StoreKind;
use crate::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name of the variable with the folder of the servers.
pub const VARIABLE: &str = "PAGEFERRY_STORES";

/// Access key of the S3 server.
pub const ACCESS_KEY: &str = "pageferry";

/// Secret key of the S3 server.
pub const SECRET_KEY: &str = "secret-of-the-tests";

/// The folder that `tests/stores/install` filled, and the programs that start the servers.
#[derive(Debug, Clone)]
pub struct StoreTools {
    /// `tests/stores`.
    programs: PathBuf,
    folder: PathBuf,
}

impl StoreTools {
    /// Looks for the servers in the folder `PAGEFERRY_STORES`, or else in `target/stores` of the
    /// workspace.
    ///
    /// # Errors
    /// If the folder is missing or not complete.
    pub fn find() -> Result<Self, Error> {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let workspace = package.parent().unwrap_or(package);
        let folder = std::env::var_os(VARIABLE)
            .map_or_else(|| workspace.join("target/stores"), PathBuf::from);
        let folder = std::path::absolute(&folder)
            .map_err(Error::io(format!("find {}", folder.display())))?;
        // It is written last.
        let stamp = folder.join("stamp");
        if !stamp.exists() {
            let reason = format!("{} is missing: run tests/stores/install", stamp.display());
            return Err(Error::Argument(reason));
        }
        Ok(Self { programs: package.join("stores"), folder })
    }

    /// A command that starts a server of this kind with these buckets or containers.
    pub fn server(&self, kind: StoreKind, buckets: &[&str]) -> Command {
        let mut command = match kind {
            StoreKind::S3 => {
                let mut command = Command::new(self.folder.join("s3/bin/python"));
                command.arg(self.programs.join("s3-server")).args([ACCESS_KEY, SECRET_KEY]);
                command
            }
            StoreKind::Azure => {
                let mut command = Command::new("node");
                command.arg(self.programs.join("azure-server"));
                command.arg(self.folder.join("azure/node_modules/azurite"));
                command
            }
        };
        command.args(buckets);
        command
    }
}
