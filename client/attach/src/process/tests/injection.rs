// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread that is stopped notices nothing.

use super::child::{PATIENCE, Role, wait_for};
use crate::process::denial::Denial;
use crate::process::injection::{InjectionError, Seccomp, Stopped, run};
use crate::process::target::ProcessError;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Has the main thread run getpid. Returns how long it was stopped.
fn inject(role: &Role) -> Duration {
    let work = |stopped: &mut Stopped| stopped.system_call(libc::SYS_getpid, [0; 6]);
    let outcome = run(&role.target, Seccomp::Unknown, PATIENCE, work).unwrap();
    assert_eq!(outcome.value, u64::from(role.pid()));
    outcome.stopped
}

/// Injects again and again, most of the time into the system call `number`.
fn goes_unnoticed(name: &str, number: Option<i64>) {
    let role = Role::start(name);
    for _ in 0..300 {
        if let Some(number) = number {
            role.wait_until_in(number);
        }
        inject(&role);
    }
    let before = role.rounds();
    if name != "read" {
        wait_for("another round", || role.rounds() > before);
    }
    let status = role.end();
    assert!(status.success(), "{name}: {status}");
}

#[test]
fn a_thread_in_nanosleep_notices_nothing() {
    goes_unnoticed("nanosleep", Some(libc::SYS_clock_nanosleep));
}

#[test]
fn a_thread_in_poll_notices_nothing() {
    goes_unnoticed("poll", Some(libc::SYS_poll));
}

#[test]
fn a_thread_in_ppoll_notices_nothing() {
    goes_unnoticed("ppoll", Some(libc::SYS_ppoll));
}

#[test]
fn a_thread_in_futex_notices_nothing() {
    goes_unnoticed("futex", Some(libc::SYS_futex));
}

#[test]
fn a_thread_that_reads_from_a_pipe_notices_nothing() {
    goes_unnoticed("read", Some(libc::SYS_read));
}

#[test]
fn a_thread_that_calculates_notices_nothing() {
    goes_unnoticed("floats", None);
}

#[test]
fn a_thread_that_calculates_and_handles_signals_notices_nothing() {
    goes_unnoticed("floats and timer", None);
}

#[test]
fn sigsuspend_returns_after_signals_only() {
    goes_unnoticed("sigsuspend", None);
}

/// Sends a queued signal with each injection.
fn loses_no_signal(name: &str) {
    let role = Role::start(name);
    const COUNT: u64 = 300;
    for _ in 0..COUNT {
        role.send(libc::SIGRTMIN());
        inject(&role);
    }
    let signals = || role.board.signals.load(Ordering::SeqCst);
    wait_for("all signals", || signals() >= COUNT);
    assert_eq!(signals(), COUNT);
    assert!(role.end().success());
}

#[test]
fn sigtimedwait_loses_no_signal() {
    loses_no_signal("sigtimedwait");
}

#[test]
fn ppoll_loses_no_signal_that_only_its_own_mask_lets_through() {
    loses_no_signal("ppoll and signals");
}

#[test]
fn a_process_that_is_stopped_stays_stopped_and_can_continue() {
    let role = Role::start("ppoll");
    role.send(libc::SIGSTOP);
    role.wait_for_state('T');
    for _ in 0..50 {
        inject(&role);
        role.wait_for_state('T');
    }
    let before = role.rounds();
    role.send(libc::SIGCONT);
    wait_for("another round", || role.rounds() > before);
    assert!(role.end().success());
}

#[test]
fn a_process_that_is_stopped_and_continued_meanwhile_goes_on() {
    let role = Role::start("floats and timer");
    let end = Instant::now() + Duration::from_millis(300);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < end {
                role.send(libc::SIGSTOP);
                std::thread::yield_now();
                role.send(libc::SIGCONT);
                std::thread::yield_now();
            }
        });
        while Instant::now() < end {
            inject(&role);
        }
    });
    let before = role.rounds();
    wait_for("another round", || role.rounds() > before);
    assert!(role.end().success());
}

#[test]
fn a_thread_that_cannot_stop_is_left_alone() {
    let role = Role::start("vfork");
    role.wait_for_state('D');
    let limit = Duration::from_millis(20);
    let error = run(&role.target, Seccomp::Unknown, limit, |_| Ok(())).err().unwrap();
    assert!(matches!(error, InjectionError::DoesNotStop { state: 'D', .. }), "{error}");
    wait_for("the end of the trace", || role.target.status().unwrap().tracer == 0);
}

/// Attaches to another child, and is killed between two system calls.
pub(super) fn die_while_tracing() {
    let work = |stopped: &mut Stopped| {
        stopped.system_call(libc::SYS_getpid, [0; 6])?;
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        Ok(())
    };
    let outcome = run(&super::child::other_child(), Seccomp::Unknown, PATIENCE, work);
    panic!("still alive: {:?}", outcome.err());
}

#[test]
fn the_death_of_the_tracer_between_two_calls_does_no_harm() {
    for name in ["ppoll", "nanosleep", "floats and timer"] {
        let role = Role::start(name);
        for _ in 0..20 {
            let status = super::child::run_on("dies while it traces", &role);
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
            let before = role.rounds();
            wait_for("another round", || role.rounds() > before);
        }
        assert!(role.end().success(), "{name}");
    }
}

#[test]
#[cfg(target_env = "gnu")]
fn a_restartable_sequence_is_restarted() {
    goes_unnoticed("restartable sequence", None);
}

#[test]
fn a_failing_system_call_and_a_panic_restore_the_thread() {
    let role = Role::start("ppoll");
    let bad_close = |stopped: &mut Stopped| {
        stopped.system_call(libc::SYS_close, [u64::from(u32::MAX), 0, 0, 0, 0, 0])
    };
    let error = run(&role.target, Seccomp::Unknown, PATIENCE, bad_close).err().unwrap();
    let InjectionError::Call { source, .. } = error else { panic!("{error}") };
    assert_eq!(source, rustix::io::Errno::BADF);
    let outcome = run::<()>(&role.target, Seccomp::Unknown, PATIENCE, |_| panic!("on purpose"));
    assert!(matches!(outcome, Err(InjectionError::Panicked { .. })));
    let before = role.rounds();
    wait_for("another round", || role.rounds() > before);
    assert!(role.end().success());
}

#[test]
fn another_tracer_is_named() {
    let role = Role::start("ppoll");
    let again = |stopped: &mut Stopped| {
        Ok(run(stopped.target(), Seccomp::Unknown, PATIENCE, |_| Ok(())).err())
    };
    let error = run(&role.target, Seccomp::Unknown, PATIENCE, again).unwrap().value.unwrap();
    let InjectionError::Process(ProcessError::Denied { denial, .. }) = &error else {
        panic!("{error}")
    };
    assert!(matches!(denial, Denial::Traced { name, .. } if name == "inject"), "{error}");
    assert!(role.end().success());
}

#[test]
fn a_process_that_ignores_sigtrap_is_refused() {
    let role = Role::start("ignores SIGTRAP");
    let error = run(&role.target, Seccomp::Unknown, PATIENCE, |_| Ok(())).err().unwrap();
    assert!(matches!(error, InjectionError::IgnoresTrap { .. }), "{error}");
}

#[test]
fn a_process_that_is_killed_meanwhile_is_gone() {
    let mut role = Role::start("floats");
    let pid = role.pid().cast_signed();
    let work = move |stopped: &mut Stopped| {
        // SAFETY: the call takes numbers.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
        stopped.system_call(libc::SYS_getpid, [0; 6])
    };
    let error = run(&role.target, Seccomp::Unknown, PATIENCE, work).err().unwrap();
    assert!(matches!(error, InjectionError::Process(ProcessError::Gone { .. })), "{error}");
    // Its status is still there for its parent.
    role.kill();
}

/// Prints how long the thread is stopped.
#[test]
fn the_stop_is_short() {
    let role = Role::start("ppoll");
    let mut stops: Vec<Duration> = (0..1000).map(|_| inject(&role)).collect();
    stops.sort();
    let [median, p99, max] = [stops[500], stops[990], stops[999]];
    eprintln!("stopped: median {median:?}, 99 % {p99:?}, maximum {max:?}");
    assert!(median < Duration::from_millis(20), "{median:?}");
}
