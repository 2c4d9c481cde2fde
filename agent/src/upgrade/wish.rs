// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The request for an upgrade, from its check until the reactor's thread takes it.

use super::program::{Program, ProgramError};
use crate::lock::lock;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};

/// Whether this agent can be upgraded, and to which program.
#[derive(Debug, Default)]
pub struct UpgradeWish {
    /// The thread that checks programs, if this agent can be upgraded.
    checker: OnceLock<Sender<Check>>,
    state: Mutex<State>,
}

/// A program to check: its path, and where the outcome goes.
type Check = (PathBuf, SyncSender<Result<Program, ProgramError>>);

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
    ///
    /// Programs are executed and checked on a thread that the calling one starts: the threads of
    /// connections may not execute any.
    ///
    /// # Errors
    /// If the kernel refuses a thread.
    pub fn allow(&self, own: Program) -> io::Result<()> {
        let (checker, checks) = channel::<Check>();
        let run = move || {
            for (path, outcome) in checks {
                let checked = own.at_path(&path).and_then(|program| {
                    program.check()?;
                    Ok(program)
                });
                // Fails if nobody waits any more.
                let _ = outcome.send(checked);
            }
        };
        std::thread::Builder::new().name("upgrade".into()).spawn(run)?;
        // It is called once.
        let _ = self.checker.set(checker);
        Ok(())
    }

    /// Checks that `path`, or the agent's own program if that is empty, may be and can be executed.
    /// If so, it is the one of the next upgrade, and [`UpgradeWish::want`] must follow.
    ///
    /// Waits for the program, which says its version.
    ///
    /// # Errors
    /// If this agent cannot be upgraded, another upgrade is under way, or the program is refused.
    pub fn check(&self, path: &str) -> Result<(), ProgramError> {
        let checker = self.checker.get().ok_or(ProgramError::NotUpgradable)?;
        let mut state = lock(&self.state);
        match &*state {
            State::None => *state = State::Checking,
            State::Checking => return Err(ProgramError::UnderWay(None)),
            State::Checked(program) | State::Wanted(program) => {
                return Err(ProgramError::UnderWay(Some(program.path().to_owned())));
            }
        }
        drop(state);
        let (outcome, checked) = sync_channel(1);
        let asked = checker.send((path.into(), outcome));
        // The thread ends only by a panic.
        let checked = asked.ok().and_then(|()| checked.recv().ok());
        let (checked, outcome) = match checked.unwrap_or(Err(ProgramError::NotUpgradable)) {
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
