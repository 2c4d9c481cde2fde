// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The request of an operator for an upgrade, until the reactor's thread takes it.

use super::program::{Program, ProgramError};
use crate::lock::lock;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

/// Whether this agent can be upgraded, and to which program.
#[derive(Debug, Default)]
pub struct UpgradeWish {
    /// The program of this process, if it can be upgraded.
    own: OnceLock<Program>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The program that the last request named.
    named: Option<Program>,
    is_wanted: bool,
}

impl UpgradeWish {
    /// From now on this agent can be upgraded. `own` is its program.
    pub fn allow(&self, own: Program) {
        // It is called once.
        let _ = self.own.set(own);
    }

    /// Checks that `path`, or the agent's own program if that is empty, may be and can be executed.
    /// It is the one of the next upgrade.
    ///
    /// Waits for the program, which says its version.
    ///
    /// # Errors
    /// If this agent cannot be upgraded, or the program is refused.
    pub fn check(&self, path: &str) -> Result<(), ProgramError> {
        let own = self.own.get().ok_or(ProgramError::NotUpgradable)?;
        let named = match path {
            "" => None,
            path => Some(own.replaced_by(Path::new(path))?),
        };
        named.as_ref().unwrap_or(own).check_version()?;
        lock(&self.state).named = named;
        Ok(())
    }

    /// The upgrade that was checked is to be made.
    pub fn want(&self) {
        lock(&self.state).is_wanted = true;
    }

    /// True once an upgrade was asked for.
    pub fn is_wanted(&self) -> bool {
        lock(&self.state).is_wanted
    }

    /// The program of the upgrade.
    pub fn program(&self) -> Option<Program> {
        lock(&self.state).named.clone().or_else(|| self.own.get().cloned())
    }
}
