// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An agent process with a folder for images: an ordinary folder, one that is soon full, or one of
//! another user.

use super::{RawClient, SOON};
use crate::deadline::wait_for;
use crate::process::{AgentProcess, program};
use crate::require;
use crate::tmpfs::{Tmpfs, View};
use pageferry_client::JobStatus;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// A folder for images, with its path for the agent and its path for the test.
#[derive(Debug)]
pub struct Folder {
    agents: PathBuf,
    view: Option<View>,
}

impl Folder {
    /// A path for the agent.
    pub fn path(&self, name: &str) -> PathBuf {
        self.agents.join(name)
    }

    /// The path of the same file for the test.
    pub fn seen(&self, name: &str) -> PathBuf {
        self.view.as_ref().map_or_else(|| self.agents.clone(), View::path).join(name)
    }

    /// The names of all its files.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.seen("")).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The names and bytes of all its files.
    pub fn bytes(&self) -> Vec<(String, Vec<u8>)> {
        self.files()
            .into_iter()
            .map(|name| (name.clone(), std::fs::read(self.seen(&name)).unwrap()))
            .collect()
    }

    /// Free bytes in its file system.
    pub fn free(&self) -> u64 {
        self.view.as_ref().unwrap().free().unwrap()
    }

    /// Fills its file system until this many bytes are free.
    pub fn fill(&self, left: u64) {
        let ballast = self.free().checked_sub(left).unwrap();
        std::fs::write(self.seen("ballast"), vec![1; ballast as usize]).unwrap();
        assert_eq!(self.free(), left);
    }

    /// Removes what [`Folder::fill`] wrote.
    pub fn relieve(&self) {
        std::fs::remove_file(self.seen("ballast")).unwrap();
    }
}

/// An agent process and a folder for images.
#[derive(Debug)]
pub struct Host {
    /// The process.
    pub agent: AgentProcess,
    /// The folder.
    pub images: Folder,
    home: tempfile::TempDir,
}

impl Host {
    /// An agent of this user, and an ordinary folder.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same, with `more` arguments of the agent.
    pub fn start_with(more: &[&str]) -> Self {
        Self::start_as(&mut Command::new(program()), more)
    }

    /// The same with another command that runs the program.
    pub fn start_as(command: &mut Command, more: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let agent = AgentProcess::start_with(command, home.path(), "agent", more).unwrap();
        Self { agent, images: Folder { agents: folder_in(&home), view: None }, home }
    }

    /// An agent without privileges, which runs as the user `nobody`. `None` if the machine does not
    /// meet the need `nobody`, because that user cannot run the agent.
    pub fn unprivileged() -> Option<Self> {
        const NOBODY: u32 = 65534;
        if !rustix::process::geteuid().is_root() {
            return Some(Self::start());
        }
        let home = tempfile::tempdir().unwrap();
        let agents = folder_in(&home);
        for folder in [home.path(), &agents] {
            std::os::unix::fs::chown(folder, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let agent = AgentProcess::start(
            Command::new(program()).uid(NOBODY).gid(NOBODY),
            home.path(),
            "agent",
        );
        let agent = require::met("nobody", agent.map_err(Into::into))?;
        Some(Self { agent, images: Folder { agents, view: None }, home })
    }

    /// An agent whose folder has room for this many bytes.
    pub fn cramped(tmpfs: Tmpfs, bytes: u64) -> Self {
        let home = tempfile::tempdir().unwrap();
        let agents = folder_in(&home);
        let mut command = tmpfs.command(&agents, bytes, program());
        let mut agent = AgentProcess::start(&mut command, home.path(), "agent").unwrap();
        let view = View::of(agent.process().id(), &agents).unwrap();
        Self { agent, images: Folder { agents, view: Some(view) }, home }
    }

    /// Kills the agent if it still runs, and starts another one.
    pub fn replace_agent(&mut self) {
        self.agent.process().kill().unwrap();
        self.agent = AgentProcess::spawn(program(), self.home.path(), "agent").unwrap();
    }

    /// The status of the last job, as an operator sees it.
    pub fn status(&self) -> JobStatus {
        RawClient::connect(self.agent.socket()).status()
    }

    /// The final status of the last job, as an operator sees it.
    pub fn ended(&self) -> JobStatus {
        let mut operator = RawClient::connect(self.agent.socket());
        wait_for("the job's end", SOON, || {
            Some(operator.status()).filter(|status| status.phase.is_final())
        })
        .unwrap()
    }
}

fn folder_in(home: &tempfile::TempDir) -> PathBuf {
    let folder = home.path().join("images");
    std::fs::create_dir(&folder).unwrap();
    folder
}
