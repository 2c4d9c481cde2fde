// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why the kernel answers EPERM to those who trace a process or copy its files, and what to do.
//!
//! The kernel does not say why. This looks at all that it checks (`__ptrace_may_access()` and
//! `ptrace_attach()` in kernel/ptrace.c, `security/yama/yama_lsm.c`, `cap_ptrace_access_check()`),
//! in the order in which an operator wants to know it.

use super::target::{Status, TargetProcess};

/// Why access to a process is denied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// A process cannot trace itself.
    #[error("it is this process itself")]
    Itself,
    /// A debugger has it.
    #[error(
        "\"{name}\" (thread {tracer}) traces it already, and only one program can: end it first if \
         it is a strace or gdb"
    )]
    Traced {
        /// The thread that traces it.
        tracer: u32,
        /// The name of that thread.
        name: String,
    },
    /// Its main thread has exited, and nothing can run there.
    #[error("its main thread has exited")]
    NoMainThread,
    /// It belongs to another user.
    #[error(
        "it runs as user {theirs} (real, effective and saved user must be equal) and this program \
         as user {ours}: run this program as the same user, or with CAP_SYS_PTRACE"
    )]
    OtherUser {
        /// Its users, for example `1000, 1000, 0`.
        theirs: String,
        /// Ours.
        ours: u32,
    },
    /// The kernel protects its memory from its own user.
    #[error(
        "the process is not dumpable: it has changed its user (QEMU with -run-with user= or \
         -runas), or its program has file capabilities or cannot be read by its user: start it \
         without that, or give this program CAP_SYS_PTRACE"
    )]
    NotDumpable,
    /// It has capabilities that this process has not.
    #[error(
        "it has capabilities that this program has not (bits {missing:#x}): give this program the \
         same ones, or CAP_SYS_PTRACE"
    )]
    MoreCapabilities {
        /// Those that are missing here.
        missing: u64,
    },
    /// The Yama security module.
    #[error(
        "sysctl kernel.yama.ptrace_scope is {scope}: {}",
        match scope {
            1 => "set it to 0, or give this program CAP_SYS_PTRACE",
            2 => "give this program CAP_SYS_PTRACE",
            _ => "no program can trace another until the next boot with a lower value",
        }
    )]
    Yama {
        /// The value.
        scope: u32,
    },
    /// None of these.
    #[error(
        "nothing that this program can check forbids it, so a security module (AppArmor, SELinux), \
         the seccomp filter of a container or another user namespace does: see the kernel's audit \
         log"
    )]
    Unknown,
}

/// The sysctl `kernel.yama.ptrace_scope`. None if the kernel has no Yama.
pub fn ptrace_scope() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?;
    text.trim().parse().ok()
}

impl Denial {
    /// Finds out why access to `target` was denied a moment ago.
    pub(super) fn of(target: &TargetProcess) -> Self {
        let own = std::fs::read_to_string("/proc/thread-self/status");
        let own = own.ok().and_then(|text| Status::parse(&text).ok());
        let (Some(own), Ok(theirs)) = (own, target.status()) else { return Self::Unknown };
        if target.pid() == std::process::id() {
            return Self::Itself;
        }
        if theirs.tracer != 0 {
            let name = std::fs::read_to_string(format!("/proc/{}/comm", theirs.tracer));
            let name = name.map_or_else(|_| "?".to_owned(), |name| name.trim().to_owned());
            return Self::Traced { tracer: theirs.tracer, name };
        }
        if matches!(theirs.state, 'Z' | 'X') {
            return Self::NoMainThread;
        }
        // Not by is_dumpable(), which asks this function in turn.
        let owner = rustix::fs::statat(target.folder(), "maps", rustix::fs::AtFlags::empty());
        let dumpable = owner.is_ok_and(|owner| owner.st_uid == theirs.uids[1]);
        Self::by_rights(&own, &theirs, dumpable, ptrace_scope().unwrap_or(0))
    }

    /// The part that depends on users, capabilities and settings alone.
    fn by_rights(own: &Status, theirs: &Status, dumpable: bool, scope: u32) -> Self {
        /// The number of CAP_SYS_PTRACE.
        const SYS_PTRACE: u64 = 19;
        let privileged = own.effective_capabilities & 1 << SYS_PTRACE != 0;
        let missing = theirs.permitted_capabilities & !own.permitted_capabilities;
        let user = own.uids[0];
        if privileged {
            if scope >= 3 { Self::Yama { scope } } else { Self::Unknown }
        } else if theirs.uids[..3].iter().any(|theirs| *theirs != user) {
            let [real, effective, saved, _] = theirs.uids;
            Self::OtherUser { theirs: format!("{real}, {effective}, {saved}"), ours: user }
        } else if !dumpable {
            Self::NotDumpable
        } else if missing != 0 {
            Self::MoreCapabilities { missing }
        } else if scope >= 1 {
            Self::Yama { scope }
        } else {
            Self::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32) -> Status {
        Status {
            state: 'S',
            tracer: 0,
            uids: [uid; 4],
            ignored_signals: 0,
            permitted_capabilities: 0,
            effective_capabilities: 0,
            seccomp: 0,
        }
    }

    #[test]
    fn the_first_reason_that_an_operator_can_change_is_named() {
        let root = Status { effective_capabilities: 1 << 19, ..user(0) };
        let capable = Status { permitted_capabilities: 1 << 12, ..user(7) };
        let changed = Status { uids: [7, 7, 0, 7], ..user(7) };
        let by = |own: &Status, theirs: &Status, dumpable, scope| {
            Denial::by_rights(own, theirs, dumpable, scope)
        };
        assert_eq!(by(&root, &user(7), true, 3), Denial::Yama { scope: 3 });
        assert_eq!(by(&root, &user(7), false, 2), Denial::Unknown);
        let other = Denial::OtherUser { theirs: "7, 7, 0".to_owned(), ours: 7 };
        assert_eq!(by(&user(7), &changed, false, 1), other);
        assert_eq!(by(&user(7), &user(7), false, 1), Denial::NotDumpable);
        let more = Denial::MoreCapabilities { missing: 1 << 12 };
        assert_eq!(by(&user(7), &capable, true, 1), more);
        assert_eq!(by(&user(7), &user(7), true, 1), Denial::Yama { scope: 1 });
        assert_eq!(by(&user(7), &user(7), true, 0), Denial::Unknown);
        let text = Denial::Yama { scope: 1 }.to_string();
        assert!(text.contains("kernel.yama.ptrace_scope is 1: set it to 0"), "{text}");
    }
}
