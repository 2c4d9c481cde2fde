// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hook channel: hooks are dispatched and answered, also if the agent or the VMM fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod answers;
mod lost_agent;
mod ownership;
mod panics;
mod restores;

use pageferry_client::{HookError, Hooks, JobStatus, Phase, StatePiece, Trackers};
use pageferry_protocol::control::hook::Hook;
use pageferry_protocol::control::job::{JobKind, RunState};

pub(crate) const RESUME: Hook = Hook::Resume { force: false, paused: false };
pub(crate) const START: Hook = Hook::StartTracking { sources: Trackers::HOOKS };
pub(crate) const STOP: Hook = Hook::StopTracking { sources: Trackers::HOOKS };

pub(crate) fn event(kind: JobKind, phase: Phase) -> Hook {
    Hook::Event { status: Box::new(JobStatus { job: 1, kind, phase, ..JobStatus::default() }) }
}

/// A VMM that implements only the required hooks.
pub(crate) struct Least;

impl Hooks for Least {
    fn run_state(&mut self) -> Result<RunState, HookError> {
        Ok(RunState::Running)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<StatePiece>, HookError> {
        Ok(Vec::new())
    }
    fn load_state(&mut self, _: Vec<StatePiece>) -> Result<(), HookError> {
        Ok(())
    }
}
