// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The system calls that each kind of thread may make (seccomp).
//!
//! The first thread, which serves the control socket and executes the next program, has a list of
//! what it may not do: what it would give away would be given away by each program that it
//! executes, too. It reads nothing that a stranger has written. All other threads have a list of
//! what they may do. A thread inherits the filters of the one that starts it, and all filters of a
//! thread must allow a call.
//!
//! The lists were made by running the test suite in this sandbox: each refused call is in the log.

use super::Mode;
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// Serves a connection of the control socket, and the job that it has started.
    Control,
    /// Reads what a peer, an image or a fault says, and moves pages: a part of a job.
    Pages,
    /// Serves a device of the guest.
    Device,
    /// Answers scrapes of the metrics.
    Metrics,
    /// Writes the log.
    Log,
}

/// All kinds.
pub const KINDS: [ThreadKind; 5] = [
    ThreadKind::Control,
    ThreadKind::Pages,
    ThreadKind::Device,
    ThreadKind::Metrics,
    ThreadKind::Log,
];

/// A filter cannot be made.
pub(super) type Error = seccompiler::Error;

/// Any thread may wait, know the time, use its memory, end, and close what it has.
const ANY: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // Of `abort`. Landlock keeps other processes from the signal.
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What moves pages: between the memory, sockets and files that are open.
const MOVE: &[c_long] = &[
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readahead,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setpriority,
    libc::SYS_getpriority,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sync_file_range,
];

/// What begins and ends jobs: descriptors that come and go, files that grow and are named by the
/// opener.
const BEGIN: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_listen,
    libc::SYS_memfd_create,
    libc::SYS_pidfd_open,
    libc::SYS_pipe2,
    libc::SYS_readlinkat,
    libc::SYS_socketpair,
    libc::SYS_statx,
];

/// The same on processors that have older calls beside the newer ones.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_readlink];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// What a server does with connections that it has accepted.
const SERVE: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setpriority,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// What it takes to ask the opener: to remove a socket, or why there are no huge pages.
const ASK: &[c_long] =
    &[libc::SYS_flock, libc::SYS_newfstatat, libc::SYS_socketpair, libc::SYS_statx];

/// What no thread may do, and no program that this process executes: reach other processes, other
/// files or other hosts, or change the system or its own rights.
const NEVER: &[c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bind,
    libc::SYS_bpf,
    libc::SYS_capset,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_connect,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsetxattr,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_linkat,
    libc::SYS_lookup_dcookie,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_mq_open,
    libc::SYS_msgget,
    libc::SYS_name_to_handle_at,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_openat2,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_renameat2,
    libc::SYS_request_key,
    libc::SYS_semget,
    libc::SYS_setdomainname,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_settimeofday,
    libc::SYS_setuid,
    libc::SYS_setxattr,
    libc::SYS_shmget,
    libc::SYS_socket,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_symlinkat,
    libc::SYS_syslog,
    libc::SYS_truncate,
    libc::SYS_umount2,
    libc::SYS_unlinkat,
    libc::SYS_unshare,
    libc::SYS_utimensat,
    libc::SYS_vhangup,
];

/// The same on processors that have older calls beside the newer ones.
#[cfg(target_arch = "x86_64")]
const NEVER_OLDER: &[c_long] = &[
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_creat,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_lchown,
    libc::SYS_link,
    libc::SYS_mkdir,
    libc::SYS_mknod,
    libc::SYS_modify_ldt,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_rmdir,
    libc::SYS_symlink,
    libc::SYS_unlink,
    libc::SYS_uselib,
    libc::SYS_utimes,
];
#[cfg(not(target_arch = "x86_64"))]
const NEVER_OLDER: &[c_long] = &[libc::SYS_renameat];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters of the first thread: what it may not do, and a call that is not there.
pub(super) fn first(mode: Mode) -> Result<[BpfProgram; 2], Error> {
    let mut rules: Rules =
        NEVER.iter().chain(NEVER_OLDER).map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_userfaultfd, vec![has(0, USER_MODE_ONLY, 0)?]);
    // The descriptor of a folder would name it to the opener.
    let path = libc::O_PATH as u64;
    rules.insert(libc::SYS_openat, vec![has(2, path, path)?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![has(1, path, path)?]);
    // Text that is put into a terminal is run by the shell there.
    let terminal = [libc::TIOCSTI, libc::TIOCLINUX];
    let terminal = terminal.iter().map(|request| is(1, *request));
    rules.insert(libc::SYS_ioctl, terminal.collect::<Result<_, _>>()?);
    let never = compile(rules, SeccompAction::Allow, refuse(mode))?;
    // Its flags are in memory, where no filter sees them. The library then uses `clone`.
    let absent = [(libc::SYS_clone3, Vec::new())].into();
    let absent = compile(absent, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    Ok([never, absent])
}

/// The filter of a thread of this kind.
pub(super) fn of(kind: ThreadKind, mode: Mode) -> Result<BpfProgram, Error> {
    let lists: &[&[c_long]] = match kind {
        ThreadKind::Control => &[ANY, MOVE, BEGIN, OLDER],
        ThreadKind::Pages => &[ANY, MOVE, ASK, OLDER],
        ThreadKind::Device => &[ANY, MOVE, BEGIN, OLDER],
        ThreadKind::Metrics => &[ANY, SERVE, ASK, OLDER],
        ThreadKind::Log => &[ANY],
    };
    let calls = lists.iter().flat_map(|list| list.iter());
    let mut rules: Rules = calls.map(|call| (*call, Vec::new())).collect();
    // No memory can be executed that was written.
    let execute = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![has(2, execute, 0)?]);
    }
    // Threads, but no processes. What `clone3` gets says another filter.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![has(0, thread, thread)?]);
    rules.insert(libc::SYS_clone3, Vec::new());
    // Limits are looked up, and changed by nobody.
    let own_limits = vec![condition(0, SeccompCmpOp::Eq, 0)?, condition(2, SeccompCmpOp::Eq, 0)?];
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(own_limits)?]);
    // For memory of this process, to place pages by it.
    if kind == ThreadKind::Control {
        rules.insert(libc::SYS_userfaultfd, vec![has(0, USER_MODE_ONLY, USER_MODE_ONLY)?]);
    }
    let mut process = vec![libc::PR_SET_NAME, libc::PR_GET_NAME, PR_SET_VMA];
    if kind == ThreadKind::Control {
        // The threads that it starts get a filter of their own, which only adds to this one.
        process.push(libc::PR_SET_NO_NEW_PRIVS);
        let add = u64::from(libc::SECCOMP_SET_MODE_FILTER);
        rules.insert(libc::SYS_seccomp, vec![is(0, add)?]);
    }
    let process = process.iter().map(|option| is(0, *option as u64));
    rules.insert(libc::SYS_prctl, process.collect::<Result<_, _>>()?);
    if !matches!(kind, ThreadKind::Log | ThreadKind::Metrics) {
        // Those of userfaultfd, pagemap, and sockets; what a descriptor is says the kernel.
        rules.insert(libc::SYS_ioctl, ioctls()?);
    } else {
        rules.insert(libc::SYS_ioctl, vec![is(1, libc::FIONBIO)?]);
    }
    compile(rules, refuse(mode), SeccompAction::Allow)
}

/// `UFFD_USER_MODE_ONLY` of `linux/userfaultfd.h`.
const USER_MODE_ONLY: u64 = 1;
/// Names memory: the library does, when it allocates some.
const PR_SET_VMA: libc::c_int = 0x53564d41;
/// The letters of the requests of userfaultfd and of the pagemap.
const LETTERS: [u64; 2] = [0xaa, b'f' as u64];

fn ioctls() -> Result<Vec<SeccompRule>, Error> {
    let letters = LETTERS.into_iter().map(|letter| has(1, 0xff00, letter << 8));
    let sockets = [libc::FIONBIO, libc::FIONREAD, libc::TIOCOUTQ];
    letters.chain(sockets.into_iter().map(|request| is(1, request))).collect()
}

fn refuse(mode: Mode) -> SeccompAction {
    match mode {
        Mode::On => SeccompAction::Trap,
        Mode::Log | Mode::Off => SeccompAction::Log,
    }
}

/// Argument number `argument` is this value.
fn is(argument: u8, value: u64) -> Result<SeccompRule, Error> {
    rule(argument, SeccompCmpOp::Eq, value)
}

/// The bits `mask` of argument number `argument` are these.
fn has(argument: u8, mask: u64, bits: u64) -> Result<SeccompRule, Error> {
    rule(argument, SeccompCmpOp::MaskedEq(mask), bits)
}

fn rule(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// A condition on a pointer.
fn condition(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, how, value)?)
}

fn compile(
    rules: Rules, otherwise: SeccompAction, found: SeccompAction,
) -> Result<BpfProgram, Error> {
    let processor = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, otherwise, found, processor)?;
    Ok(BpfProgram::try_from(filter)?)
}
