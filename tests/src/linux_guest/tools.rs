// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the QEMUs and the guest are that `tests/guests/install` made.

use crate::Error;
use std::fmt;
use std::path::{Path, PathBuf};

/// Name of the variable with the folder of the tools.
pub const VARIABLE: &str = "PAGEFERRY_GUESTS";

/// A QEMU that the tests use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuVersion {
    /// QEMU 10.0 of Debian bookworm-backports.
    V10_0,
    /// QEMU 11.1 of Debian trixie-backports.
    V11_1,
}

impl QemuVersion {
    /// All, from old to new.
    pub const ALL: [Self; 2] = [Self::V10_0, Self::V11_1];
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V10_0 => "10.0",
            Self::V11_1 => "11.1",
        })
    }
}

/// The folder that `tests/guests/install` filled.
#[derive(Debug, Clone)]
pub struct QemuTools {
    folder: PathBuf,
}

impl QemuTools {
    /// Looks for the tools in the folder `PAGEFERRY_GUESTS`, or else in `target/guests` of the
    /// workspace.
    ///
    /// # Errors
    /// If one is missing.
    pub fn find() -> Result<Self, Error> {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let workspace = package.parent().unwrap_or(package);
        let folder = std::env::var_os(VARIABLE)
            .map_or_else(|| workspace.join("target/guests"), PathBuf::from);
        let folder = std::path::absolute(&folder)
            .map_err(Error::io(format!("find {}", folder.display())))?;
        let tools = Self { folder };
        let programs = QemuVersion::ALL.map(|version| tools.qemu(version));
        for path in [tools.kernel(), tools.initrd()].iter().chain(&programs) {
            if !path.exists() {
                let reason = format!("{} is missing: run tests/guests/install", path.display());
                return Err(Error::Argument(reason));
            }
        }
        Ok(tools)
    }

    /// The program `qemu-system-x86_64`. It is a script that becomes QEMU: the process id stays.
    pub fn qemu(&self, version: QemuVersion) -> PathBuf {
        self.folder.join(format!("qemu-{version}")).join("qemu-system-x86_64")
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("kernel")
    }

    /// The guest's initial RAM disk, with all its programs.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }
}
