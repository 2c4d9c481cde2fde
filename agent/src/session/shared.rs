// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lock of the session, and which connection owns the memory.
//!
//! Every connection has its own thread, which answers the requests of the connection in order. A
//! request that must wait (for a name server, the VMM, a file or a disk) waits on that thread, and
//! *without* the lock: it locks the session and checks it, releases the lock, waits, locks again,
//! and checks again. So the lock is held for a short time only, and other connections get their
//! answers at once. A debug build panics if code that holds the lock is about to wait (see
//! [`crate::waiting`]).
//!
//! Only the connection of the VMM may discard, populate, add and remove memory. Its thread handles
//! one request after another. So two of these requests never run at once, although they run
//! without the lock.
//!
//! To drop a job or a guest's memory can take long. So the session moves such values to
//! `Session::retired`, and a thread of its own drops them after the lock is released.

use super::Session;
use crate::devices::registry::Devices;
use crate::event::Event;
use crate::lock::lock;
use crate::sandbox::{ThreadKind, enter_thread};
use crate::session::devices::wait_for_devices;
use crate::session::join;
use crate::session::session_job::SessionJob;
use crate::vm_name::VmName;
use crate::waiting::{NoWait, may_wait};
use pageferry_protocol::control::role::Role;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a new VMM waits until the last request of the previous VMM, which is gone, has ended.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(5);

/// The session behind its lock.
#[derive(Debug)]
pub struct SharedSession {
    state: Mutex<State>,
    /// Notified when the connection of the VMM and its last request have ended.
    released: Condvar,
    drop_thread: DropThread,
    pub(super) devices: Arc<Devices>,
}

#[derive(Debug)]
struct State {
    session: Session,
    owner: Option<Owner>,
}

/// The connection that owns the memory.
#[derive(Debug)]
struct Owner {
    connection: u64,
    socket: Arc<OwnedFd>,
}

impl Owner {
    /// True if the VMM has closed the connection. Its last request may still be running.
    fn is_gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut polled = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::RDHUP)];
        // Does not wait.
        let polls = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        polls.is_ok() && !polled[0].revents().is_empty()
    }
}

/// The locked session. The thread that holds it must not wait.
pub struct Locked<'a> {
    // The fields are dropped in this order: the lock is released before waiting is allowed again.
    state: MutexGuard<'a, State>,
    _no_wait: NoWait,
    drop_thread: &'a DropThread,
}

impl Deref for Locked<'_> {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.state.session
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Session {
        &mut self.state.session
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        for retired in std::mem::take(&mut self.state.session.retired) {
            self.drop_thread.drop_on_thread(retired);
        }
    }
}

impl SharedSession {
    /// A session without memory and without a VMM, whose jobs wake `notify`.
    ///
    /// # Errors
    /// If the kernel refuses a thread.
    pub fn new(notify: Arc<Event>, vm_name: VmName) -> std::io::Result<Self> {
        let devices = Arc::<Devices>::default();
        let session = Session::new(notify, vm_name, devices.clone());
        let state = Mutex::new(State { session, owner: None });
        let released = Condvar::new();
        Ok(Self { state, released, drop_thread: DropThread::start()?, devices })
    }

    /// Locks the session.
    pub fn lock(&self) -> Locked<'_> {
        Locked { state: self.state(), _no_wait: NoWait::begin(), drop_thread: &self.drop_thread }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The role of a connection. The first connection that hands over memory is the VMM's.
    /// `takes_memory` says that the request hands over memory.
    ///
    /// If the previous VMM is gone, and its last request is still running, this waits until the
    /// request has ended, because the request may free memory that the new VMM is about to use.
    pub fn role(&self, connection: u64, socket: &Arc<OwnedFd>, takes_memory: bool) -> Role {
        let mut state = self.state();
        if takes_memory {
            let deadline = Instant::now() + CLAIM_TIMEOUT;
            let gone = |state: &State| {
                state
                    .owner
                    .as_ref()
                    .is_some_and(|owner| owner.connection != connection && owner.is_gone())
            };
            while gone(&state) && Instant::now() < deadline {
                may_wait("wait for the last request of a VMM that is gone");
                let left = deadline.saturating_duration_since(Instant::now());
                let waited = self.released.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.owner.is_none() {
                state.session.begin(process_of(socket));
                state.owner = Some(Owner { connection, socket: socket.clone() });
            }
        }
        match &state.owner {
            Some(owner) if owner.connection == connection => Role::Vmm,
            _ => Role::Operator,
        }
    }

    /// To be called after the request by which this connection has become the VMM's. If it was
    /// refused, the VMM has handed over nothing, and the connection is nobody's again.
    pub fn release_if_empty(&self, connection: u64) {
        let mut locked = self.lock();
        let owns = locked.state.owner.as_ref().is_some_and(|owner| owner.connection == connection);
        if owns && locked.is_empty() {
            locked.state.owner = None;
            locked.forget_vmm();
            drop(locked);
            self.released.notify_all();
        }
    }

    /// True if this connection is the VMM's.
    pub fn is_owner(&self, connection: u64) -> bool {
        self.state().owner.as_ref().is_some_and(|owner| owner.connection == connection)
    }

    /// True if a connection owns the memory.
    pub(super) fn has_owner(&self) -> bool {
        self.state().owner.is_some()
    }

    /// To be called when the other side has closed a connection. A request of it may still be
    /// running. If it is the connection of the VMM, this cancels the job now, because that request
    /// may be waiting for the job.
    pub fn connection_hung_up(&self, connection: u64) {
        if self.is_owner(connection) {
            self.lock().end();
        }
    }

    /// To be called when a connection and its last request have ended.
    pub fn connection_ended(&self, connection: u64) {
        let mut locked = self.lock();
        if locked.state.owner.as_ref().is_none_or(|owner| owner.connection != connection) {
            return;
        }
        log::info!("the VMM is gone");
        // The job ends on its own thread. It keeps the memory with which it was started.
        locked.end();
        let next = locked.next_session();
        let before = std::mem::replace(&mut locked.state.session, next);
        let memory = before.memory.clone();
        locked.retired.push(DeferredDrop::Session(Box::new(before)));
        drop(locked);
        // The next VMM may use the same memory.
        wait_for_devices(&memory);
        self.state().owner = None;
        self.released.notify_all();
    }

    /// Cancels the job and waits until it has ended, so that it can undo what it has changed in the
    /// VMM. Waits also for a job whose VMM is gone, because it may be about to send the commit.
    pub fn stop_and_join(&self) {
        may_wait("wait for the jobs to end");
        let mut locked = self.lock();
        locked.stop();
        let jobs = locked.take_threads();
        drop(locked);
        for (job, thread) in jobs {
            join(&job, thread);
        }
    }
}

/// The process that has opened the other end of a connection, if the kernel says.
fn process_of(socket: &OwnedFd) -> Option<u32> {
    let peer = rustix::net::sockopt::socket_peercred(socket).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

/// A value that the session does not use any more. To drop it may join a thread or free a guest's
/// memory, and can take any time.
#[derive(Debug)]
pub(super) enum DeferredDrop {
    /// A job that has ended.
    Job(SessionJob, Option<JoinHandle<()>>),
    /// Memory that was replaced.
    Memory(Arc<crate::memory::GuestMemory>),
    /// The session of a VMM that is gone.
    Session(Box<Session>),
}

/// The thread that drops the values that the session does not use any more. The drop of this type
/// joins the thread.
struct DropThread {
    retired: Option<Sender<DeferredDrop>>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for DropThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DropThread").finish_non_exhaustive()
    }
}

impl DropThread {
    fn start() -> std::io::Result<Self> {
        let (retired, next) = channel();
        let run = move || {
            enter_thread(ThreadKind::Control);
            drop_all(next);
        };
        let thread = std::thread::Builder::new().name("session-drop".into()).spawn(run)?;
        Ok(Self { retired: Some(retired), thread: Some(thread) })
    }

    fn drop_on_thread(&self, retired: DeferredDrop) {
        // Fails only if the thread has panicked. Then the value is dropped here.
        let _ = self.retired.as_ref().map(|sender| sender.send(retired));
    }
}

fn drop_all(next: Receiver<DeferredDrop>) {
    for retired in next {
        match retired {
            DeferredDrop::Job(job, thread) => join(&job, thread),
            DeferredDrop::Memory(memory) => drop(memory),
            DeferredDrop::Session(session) => drop(session),
        }
    }
}

impl Drop for DropThread {
    fn drop(&mut self) {
        self.retired = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that drops the values of ended sessions panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_protocol::control::job::{JobKind, SnapshotOptions};
    use pageferry_protocol::control::request::{BlockRange, FEATURE_FENCE, Request};
    use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
    use pageferry_protocol::shm::fence::FENCE_BYTES;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    const SIZE: u64 = 16 * PAGE_SIZE;

    fn ask(session: &SharedSession, role: Role, request: &Request, fds: Vec<OwnedFd>) -> u32 {
        let (code, body) = (request.code(), request.encode());
        let reply = session.handle_native(role, code, Request::decode(code, &body), fds);
        u32::from_le_bytes(reply.body[..4].try_into().unwrap())
    }

    /// A session of one block.
    fn session() -> SharedSession {
        let session =
            SharedSession::new(crate::job::notifier().unwrap(), VmName::default()).unwrap();
        let memfd = |size| {
            let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&fd, size).unwrap();
            fd
        };
        let geometry = BlockGeometry {
            id: 1,
            name: "ram".into(),
            gpa: 0,
            length: SIZE,
            granularity: PAGE_SIZE,
        };
        let add = Request::AddBlock { geometry, fd_offset: 0, vmm_address: 0, flags: 0 };
        assert_eq!(ask(&session, Role::Vmm, &add, vec![memfd(SIZE), memfd(4096)]), 0);
        session
    }

    #[test]
    fn a_waiting_discard_does_not_delay_other_connections() {
        let session = session();
        let ranges = vec![BlockRange { block: 1, offset: 0, length: SIZE }];
        let memory = session.lock().memory.clone();
        for request in
            [Request::Discard { flags: 1, ranges: ranges.clone() }, Request::Populate { ranges }]
        {
            // A snapshot holds this lock while it takes its instant.
            let instant = memory.marking.lock();
            let changes = memory.changes();
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| ask(&session, Role::Vmm, &request, Vec::new()));
                while memory.changes() == changes {
                    std::thread::yield_now();
                }
                assert_eq!(ask(&session, Role::Operator, &Request::QueryStatus, Vec::new()), 0);
                assert_ne!(
                    ask(&session, Role::Operator, &Request::Cancel, Vec::new()),
                    0,
                    "there is no job"
                );
                assert!(!waiting.is_finished());
                drop(instant);
                assert_eq!(waiting.join().unwrap(), 0);
            });
        }
    }

    #[test]
    fn a_new_vmm_waits_for_the_last_request_of_the_previous_one() {
        let session = session();
        let pair = || {
            UnixStream::pair()
                .map(|(ours, theirs)| (Arc::new(OwnedFd::from(ours)), theirs))
                .unwrap()
        };
        let ((first, first_vmm), (second, _second_vmm)) = (pair(), pair());
        assert_eq!(session.role(1, &first, false), Role::Operator);
        assert_eq!(session.role(1, &first, true), Role::Vmm);
        assert_eq!(session.role(2, &second, true), Role::Operator, "the first lives");
        // The first VMM closes the connection while a request of it is running.
        drop(first_vmm);
        session.connection_hung_up(1);
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let next =
                scope.spawn(|| (session.role(2, &second, true), ended.load(Ordering::SeqCst)));
            ended.store(true, Ordering::SeqCst);
            session.connection_ended(1);
            assert_eq!(next.join().unwrap(), (Role::Vmm, true));
        });
        assert!(session.lock().memory.blocks().is_empty(), "its memory is its own");
        session.connection_ended(1);
        assert_eq!(session.role(2, &second, false), Role::Vmm);
    }

    /// The old job may read or write memory that the VMM discards on the new connection.
    #[test]
    fn a_hello_on_a_new_connection_waits_for_the_last_job() {
        let session = session();
        let (ours, _vmm) = UnixStream::pair().unwrap();
        let ours = Arc::new(OwnedFd::from(ours));
        assert_eq!(session.role(1, &ours, true), Role::Vmm);
        let (end, ends) = channel::<()>();
        let job = {
            let mut locked = session.lock();
            let options = (&SnapshotOptions::default()).into();
            let job = locked.new_job(JobKind::Snapshot, options).unwrap();
            let running = job.clone();
            let run = move || {
                let _ = ends.recv();
                running.finish(Ok(()));
            };
            locked.run_job(SessionJob::Snapshot(job.clone()), run).unwrap();
            job
        };
        session.connection_hung_up(1);
        session.connection_ended(1);
        let fence = rustix::fs::memfd_create("fence", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fence, FENCE_BYTES).unwrap();
        let hello = Request::Hello {
            version_min: 1,
            version_max: 1,
            features: FEATURE_FENCE,
            agent: 2,
            name: String::new(),
        };
        std::thread::scope(|scope| {
            let back = scope.spawn(|| {
                let code = ask(&session, Role::Vmm, &hello, vec![fence]);
                (code, job.status().phase.is_final())
            });
            while !job.cancel.is_cancelled() {
                std::thread::yield_now();
            }
            drop(end);
            assert_eq!(back.join().unwrap(), (0, true));
        });
    }

    /// Runs `meanwhile` while a device of the session is in the middle of a buffer, and gives it
    /// what lets the device go on.
    fn in_the_middle_of_a_buffer(session: &SharedSession, meanwhile: impl FnOnce(Sender<()>)) {
        let (begin, begun) = channel();
        let (go_on, goes_on) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                session.with_memory(&mut |_| {
                    begin.send(()).unwrap();
                    let _ = goes_on.recv();
                })
            });
            begun.recv().unwrap();
            meanwhile(go_on);
        });
    }

    #[test]
    fn memory_is_removed_when_no_device_uses_it() {
        let session = session();
        in_the_middle_of_a_buffer(&session, |go_on| {
            let remove = Request::RemoveBlock { id: 1 };
            std::thread::scope(|scope| {
                let removed = scope.spawn(|| ask(&session, Role::Vmm, &remove, Vec::new()));
                while !session.lock().memory.blocks().is_empty() {
                    std::thread::yield_now();
                }
                assert!(!removed.is_finished());
                // The new set of blocks has the order of the old one.
                assert!(!session.lock().memory.populating_is_free());
                drop(go_on);
                assert_eq!(removed.join().unwrap(), 0);
            });
        });
        // What comes later sees that there is no block.
        assert!(session.with_memory(&mut |memory| assert!(memory.blocks().is_empty())));
    }

    #[test]
    fn a_vmm_that_is_gone_is_forgotten_when_no_device_uses_its_memory() {
        let session = session();
        let (ours, _vmm) = UnixStream::pair().unwrap();
        let ours = Arc::new(OwnedFd::from(ours));
        assert_eq!(session.role(1, &ours, true), Role::Vmm);
        in_the_middle_of_a_buffer(&session, |go_on| {
            std::thread::scope(|scope| {
                let ended = scope.spawn(|| session.connection_ended(1));
                while !session.lock().memory.blocks().is_empty() {
                    std::thread::yield_now();
                }
                assert!(session.has_owner() && !ended.is_finished());
                drop(go_on);
                ended.join().unwrap();
            });
        });
        assert!(!session.has_owner());
    }

    #[test]
    fn a_job_runs_when_no_device_is_in_the_middle_of_a_buffer() {
        let session = session();
        let (run, runs) = channel();
        in_the_middle_of_a_buffer(&session, |go_on| {
            let mut locked = session.lock();
            let options = (&SnapshotOptions::default()).into();
            let job = locked.new_job(JobKind::Snapshot, options).unwrap();
            let running = job.clone();
            let run = move || {
                run.send(()).unwrap();
                running.finish(Ok(()));
            };
            locked.run_job(SessionJob::Snapshot(job), run).unwrap();
            drop(locked);
            assert!(runs.recv_timeout(Duration::from_millis(50)).is_err());
            drop(go_on);
            runs.recv().unwrap();
        });
    }

    #[test]
    #[should_panic(expected = "must not wait")]
    fn a_wait_under_the_lock_panics_in_a_debug_build() {
        let session = session();
        let locked = session.lock();
        let _ = locked.memory.discard(&[], false);
    }
}
