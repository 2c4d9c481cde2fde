// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The writer of the agent's log, which never makes another thread wait.
//!
//! All threads put their lines into a queue, and the thread `log` writes them to standard error.
//! Standard error may be a pipe whose reader hangs, or a file on a slow disk. The queue is bounded.
//! When it is full, lines are dropped, and the log says later how many. It also says how many lines
//! a [`Limit`] has left out.

use super::log_limit::{Limit, WINDOW};
use crate::sandbox::{ThreadKind, enter_thread};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Most lines that wait to be written.
const QUEUE: usize = 1024;
/// How long the process waits at its end for the last lines to be written.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// An entry of the queue.
enum Entry {
    Line(Vec<u8>),
    /// Asks the writing thread to confirm that all lines before this entry are written.
    Finish(SyncSender<()>),
}

/// Puts lines into the queue. Each write must be a whole line; it never waits.
pub struct LogWriter {
    queue: SyncSender<Entry>,
    /// Number of lines that were dropped because the queue was full.
    dropped: Arc<AtomicU64>,
}

/// Waits for the last lines, before the process ends or executes another program.
pub struct LogEnd(SyncSender<Entry>);

impl LogWriter {
    /// Starts the thread that writes to `output`. The thread also reports what `limit` has left
    /// out.
    ///
    /// # Errors
    /// If the kernel refuses a thread.
    pub fn start(output: impl Write + Send + 'static, limit: Limit) -> io::Result<(Self, LogEnd)> {
        let (queue, entries) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = dropped.clone();
        std::thread::Builder::new().name("log".into()).spawn(move || {
            enter_thread(ThreadKind::Log);
            write_all(output, &entries, &counted, &limit);
        })?;
        Ok((Self { queue: queue.clone(), dropped }, LogEnd(queue)))
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Entry::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogEnd {
    /// Waits until all lines so far are written, but at most one second.
    pub fn finish(&self) {
        let (written, wait) = sync_channel(1);
        // If the queue is full, the output hangs. Then there is no point in waiting.
        if self.0.try_send(Entry::Finish(written)).is_ok() {
            let _ = wait.recv_timeout(FINISH_TIMEOUT);
        }
    }
}

/// The thread `log`: writes the entries of the queue until all senders are gone.
fn write_all(
    mut output: impl Write, entries: &Receiver<Entry>, dropped: &AtomicU64, limit: &Limit,
) {
    let mut reported = Instant::now();
    // Lines of a place are left out only after others of it were written in the same window. So
    // when no line was written for a whole window, and everything left out was reported, nothing
    // can be left out before the next line comes. Then the thread waits without a timeout.
    let mut quiet = false;
    loop {
        let entry = if quiet {
            entries.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            entries.recv_timeout(WINDOW)
        };
        quiet = matches!(entry, Err(RecvTimeoutError::Timeout));
        let end = matches!(entry, Ok(Entry::Finish(_)) | Err(RecvTimeoutError::Disconnected));
        // A failed write of the log cannot be reported anywhere.
        if let Ok(Entry::Line(line)) = &entry {
            let _ = output.write_all(line);
        }
        if end || quiet || reported.elapsed() >= WINDOW {
            reported = Instant::now();
            for left_out in limit.left_out(reported, end) {
                let _ = writeln!(output, "{left_out}");
            }
        }
        match entry {
            Ok(Entry::Finish(written)) => {
                let _ = output.flush();
                let _ = written.send(());
            }
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(Entry::Line(_)) | Err(RecvTimeoutError::Timeout) => {}
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(
                output,
                "{lost} lines of the log were dropped: they could not be written in time"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Blocks in its first write until the sender of `start` is dropped.
    struct Slow {
        start: Receiver<()>,
        written: Sender<String>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.start.recv();
            let _ = self.written.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_queue_drops_lines_and_the_log_says_so() {
        let (release, start) = channel::<()>();
        let (written, lines) = channel();
        let (mut log, end) = LogWriter::start(Slow { start, written }, Limit::default()).unwrap();
        for number in 0..2 * QUEUE {
            log.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
        drop(release);
        drop((log, end));
        let lines: Vec<String> = lines.into_iter().collect();
        assert_eq!(lines[0], "0\n");
        let note = lines.concat();
        assert!(note.contains("lines of the log were dropped"), "{note}");
    }

    #[test]
    fn the_end_waits_for_the_last_line() {
        let (release, start) = channel::<()>();
        drop(release);
        let (written, lines) = channel();
        let (mut log, end) = LogWriter::start(Slow { start, written }, Limit::default()).unwrap();
        log.write_all(b"last\n").unwrap();
        end.finish();
        assert_eq!(lines.try_recv().unwrap(), "last\n");
    }
}
