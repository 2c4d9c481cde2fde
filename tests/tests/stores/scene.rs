// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A store, a proxy in front of it, a cache, and agents that use them.

use pageferry_tests::process::program;
use pageferry_tests::scenario::Host;
use pageferry_tests::scenario::image_guest::{Guest, assert_completed, background};
use pageferry_tests::stores::faults::{FaultProxy, Request};
use pageferry_tests::stores::{StoreKind, StoreServer, StoreTools};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A store that only one test uses.
pub struct Scene {
    root: String,
    environment: Vec<(&'static str, String)>,
    pub proxy: Option<FaultProxy>,
    pub cache: tempfile::TempDir,
    _server: Option<StoreServer>,
    _folder: tempfile::TempDir,
}

impl Scene {
    /// A server of this kind, behind a proxy.
    pub fn served(tools: &StoreTools, kind: StoreKind) -> Self {
        let server = StoreServer::start(tools, kind, &["images"]).unwrap();
        let proxy = FaultProxy::to(server.address(), 7).unwrap();
        let folder = tempfile::tempdir().unwrap();
        // The name is that of nobody else, so that its processes are found by it.
        let name = folder.path().file_name().unwrap().to_str().unwrap().replace('.', "");
        Self {
            root: server.url("images", &name),
            environment: server.environment_at(proxy.address()),
            proxy: Some(proxy),
            cache: tempfile::tempdir().unwrap(),
            _server: Some(server),
            _folder: folder,
        }
    }

    /// The same, whose agents wait for an answer of the store for as long as any test runs.
    pub fn patient(mut self) -> Self {
        self.environment.push(("AWS_TIMEOUT", "1h".to_owned()));
        self
    }

    /// A server with an image that another machine has saved: of a guest with so many pages, all of
    /// them with content. Returns the name of the image and the memory of the guest, too.
    #[track_caller]
    pub fn with_image(tools: &StoreTools, pages: u64) -> (Self, PathBuf, Vec<u8>) {
        let mut scene = Self::served(tools, StoreKind::S3);
        let name = scene.name("guest");
        let host = scene.host();
        let guest = Guest::full(&host, pages);
        assert_completed(&guest.wait(guest.snapshot(&name, &background())));
        scene.other_machine();
        (scene, name, guest.bytes())
    }

    /// A folder.
    pub fn folder() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            root: format!("file://{}", folder.path().display()),
            environment: Vec::new(),
            proxy: None,
            cache: tempfile::tempdir().unwrap(),
            _server: None,
            _folder: folder,
        }
    }

    /// The name of an image.
    pub fn name(&self, name: &str) -> PathBuf {
        format!("{}/{name}", self.root).into()
    }

    /// Another machine has another cache.
    pub fn other_machine(&mut self) {
        self.cache = tempfile::tempdir().unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.envs(self.environment.iter().cloned()).env("PAGEFERRY_CACHE", self.cache.path());
        command
    }

    /// An agent that may use the store.
    pub fn host(&self) -> Host {
        Host::start_as(&mut self.command(), &["--store", &self.root])
    }

    /// An agent with these arguments alone.
    pub fn host_with(&self, more: &[&str]) -> Host {
        Host::start_as(&mut self.command(), more)
    }

    /// What `pageferry image` does.
    pub fn image(&self, words: &[&str], name: &Path) -> Output {
        self.command().arg("image").args(words).arg(name).output().unwrap()
    }

    /// What `pageferry image ... --json` says.
    #[track_caller]
    pub fn said(&self, words: &[&str], name: &Path) -> Value {
        let output = self.image(&[words, &["--json"]].concat(), name);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The names of the images in the store.
    pub fn listed(&self) -> Vec<String> {
        self.listed_at(Path::new(&self.root))
    }

    /// The image of this name, and those below it.
    pub fn listed_at(&self, name: &Path) -> Vec<String> {
        let said = self.said(&["list"], name);
        let images = said["images"].as_array().unwrap().iter();
        images.map(|image| image["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Bytes in the store of the only image that is there.
    pub fn stored_bytes(&self) -> u64 {
        let said = self.said(&["list"], Path::new(&self.root));
        said["images"][0]["stored_bytes"].as_u64().unwrap()
    }

    /// Removes what belongs to no image.
    pub fn prune(&self) -> Value {
        self.said(&["prune", "--older-than", "0s"], Path::new(&self.root))
    }

    /// The reads of packs so far.
    pub fn reads(&self) -> Vec<Request> {
        let requests = self.proxy.as_ref().unwrap().requests().into_iter();
        requests.filter(|it| it.method == "GET" && it.target.contains(".parts/")).collect()
    }

    /// The process of the service of this store, once an agent has started it.
    pub fn service(&self) -> Option<u32> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|id: &u32| {
            let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("--store-service") && line.contains(&self.root)
        })
    }

    /// Kills that process.
    pub fn kill_service(&self) {
        let id = self.service().expect("there is a service");
        let id = rustix::process::Pid::from_raw(id.cast_signed()).unwrap();
        rustix::process::kill_process(id, rustix::process::Signal::KILL).unwrap();
    }
}
