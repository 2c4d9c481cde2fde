// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the children do. Each checks itself, and panics if it notices something.

use super::child::{Board, GUEST_OFFSET, GUEST_SIZE, PAGE, map, map_board, shared_file};
use std::io::Error;
use std::ptr::{null, null_mut, with_exposed_provenance_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Commands of the role `guest`: one of these, and a page number.
pub(super) const READ: u64 = 1 << 32;
pub(super) const WRITE: u64 = 2 << 32;

/// How long a short wait of a role takes.
const SHORT: Duration = Duration::from_millis(3);

/// How much longer a wait may take on a machine that is busy.
const SLACK: Duration = Duration::from_millis(500);

static BOARD: OnceLock<&'static Board> = OnceLock::new();

/// Plays a role on the main thread.
pub(super) fn play(role: &str) {
    match role {
        "tracks writes" => return super::userfault::tracks_writes(false),
        "dies while it traces" => return super::injection::die_while_tracing(),
        "is refused" => return super::userfault::is_refused_without_privileges(),
        _ => {}
    }
    assert_eq!(rustix::thread::gettid(), rustix::process::getpid(), "not the main thread");
    // The end of the test is the end of the child.
    // SAFETY: the call takes numbers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }, 0);
    let file = shared_file();
    let board = *BOARD.get_or_init(|| map_board(&file));
    let guest = map(&file, GUEST_OFFSET, GUEST_SIZE);
    board.guest.store(guest, Ordering::SeqCst);
    let round: fn() = match role {
        "nanosleep" => sleep,
        "ppoll" => wait_in_ppoll,
        "poll" => wait_in_poll,
        "futex" => wait_in_futex,
        "read" => return read_from_a_pipe(board),
        "floats" => calculate,
        "floats and timer" => {
            start_timer();
            calculate
        }
        "ppoll and signals" => {
            handle(libc::SIGRTMIN(), 0);
            // Only ppoll lets it through, for a moment.
            block(libc::SIGRTMIN());
            let empty = 0_u64;
            return repeat(board, || poll_with_mask(&empty, Some(libc::EINTR)));
        }
        "sigsuspend" => {
            block(libc::SIGALRM);
            start_timer();
            suspend
        }
        "sigtimedwait" => {
            block(libc::SIGRTMIN());
            wait_for_signal
        }
        "guest" => return be_a_guest(board, guest),
        "guest of kill" => {
            filter(libc::SECCOMP_RET_KILL_PROCESS);
            return be_a_guest(board, guest);
        }
        "guest of trap" => {
            handle(libc::SIGSYS, 0);
            filter(libc::SECCOMP_RET_TRAP);
            return be_a_guest(board, guest);
        }
        "guest, hidden" => {
            // SAFETY: the call takes numbers.
            assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) }, 0);
            return be_a_guest(board, guest);
        }
        "ignores SIGTRAP" => {
            // SAFETY: no handler.
            unsafe { libc::signal(libc::SIGTRAP, libc::SIG_IGN) };
            return be_a_guest(board, guest);
        }
        #[cfg(target_env = "gnu")]
        "restartable sequence" => super::sequence::run_sequence,
        "vfork" => return wait_for_a_child(board),
        other => panic!("no role {other}"),
    };
    repeat(board, round);
}

fn repeat(board: &Board, round: impl Fn()) {
    while board.end.load(Ordering::SeqCst) == 0 {
        round();
        board.rounds.fetch_add(1, Ordering::SeqCst);
    }
}

/// Checks that a wait took as long as it was to.
fn takes(duration: Duration, wait: impl FnOnce()) {
    let begin = Instant::now();
    wait();
    let took = begin.elapsed();
    assert!(took >= duration && took < duration + SLACK, "{took:?} instead of {duration:?}");
}

fn time(duration: Duration) -> libc::timespec {
    libc::timespec { tv_sec: 0, tv_nsec: duration.as_nanos() as i64 }
}

#[track_caller]
fn failed_with(errno: Option<i32>, result: i64) {
    let error = (result < 0).then(|| Error::last_os_error().raw_os_error().unwrap());
    assert_eq!(error, errno);
}

fn sleep() {
    let long = Duration::from_millis(50);
    // SAFETY: the pointers are valid.
    takes(long, || failed_with(None, unsafe { libc::nanosleep(&time(long), null_mut()) }.into()));
}

fn wait_in_poll() {
    // SAFETY: no array.
    takes(SHORT, || failed_with(None, unsafe { libc::poll(null_mut(), 0, 3) }.into()));
}

fn wait_in_ppoll() {
    let all_but_none = 0_u64;
    takes(SHORT, || poll_with_mask(&all_but_none, None));
}

/// ppoll with a mask of 64 signals.
fn poll_with_mask(mask: &u64, allowed: Option<i32>) {
    let mut timeout = time(SHORT);
    // SAFETY: the pointers are valid, and the mask has the size that is given.
    let result = unsafe {
        libc::syscall(libc::SYS_ppoll, null::<u8>(), 0, &raw mut timeout, &raw const *mask, 8)
    };
    if result < 0 && allowed.is_some() {
        failed_with(allowed, result);
    } else {
        failed_with(None, result);
    }
}

fn wait_in_futex() {
    let word = 0_u32;
    takes(SHORT, || {
        let timeout = time(SHORT);
        let (word, wait) = (&raw const word, libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG);
        // SAFETY: the pointers are valid.
        let result =
            unsafe { libc::syscall(libc::SYS_futex, word, wait, 0, &raw const timeout, 0, 0) };
        failed_with(Some(libc::ETIMEDOUT), result);
    });
}

/// Another thread writes a byte when the test says so.
fn read_from_a_pipe(board: &'static Board) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let thread = std::thread::spawn(move || {
        while board.end.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(SHORT);
        }
        rustix::io::write(&writer, b"x").unwrap();
    });
    board.rounds.fetch_add(1, Ordering::SeqCst);
    // Not read() of the standard library, which repeats after EINTR.
    assert_eq!(rustix::io::read(&reader, &mut [0; 8]), Ok(1));
    thread.join().unwrap();
}

/// A sum in floating point that must be the same each time. It keeps SSE registers busy.
fn calculate() {
    let sum = |steps: u32| {
        let mut sums = [0.0_f64; 8];
        for step in 0..steps {
            for (index, sum) in sums.iter_mut().enumerate() {
                *sum += f64::from(step).sqrt() * (index as f64 + 0.1);
            }
        }
        sums.map(f64::to_bits)
    };
    static EXPECTED: OnceLock<[u64; 8]> = OnceLock::new();
    let steps = std::hint::black_box(20_000);
    assert_eq!(sum(steps), *EXPECTED.get_or_init(|| sum(steps)));
}

extern "C" fn count_signal(_: i32) {
    if let Some(board) = BOARD.get() {
        board.signals.fetch_add(1, Ordering::SeqCst);
    }
}

fn handle(signal: i32, flags: i32) {
    // SAFETY: the handler does what a handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_signal as extern "C" fn(i32) as usize;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(signal, &raw const action, null_mut()), 0);
    }
}

fn block(signal: i32) {
    let mask = 1_u64 << (signal - 1);
    // SAFETY: the mask has the size that is given.
    let result = unsafe {
        let (how, old) = (libc::SIG_BLOCK, null_mut::<u8>());
        libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const mask, old, 8)
    };
    assert_eq!(result, 0);
}

/// SIGALRM a thousand times a second.
fn start_timer() {
    handle(libc::SIGALRM, libc::SA_RESTART);
    let millisecond = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let timer = libc::itimerval { it_interval: millisecond, it_value: millisecond };
    // SAFETY: the pointer is valid.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, null_mut()) }, 0);
}

/// sigsuspend returns after a handler has run, and not otherwise.
fn suspend() {
    static BEFORE: AtomicU64 = AtomicU64::new(0);
    let mask = 0_u64;
    // SAFETY: the mask has the size that is given.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigsuspend, &raw const mask, 8) };
    failed_with(Some(libc::EINTR), result);
    let signals = BOARD.get().unwrap().signals.load(Ordering::SeqCst);
    assert!(BEFORE.swap(signals, Ordering::SeqCst) < signals, "returned without a signal");
}

/// sigtimedwait fails with EINTR after any stop. No signal may be lost.
fn wait_for_signal() {
    let mask = 1_u64 << (libc::SIGRTMIN() - 1);
    let timeout = time(SHORT);
    // SAFETY: the pointers are valid, and the mask has the size that is given.
    let result = unsafe {
        let (mask, timeout) = (&raw const mask, &raw const timeout);
        libc::syscall(libc::SYS_rt_sigtimedwait, mask, null_mut::<u8>(), timeout, 8)
    };
    if result > 0 {
        count_signal(0);
    } else {
        let error = Error::last_os_error().raw_os_error();
        assert!(matches!(error, Some(libc::EAGAIN | libc::EINTR)), "{error:?}");
    }
}

/// Reads and writes the memory of the guest as the test says.
fn be_a_guest(board: &Board, guest: u64) {
    board.rounds.fetch_add(1, Ordering::SeqCst);
    while board.end.load(Ordering::SeqCst) == 0 {
        let command = board.command.load(Ordering::SeqCst);
        if command == 0 {
            std::thread::yield_now();
            continue;
        }
        let page = guest + (command & 0xffff) * PAGE;
        let word = with_exposed_provenance_mut::<u64>(page as usize);
        // SAFETY: the page is in the mapping, which stays.
        unsafe {
            if command & WRITE != 0 {
                word.write_volatile(command);
            } else {
                board.seen.store(word.read_volatile(), Ordering::SeqCst);
            }
        }
        board.command.store(0, Ordering::SeqCst);
    }
}

/// Installs a seccomp filter that does `action` for userfaultfd.
fn filter(action: u32) {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, equal, answer) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let mut program = [
        step(load, 0, 0, 0),
        step(equal, 0, 1, libc::SYS_userfaultfd as u32),
        step(answer, 0, 0, action),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: the pointers are valid.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
    }
}

/// Waits, uninterruptibly, for a child that ends only when it is killed.
fn wait_for_a_child(board: &Board) {
    board.rounds.fetch_add(1, Ordering::SeqCst);
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child has its own memory, and only makes system calls.
    unsafe {
        if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
}
