// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's command line, rewritten so that an agent can hold the guest's memory.
//!
//! QEMU must take the guest's memory from files that the launcher makes and shares with the agent.
//! The user's options do not say so. [`plan`] reads them and answers with the files to make and
//! with the new command line. The caller makes the files, and says by which descriptors QEMU
//! inherits them:
//!
//! ```
//! # use pageferry_attach::qemu::command_line::{Purpose, Settings, plan};
//! let arguments = ["qemu-system-x86_64", "-m", "512"].map(Into::into);
//! let settings = Settings {
//!     purpose: Purpose::Run,
//!     monitor: "/run/guest.qmp".as_ref(),
//!     huge_page_size: None,
//!     default_huge_page_size: 2 << 20,
//! };
//! let plan = plan(&arguments, &settings, &|_path| None)?;
//! assert_eq!(plan.files()[0].size, 512 << 20);
//! let arguments = plan.arguments(|_index| 7);
//! assert!(arguments.iter().any(|argument| argument == "memory-backend=pageferry-ram"));
//! # Ok::<(), pageferry_attach::qemu::command_line::Error>(())
//! ```
//!
//! Nothing here touches files or processes. The modules:
//!
//! - `options`: which argument is an option, and which is an option's value;
//! - `key_values` and `size`: the syntax of values;
//! - `refusals`: options that cannot be used;
//! - `memory_object`: one `-object` that is memory.
//!
//! What is added comes before the arguments of the user, so that it cannot become the value of an
//! incomplete last option. Everything that is not about memory is passed on as it is.

mod error;
mod key_values;
mod memory_object;
mod options;
mod refusals;
mod size;

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

pub use error::Error;
use key_values::KeyValues;
use memory_object::{HugePages, Object};
use options::Item;

/// Name of the memory object that stands for the memory of `-m`.
pub const RAM: &str = "pageferry-ram";

/// Memory of a machine for which the user gives no size: QEMU's default on x86.
const DEFAULT_RAM_SIZE: u64 = 128 << 20;

/// QEMU rounds the size of `-m` up to this.
const RAM_SIZE_GRANULE: u64 = 8 << 10;

/// Size of the smallest page.
const PAGE_SIZE: u64 = 4 << 10;

/// What QEMU is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It runs a guest.
    Run,
    /// It waits for a guest that arrives by migration.
    Receive,
}

/// How the launcher wants QEMU to be started.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// What QEMU is started for.
    pub purpose: Purpose,
    /// Unix socket at which QEMU listens for pageferry's own QMP monitor.
    pub monitor: &'a Path,
    /// Size in bytes of the pages of the memory that `-m` makes; `None` for normal pages. It wins
    /// over the pages of `-mem-path`.
    pub huge_page_size: Option<u64>,
    /// Size in bytes of the system's default huge pages (`Hugepagesize` of `/proc/meminfo`), for
    /// memory objects that ask for huge pages and for no size.
    pub default_huge_page_size: u64,
}

/// A memory file that QEMU is to inherit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFile {
    /// Name of QEMU's memory object.
    pub name: String,
    /// Size in bytes: a positive multiple of the size of its pages.
    pub size: u64,
    /// Size in bytes of its huge pages; `None` for normal pages.
    pub huge_page_size: Option<u64>,
}

impl MemoryFile {
    fn new(name: String, size: u64, huge_page_size: Option<u64>) -> Result<Self, Error> {
        let page_size = huge_page_size.unwrap_or(PAGE_SIZE);
        if size == 0 || page_size == 0 || !size.is_multiple_of(page_size) {
            return Err(Error::SizeNotInPages { name, size, page_size });
        }
        Ok(MemoryFile { name, size, huge_page_size })
    }
}

/// The files to make, and the command line that uses them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    files: Vec<MemoryFile>,
    arguments: Vec<Argument>,
    starts_paused: bool,
}

/// An argument of the new command line.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Argument {
    /// Known.
    Plain(OsString),
    /// It holds the number of a file's descriptor.
    Descriptor { before: String, file: usize, after: &'static str },
}

impl Plan {
    /// The memory files that QEMU is to inherit, in an order that depends on the arguments only.
    pub fn files(&self) -> &[MemoryFile] {
        &self.files
    }

    /// The new command line, beginning with the program.
    ///
    /// `descriptor` gives the number that the file of an index has in QEMU's process.
    pub fn arguments(&self, descriptor: impl Fn(usize) -> RawFd) -> Vec<OsString> {
        let fill = |argument: &Argument| match argument {
            Argument::Plain(text) => text.clone(),
            Argument::Descriptor { before, file, after } => {
                format!("{before}{}{after}", descriptor(*file)).into()
            }
        };
        self.arguments.iter().map(fill).collect()
    }

    /// Whether the user gave `-S`: the guest is not to run until the user says so.
    pub fn starts_paused(&self) -> bool {
        self.starts_paused
    }
}

/// Plans how QEMU is started with the user's `arguments`, which begin with the program.
///
/// `huge_page_size_of` says which size in bytes the pages of a path have, if it is on hugetlbfs.
///
/// # Errors
///
/// Fails if an option cannot be used with an agent, or if an option about memory is not understood.
pub fn plan(
    arguments: &[OsString], settings: &Settings<'_>,
    huge_page_size_of: &dyn Fn(&Path) -> Option<u64>,
) -> Result<Plan, Error> {
    let (program, rest) = arguments.split_first().ok_or(Error::NoProgram)?;
    let items = options::split(rest);
    refusals::refuse(&items, settings.purpose)?;

    let huge_pages =
        HugePages { default: settings.default_huge_page_size, of_path: huge_page_size_of };
    let user = rewrite_objects(&items, &huge_pages)?;
    let ram = machine_ram(&items, &user.memory, settings, huge_page_size_of)?;

    let mut plan = Plan {
        files: user.files,
        arguments: vec![Argument::Plain(program.clone())],
        starts_paused: items.iter().any(|item| item.name() == Some("S")),
    };
    plan.add_monitor(settings.monitor);
    if settings.purpose == Purpose::Receive {
        plan.add_receive();
    }
    let replaces_ram = ram.is_some();
    if let Some(ram) = ram {
        plan.add_ram(ram);
    }
    for (item, mut arguments) in items.iter().zip(user.arguments) {
        // QEMU allows -mem-path only for memory that it makes itself. -mem-prealloc stays: it sets
        // prealloc=on of every memory object.
        if !(replaces_ram && item.name() == Some("mem-path")) {
            plan.arguments.append(&mut arguments);
        }
    }
    Ok(plan)
}

impl Plan {
    fn add(&mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) {
        self.arguments.extend(arguments.into_iter().map(|text| Argument::Plain(text.into())));
    }

    /// Adds the memory that `-m` asks for. Options about the machine are merged by QEMU.
    fn add_ram(&mut self, ram: MemoryFile) {
        let size = ram.size;
        self.add(["-machine", &format!("memory-backend={RAM}"), "-object"]);
        self.arguments.push(Argument::Descriptor {
            before: format!(
                "memory-backend-file,id={RAM},size={size},share=on,mem-path=/proc/self/fd/"
            ),
            file: self.files.len(),
            after: "",
        });
        self.files.push(ram);
    }

    fn add_monitor(&mut self, path: &Path) {
        let mut socket = OsString::from("unix:");
        socket.push(escape(path.as_os_str()));
        socket.push(",server=on,wait=off");
        // Not -mon, which QEMU 11.1 calls deprecated.
        self.add([OsString::from("-qmp"), socket]);
    }

    fn add_receive(&mut self) {
        self.add(["-incoming", "defer"]);
        if !self.starts_paused {
            self.add(["-S"]);
        }
    }
}

/// The arguments of the user with memory objects rewritten.
#[derive(Default)]
struct UserArguments {
    /// The arguments of each item.
    arguments: Vec<Vec<Argument>>,
    files: Vec<MemoryFile>,
    /// Names of all memory objects.
    memory: Vec<String>,
}

fn rewrite_objects(items: &[Item], huge_pages: &HugePages<'_>) -> Result<UserArguments, Error> {
    let mut user = UserArguments::default();
    for item in items {
        let arguments = match item {
            Item::Image(image) => vec![Argument::Plain(image.clone())],
            Item::Option { written, value: None } => vec![Argument::Plain(written.clone())],
            Item::Option { written, value: Some(value) } => {
                let object = match item.name() {
                    Some("object") => memory_object::rewrite(value, huge_pages)?,
                    _ => Object::Other,
                };
                vec![Argument::Plain(written.clone()), user.object(object, value)]
            }
        };
        user.arguments.push(arguments);
    }
    Ok(user)
}

impl UserArguments {
    /// Remembers an object, and gives its new value.
    fn object(&mut self, object: Object, value: &OsStr) -> Argument {
        match object {
            Object::Other => Argument::Plain(value.to_owned()),
            Object::SharedFile { id } => {
                self.memory.push(id);
                Argument::Plain(value.to_owned())
            }
            Object::Memory { file, before, after } => {
                self.memory.push(file.name.clone());
                self.files.push(file);
                Argument::Descriptor { before, file: self.files.len() - 1, after }
            }
        }
    }
}

/// The memory that QEMU would make by itself, unless the user gives it memory objects.
fn machine_ram(
    items: &[Item], memory: &[String], settings: &Settings<'_>,
    huge_page_size_of: &dyn Fn(&Path) -> Option<u64>,
) -> Result<Option<MemoryFile>, Error> {
    let machine = Values::of(items, &["machine", "M"], "type");
    if let Some(id) = machine.last("memory-backend") {
        return if memory.contains(&id) { Ok(None) } else { Err(Error::NoSuchBackend { id }) };
    }
    if Values::of(items, &["numa"], "type").last("memdev").is_some() {
        return Ok(None);
    }
    let size = match ram_size(items, &machine)? {
        0 => DEFAULT_RAM_SIZE,
        size => size,
    };
    let size = size.checked_next_multiple_of(RAM_SIZE_GRANULE).unwrap_or(size);
    let of_path = || {
        let value = items.iter().rev().find_map(|item| match item {
            Item::Option { value, .. } if item.name() == Some("mem-path") => value.as_ref(),
            _ => None,
        });
        huge_page_size_of(Path::new(value?))
    };
    MemoryFile::new(RAM.to_owned(), size, settings.huge_page_size.or_else(of_path)).map(Some)
}

/// The size that the user asks for; 0 if none. As in QEMU, `-m` wins over `-machine memory.size=`.
fn ram_size(items: &[Item], machine: &Values) -> Result<u64, Error> {
    let not_a_size = |what: &str, value| Error::NotASize { what: what.to_owned(), value };
    if let Some(text) = Values::of(items, &["m"], "size").last("size") {
        let size = match text.as_str() {
            "" => Some(0),
            text => size::parse_mebibytes(text),
        };
        let size = size.ok_or_else(|| not_a_size("-m", text))?;
        if size > 0 {
            return Ok(size);
        }
    }
    match machine.last("memory.size") {
        Some(text) => size::parse(&text).ok_or_else(|| not_a_size("-machine memory.size", text)),
        None => Ok(0),
    }
}

/// The values of all occurrences of an option, which QEMU merges.
struct Values(Vec<KeyValues>);

impl Values {
    fn of(items: &[Item], names: &[&str], implied: &str) -> Self {
        let of_item = |item: &Item| {
            let is_ours = item.name().is_some_and(|name| names.contains(&name));
            is_ours.then(|| KeyValues::parse(&item.text(), Some(implied)))
        };
        Values(items.iter().filter_map(of_item).collect())
    }

    fn last(&self, key: &str) -> Option<String> {
        self.0.iter().rev().find_map(|values| values.get(key)).map(str::to_owned)
    }
}

/// Doubles the commas of a value.
fn escape(value: &OsStr) -> OsString {
    let mut escaped = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        escaped.push(byte);
        if byte == b',' {
            escaped.push(b',');
        }
    }
    OsString::from_vec(escaped)
}

#[cfg(test)]
mod tests;
