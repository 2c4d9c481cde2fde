// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The request for an upgrade, from its check until the reactor's thread takes it.

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
enum State {
    /// Nobody has asked.
    #[default]
    None,
    /// A program says its version.
    Checking,
    /// The program is good. Whoever asked does not know that yet.
    Checked(Program),
    /// It is to be executed.
    Wanted(Program),
}

impl UpgradeWish {
    /// From now on this agent can be upgraded. `own` is its program.
    pub fn allow(&self, own: Program) {
        // It is called once.
        let _ = self.own.set(own);
    }

    /// Checks that `path`, or the agent's own program if that is empty, may be and can be executed.
    /// If so, it is the one of the next upgrade, and [`UpgradeWish::want`] must follow.
    ///
    /// Waits for the program, which says its version.
    ///
    /// # Errors
    /// If this agent cannot be upgraded, another upgrade is under way, or the program is refused.
    pub fn check(&self, path: &str) -> Result<(), ProgramError> {
        let own = self.own.get().ok_or(ProgramError::NotUpgradable)?;
        let mut state = lock(&self.state);
        match &*state {
            State::None => *state = State::Checking,
            State::Checking => return Err(ProgramError::UnderWay(None)),
            State::Checked(program) | State::Wanted(program) => {
                return Err(ProgramError::UnderWay(Some(program.path().to_owned())));
            }
        }
        drop(state);
        let checked = own.at_path(Path::new(path)).and_then(|program| {
            program.check()?;
            Ok(program)
        });
        let (checked, outcome) = match checked {
            Ok(program) => (State::Checked(program), Ok(())),
            Err(error) => (State::None, Err(error)),
        };
        *lock(&self.state) = checked;
        outcome
    }

    /// The upgrade that was checked is to be made.
    pub fn want(&self) {
        let mut state = lock(&self.state);
        *state = match std::mem::take(&mut *state) {
            State::Checked(program) => State::Wanted(program),
            state => state,
        };
    }

    /// The program that is to be executed.
    pub fn wanted(&self) -> Option<Program> {
        match &*lock(&self.state) {
            State::Wanted(program) => Some(program.clone()),
            State::None | State::Checking | State::Checked(_) => None,
        }
    }
}
