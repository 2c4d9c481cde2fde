// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `pageferry qemu` needs: a QEMU that is new enough, and the right to trace it.
//!
//! QEMU makes the system call `userfaultfd` itself, while it is traced. A child of this process
//! stands for it: it has the same user and rights as a QEMU that this user starts.

use super::{Finding, has_sys_ptrace};
use pageferry_attach::process::denial::{Denial, ptrace_scope};
use pageferry_attach::process::target::{ProcessError, TargetProcess};
use pageferry_attach::process::userfault::{CreateOptions, create_userfaultfd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The oldest version of QEMU that is served.
const QEMU: (u32, u32) = (10, 0);

/// The name of what was found about the program itself.
pub(super) const PROGRAM: &str = "qemu";

/// Everything that was tried. `program` is QEMU.
pub(super) fn findings(program: &Path) -> Vec<Finding> {
    vec![
        Finding {
            name: PROGRAM,
            found: version(program),
            rules_out: "pageferry qemu run and receive with this program (--qemu names another)",
        },
        Finding {
            name: "qemu traced",
            found: userfaultfd_in_a_child(true),
            rules_out: "pageferry qemu",
        },
        Finding {
            name: "qemu attach",
            found: attach(),
            rules_out: "pageferry qemu attach; run and receive need only the line before",
        },
        Finding {
            name: "qemu kernel faults",
            found: userfaultfd_in_a_child(false),
            rules_out: "for QEMU, postcopy and hybrid at the destination, lazy restores and \
                        background snapshots; precopy, paused snapshots and eager restores work",
        },
    ]
}

fn version(program: &Path) -> Result<String, String> {
    let name = program.display();
    let asked = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let asked = asked.map_err(|error| format!("{name}: {error}"))?;
    version_in(&name.to_string(), &String::from_utf8_lossy(&asked.stdout))
}

/// What `name --version` has said.
fn version_in(name: &str, said: &str) -> Result<String, String> {
    let Some(number) =
        said.split("QEMU emulator version ").nth(1).and_then(|rest| rest.split([' ', '\n']).next())
    else {
        return Err(format!("{name} --version names no version of QEMU: it is no QEMU"));
    };
    match number.split('.').map(str::parse).collect::<Vec<Result<u32, _>>>()[..] {
        [Ok(major), Ok(minor), ..] if (major, minor) >= QEMU => {
            Ok(format!("{name} is version {number}"))
        }
        _ => Err(format!("{name} is version {number}; needed is {}.{} or later", QEMU.0, QEMU.1)),
    }
}

/// Has a child of this process create a userfaultfd, as QEMU would be made to.
fn userfaultfd_in_a_child(user_mode_only: bool) -> Result<String, String> {
    let mut child = Command::new("sleep");
    // It is killed at once.
    child.arg("60").stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = child.spawn().map_err(|error| format!("cannot start sleep: {error}"))?;
    let options = CreateOptions { user_mode_only, ..CreateOptions::default() };
    let created = TargetProcess::open(child.id()).map_err(Into::into).and_then(|process| {
        wait_until_asleep(&process)?;
        create_userfaultfd(&process, options)
    });
    // Fails if it has ended.
    let _ = child.kill();
    let _ = child.wait();
    match created {
        Ok(_) if user_mode_only => Ok("a child can be made to create a userfaultfd".to_owned()),
        Ok(_) => Ok("its userfaultfd reports faults of the kernel, and so of vCPUs".to_owned()),
        Err(error) => Err(crate::error::chain(&error)),
    }
}

/// Waits until the program of the child has begun to sleep: before, it may not have all of its
/// mappings.
fn wait_until_asleep(child: &TargetProcess) -> Result<(), ProcessError> {
    const PATIENCE: Duration = Duration::from_secs(5);
    const LOOK: Duration = Duration::from_millis(1);
    let deadline = Instant::now() + PATIENCE;
    while child.status()?.state != 'S' && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn attach() -> Result<String, String> {
    match ptrace_scope() {
        Some(scope) if scope >= 3 || (scope >= 1 && !has_sys_ptrace()) => {
            Err(Denial::Yama { scope }.to_string())
        }
        _ => Ok("a QEMU of this user can be traced, if it has its memory in files with share=on"
            .to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_is_no_new_qemu_is_named() {
        let says = |text| version_in("kvm", text);
        let found = says("QEMU emulator version 11.1.3\n").unwrap();
        assert_eq!(found, "kvm is version 11.1.3");
        let found = says("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n").unwrap();
        assert_eq!(found, "kvm is version 10.0.2");
        let found = says("QEMU emulator version 8.2.1\n").unwrap_err();
        assert_eq!(found, "kvm is version 8.2.1; needed is 10.0 or later");
        assert!(says("hello\n").unwrap_err().ends_with("it is no QEMU"));
        assert!(version(Path::new("/dev/null/none")).unwrap_err().contains("Not a directory"));
        // A program that is there, and is no QEMU.
        assert!(version(Path::new("true")).unwrap_err().ends_with("it is no QEMU"));
    }
}
