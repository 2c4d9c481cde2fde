// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry check`: what this machine offers, and what each lack rules out.
//!
//! Everything is tried as this user, in this process: a right that the VMM's user has may be
//! missing here, and the other way round.

mod qemu;

use super::exit::Exit;
use crate::error::chain;
use crate::memory::huge_page_supply::HugePageSupply;
use crate::memory::large_pages::LargePages;
use crate::memory::spare_memory::SpareMemory;
use crate::memory::{Backing, BackingError};
use crate::pagemap::Pagemap;
use crate::sandbox::try_landlock;
use clap::Args;
use pageferry_protocol::memory::HUGE_PAGE;
use pageferry_protocol::userfault::{UserfaultSource, feature};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};
use std::error::Error;
use std::fs::{File, read_to_string};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The oldest version of Linux on which the agent runs.
const KERNEL: (u32, u32) = (6, 7);

/// The output of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print a JSON array with one object for each thing that was tried.
    #[arg(long)]
    json: bool,
    /// The QEMU to look at, for pageferry qemu. The command fails if it cannot be used [default:
    /// qemu-system-x86_64, which may be missing]
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
}

/// The QEMU to look at if nobody names one.
const DEFAULT_QEMU: &str = "qemu-system-x86_64";

/// One thing that was tried.
struct Finding {
    name: &'static str,
    /// What was found, or why it is missing.
    found: Result<String, String>,
    /// What is not possible without it.
    rules_out: &'static str,
}

/// `pageferry check`
///
/// # Errors
/// If the output cannot be written, or the QEMU that was named cannot be used. What is missing is
/// no error: it rules out only a part.
pub fn run(args: &CheckArgs) -> Result<Exit, Box<dyn Error>> {
    let findings = findings(args.qemu.as_deref().unwrap_or(Path::new(DEFAULT_QEMU)));
    print(&findings, args.json)?;
    let qemu = findings.into_iter().find(|finding| finding.name == qemu::PROGRAM);
    match qemu.map(|finding| finding.found) {
        Some(Err(why)) if args.qemu.is_some() => Err(why.into()),
        _ => Ok(Exit::Done),
    }
}

fn print(findings: &[Finding], json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let objects: Vec<Value> = findings.iter().map(to_json).collect();
        return writeln!(out, "{}", Value::Array(objects));
    }
    for Finding { name, found, rules_out } in findings {
        match found {
            Ok(detail) => writeln!(out, "{name:20} yes  {detail}")?,
            Err(why) => {
                writeln!(out, "{name:20} no   {why}")?;
                writeln!(out, "{:20}      without it: {rules_out}", "")?;
            }
        }
    }
    Ok(())
}

fn to_json(finding: &Finding) -> Value {
    let (available, detail) = match &finding.found {
        Ok(detail) => (true, detail),
        Err(why) => (false, why),
    };
    let rules_out = (!available).then_some(finding.rules_out);
    json!({
        "name": finding.name,
        "available": available,
        "detail": detail,
        "rules_out": rules_out,
    })
}

fn findings(qemu: &Path) -> Vec<Finding> {
    let mut findings = vec![
        Finding { name: "kernel", found: kernel(), rules_out: "everything" },
        Finding {
            name: "userfaultfd",
            found: userfaultfd(feature::MISSING_SHMEM),
            rules_out: "postcopy, hybrid, lazy restore, background snapshots and write-protect \
                        scanning, if the VMM has the same rights; precopy with another tracker \
                        and paused snapshots work",
        },
        Finding {
            name: "missing on hugetlb",
            found: userfaultfd(feature::MISSING_HUGETLBFS),
            rules_out: "postcopy and lazy restore of memory on hugetlbfs",
        },
        Finding {
            name: "write protection",
            found: userfaultfd(feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED),
            rules_out: "background snapshots",
        },
        Finding {
            name: "asynchronous wp",
            found: userfaultfd(feature::WP_ASYNC),
            rules_out: "write-protect scanning (Trackers::WRITE_PROTECT)",
        },
        Finding {
            name: "poison",
            found: userfaultfd(feature::POISON),
            rules_out: "a lost agent cannot mark the pages that are lost with it",
        },
        Finding {
            name: "PAGEMAP_SCAN",
            found: pagemap_scan(),
            rules_out: "write-protect scanning (Trackers::WRITE_PROTECT)",
        },
        Finding { name: "hugetlb pool", found: hugetlb(), rules_out: "guest memory on hugetlbfs" },
        Finding {
            name: "shmem huge pages",
            found: shmem_huge_pages(),
            rules_out: "huge pages for guests in memfds that arrive; they run slower without",
        },
        Finding {
            name: "landlock",
            found: landlock(),
            rules_out: "a part of the sandbox of an agent: files and connections are restricted \
                        by system calls only",
        },
        Finding { name: "kvm", found: kvm(), rules_out: "guests under KVM; QEMU runs them by TCG" },
    ];
    findings.extend(qemu::findings(qemu));
    findings
}

fn landlock() -> Result<String, String> {
    let supported = "of files, TCP ports, signals and abstract sockets";
    try_landlock().map(|()| supported.to_owned()).map_err(|error| chain(&error))
}

/// True if this process has CAP_SYS_PTRACE.
fn has_sys_ptrace() -> bool {
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    /// `CAP_SYS_PTRACE` of `linux/capability.h`.
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    capabilities.is_some_and(|mask| mask & CAP_SYS_PTRACE != 0)
}

fn kernel() -> Result<String, String> {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL => Ok(format!("Linux {release}")),
        _ => Err(format!("Linux {release}; needed is {}.{} or later", KERNEL.0, KERNEL.1)),
    }
}

/// Opens a userfaultfd with these features as the client does, and says by which right.
fn userfaultfd(features: u64) -> Result<String, String> {
    let source = UserfaultSource::new();
    source.check(features).map_err(|error| chain(&error))?;
    if source.is_device() {
        return Ok("by /dev/userfaultfd".to_owned());
    }
    let allowed = read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    Ok(match allowed.trim() {
        "1" => "by sysctl vm.unprivileged_userfaultfd=1",
        _ if has_sys_ptrace() => "by CAP_SYS_PTRACE",
        _ => "by the system call",
    }
    .to_owned())
}

fn pagemap_scan() -> Result<String, String> {
    let file = File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
    Pagemap::new(file.into()).map_err(|error| chain(&error))?;
    Ok("the kernel scans /proc/self/pagemap".to_owned())
}

/// The sizes of the pools of huge pages that have pages.
fn hugetlb() -> Result<String, String> {
    const FOLDER: &str = "/sys/kernel/mm/hugepages";
    let sizes = std::fs::read_dir(FOLDER).map_err(|error| format!("{FOLDER}: {error}"))?;
    let mut pools: Vec<String> = sizes
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugepages-")?.to_owned();
            let number = |file: &str| read_to_string(entry.path().join(file)).ok();
            let (all, free) = (number("nr_hugepages")?, number("free_hugepages")?);
            (all.trim() != "0").then(|| format!("{} of {} of {size}", free.trim(), all.trim()))
        })
        .collect();
    pools.sort();
    match pools.is_empty() {
        true => Err("no huge pages are reserved (/proc/sys/vm/nr_hugepages)".to_owned()),
        false => Ok(format!("free: {}", pools.join(", "))),
    }
}

/// Has the kernel make one.
fn shmem_huge_pages() -> Result<String, String> {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let setting = || {
        let modes = read_to_string(FILE).unwrap_or_default();
        modes.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned()
    };
    let made = || -> Result<bool, BackingError> {
        let memory = |source| BackingError::Kernel { what: "make a memfd", at: 0, source };
        let fd = memfd_create("check", MemfdFlags::CLOEXEC).map_err(memory)?;
        ftruncate(&fd, HUGE_PAGE).map_err(memory)?;
        let backing = Backing::new(fd, 0, HUGE_PAGE)?;
        backing.write(0, &[1])?;
        let supply = HugePageSupply::new(&Arc::default(), SpareMemory::of_this_process());
        let large = LargePages::new(&backing, &Arc::new(supply), &Arc::default())?;
        Ok(large.is_some_and(|large| large.make(0)))
    };
    match made() {
        Ok(true) => Ok(format!("the kernel makes them on request; shmem_enabled is {}", setting())),
        Ok(false) => Err(format!(
            "the kernel makes none (Linux 6.1 and free memory are needed); shmem_enabled is {}",
            setting()
        )),
        Err(error) => Err(chain(&error)),
    }
}

fn kvm() -> Result<String, String> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    opened.map(|_| "/dev/kvm opens".to_owned()).map_err(|error| format!("/dev/kvm: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_says_what_was_found_or_what_is_ruled_out() {
        let findings = findings(Path::new("qemu-system-x86_64"));
        assert!(findings.iter().any(|finding| finding.name == "kernel" && finding.found.is_ok()));
        for finding in &findings {
            let object = to_json(finding);
            assert!(!object["detail"].as_str().unwrap().is_empty(), "{object}");
            let available = object["available"].as_bool().unwrap();
            assert_eq!(object["rules_out"].is_null(), available, "{object}");
        }
    }
}
