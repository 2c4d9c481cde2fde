// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process that enters the sandbox of an agent, and then tries what somebody who has taken an
//! agent over would try. `forbidden KIND` prints a line for each attempt: its name and what came of
//! it.
#![allow(unsafe_code)]
#![allow(clippy::print_stdout)] // its result

use pageferry_agent::sandbox::{self, KINDS, Mode};
use rustix::io::Errno;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// An attempt: its name, and what makes it.
type Attempt = (&'static str, fn(&Scene) -> Result<(), Errno>);

/// What the attempts are made on. It exists, and nobody has named it.
struct Scene {
    /// A folder with a file `secret`.
    folder: PathBuf,
    /// The port of a listener on loopback.
    port: u16,
    /// The process that has started this one.
    parent: i32,
}

/// Runs the program. `arguments` are the kind of the thread or `first`, the folder and the port.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let texts: Vec<_> = arguments.iter().map(|text| text.to_string_lossy()).collect();
    let [kind, folder, port] = &texts[..] else { return ExitCode::from(2) };
    let parent = rustix::process::getppid().map_or(0, rustix::process::Pid::as_raw_pid);
    let scene = Scene { folder: folder.as_ref().into(), port: port.parse().unwrap_or(0), parent };
    let program = std::env::current_exe().unwrap_or_default();
    let entered = sandbox::enter(Mode::On, (Vec::new, &[]), &program, &[]);
    let sandbox = match entered {
        Ok(sandbox) => sandbox,
        Err(error) => {
            println!("enter {error}");
            return ExitCode::FAILURE;
        }
    };
    let attempt = || {
        for (name, attempt) in ATTEMPTS {
            let came = attempt(&scene);
            println!("{name} {}", came.err().map_or("done".into(), |errno| errno.to_string()));
        }
    };
    match KINDS.into_iter().find(|one| format!("{one:?}") == *kind) {
        Some(kind) => {
            let run = move || {
                sandbox::enter_thread(kind);
                attempt();
            };
            std::thread::scope(|scope| scope.spawn(run).join()).ok();
        }
        None => attempt(),
    }
    println!("dumpable {:?}", rustix::process::dumpable_behavior());
    // The log says what was refused, and where.
    let _ = env_logger::builder().filter_level(log::LevelFilter::Error).try_init();
    sandbox.refusals.iter().for_each(sandbox::Refusals::log);
    ExitCode::SUCCESS
}

const ATTEMPTS: &[Attempt] = &[
    ("read-file", |scene| open(&scene.folder.join("secret"), libc::O_RDONLY)),
    ("make-file", |scene| open(&scene.folder.join("new"), libc::O_CREAT | libc::O_WRONLY)),
    ("name-folder", |scene| open(&scene.folder, libc::O_PATH | libc::O_DIRECTORY)),
    ("list-folder", |scene| open(&scene.folder, libc::O_RDONLY | libc::O_DIRECTORY)),
    ("list-library-folder", |_| open(Path::new("/usr/lib"), libc::O_RDONLY | libc::O_DIRECTORY)),
    ("read-memory-of-parent", |scene| {
        open(Path::new(&format!("/proc/{}/mem", scene.parent)), libc::O_RDONLY)
    }),
    ("remove-file", |scene| {
        let path = c_path(&scene.folder.join("secret"));
        call(libc::SYS_unlinkat, [at_cwd(), path.as_ptr() as u64, 0, 0, 0, 0])
    }),
    ("rename-file", |scene| {
        let (from, to) = (c_path(&scene.folder.join("secret")), c_path(&scene.folder.join("b")));
        let (from, to) = (from.as_ptr() as u64, to.as_ptr() as u64);
        call(libc::SYS_renameat2, [at_cwd(), from, at_cwd(), to, 0, 0])
    }),
    ("change-mode", |scene| {
        let path = c_path(&scene.folder.join("secret"));
        call(libc::SYS_fchmodat, [at_cwd(), path.as_ptr() as u64, 0o777, 0, 0, 0])
    }),
    ("make-socket", |_| {
        call(libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0])
    }),
    ("ask-opener-for-file", |scene| {
        let flags = rustix::fs::OFlags::RDONLY;
        let path = scene.folder.join("secret");
        pageferry_agent::opener::open(path, flags, rustix::fs::Mode::empty()).map(drop)
    }),
    ("ask-opener-for-host", |scene| {
        pageferry_agent::opener::connect_tcp(([127, 0, 0, 1], scene.port).into()).map(drop)
    }),
    ("execute", |_| {
        let program = c"/bin/true";
        let none = [std::ptr::null::<u8>()];
        let none = none.as_ptr() as u64;
        call(libc::SYS_execve, [program.as_ptr() as u64, none, none, 0, 0, 0])
    }),
    ("start-process", |_| {
        // SAFETY: the child, if there is one, ends at once.
        let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if child == 0 {
            // SAFETY: it runs nothing else of this program.
            unsafe { libc::_exit(0) };
        }
        outcome(child)
    }),
    ("kill-parent", |scene| call(libc::SYS_kill, [scene.parent as u64, 0, 0, 0, 0, 0])),
    ("trace-parent", |scene| {
        call(libc::SYS_ptrace, [libc::PTRACE_ATTACH as u64, scene.parent as u64, 0, 0, 0, 0])
    }),
    ("take-descriptor-of-parent", |scene| {
        // SAFETY: takes numbers only.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, scene.parent, 0) };
        outcome(pidfd).and_then(|()| call(libc::SYS_pidfd_getfd, [pidfd as u64, 0, 0, 0, 0, 0]))
    }),
    ("read-parent", |scene| call(libc::SYS_process_vm_readv, [scene.parent as u64, 0, 0, 0, 0, 0])),
    ("execute-memory", |_| {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        let (protection, flags) = (protection as u64, flags as u64);
        call(libc::SYS_mmap, [0, 4096, protection, flags, u64::MAX, 0])
    }),
    ("userfaultfd", |_| call(libc::SYS_userfaultfd, [0; 6])),
    ("io-uring", |_| call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0])),
    ("bpf", |_| call(libc::SYS_bpf, [0; 6])),
    ("mount", |_| call(libc::SYS_mount, [0; 6])),
    ("change-root", |_| call(libc::SYS_chroot, [c"/tmp".as_ptr() as u64, 0, 0, 0, 0, 0])),
    ("new-namespace", |_| call(libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0])),
    ("become-user", |_| call(libc::SYS_setuid, [1, 0, 0, 0, 0, 0])),
    ("type-into-terminal", |_| {
        call(libc::SYS_ioctl, [0, libc::TIOCSTI, c"x".as_ptr() as u64, 0, 0, 0])
    }),
];

/// The attempts that the first thread of an agent may make: it executes the next program.
pub const OF_FIRST_THREAD: [&str; 3] = ["start-process", "execute", "execute-memory"];

fn open(path: &Path, flags: libc::c_int) -> Result<(), Errno> {
    let path = c_path(path);
    call(libc::SYS_openat, [at_cwd(), path.as_ptr() as u64, flags as u64, 0o600, 0, 0])
}

fn at_cwd() -> u64 {
    i64::from(libc::AT_FDCWD) as u64
}

fn c_path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_string_lossy().as_bytes()).unwrap_or_default()
}

fn call(number: libc::c_long, [a, b, c, d, e, f]: [u64; 6]) -> Result<(), Errno> {
    // SAFETY: the pointers among the arguments are valid through the call, or null, and the calls
    // do not write to them. What a call may do to this process that succeeds against all
    // expectation, the test tells.
    outcome(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

fn outcome(returned: libc::c_long) -> Result<(), Errno> {
    if returned >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
