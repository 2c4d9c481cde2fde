//! Writes the agent's log without making other threads wait.
//!
//! Standard error may be a pipe whose reader hangs, or a file on a slow disk. So the thread `log`
//! writes to it, and all other threads only put lines into a queue. When the queue is full, lines
//! are dropped, and the log says how many. It also says what a [`Limit`] left out.

use super::log_limit::{Limit, WINDOW};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Most lines that wait to be written.
const QUEUE: usize = 1024;
/// How long the end of the process waits for the last lines to be written.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

enum Entry {
    Line(Vec<u8>),
    /// All lines before it were written.
    Finish(SyncSender<()>),
}

/// Takes whole lines and never waits.
pub struct LogWriter {
    queue: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
}

/// Waits for the last lines.
pub struct LogEnd(SyncSender<Entry>);

impl LogWriter {
    /// Starts the thread that writes to `output`, and says what `limit` left out.
    ///
    /// # Errors
    /// If the kernel has no thread.
    pub fn start(output: impl Write + Send + 'static, limit: Limit) -> io::Result<(Self, LogEnd)> {
        let (queue, entries) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = dropped.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(output, &entries, &counted, &limit))?;
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
    /// Waits until what was logged so far is written, but no longer than a second.
    pub fn finish(self) {
        let (written, wait) = sync_channel(1);
        // With a full queue the output hangs, and is not waited for.
        if self.0.try_send(Entry::Finish(written)).is_ok() {
            let _ = wait.recv_timeout(FINISH_TIMEOUT);
        }
    }
}

fn write_all(
    mut output: impl Write, entries: &Receiver<Entry>, dropped: &AtomicU64, limit: &Limit,
) {
    let mut said = Instant::now();
    // A line is left out only after others of its place were written within the same second. So
    // when nothing was written for a second, and all was said, there is nothing to wake up for.
    let mut quiet = false;
    loop {
        let entry = if quiet {
            entries.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            entries.recv_timeout(WINDOW)
        };
        quiet = matches!(entry, Err(RecvTimeoutError::Timeout));
        let end = matches!(entry, Ok(Entry::Finish(_)) | Err(RecvTimeoutError::Disconnected));
        // There is nowhere to say that the log cannot be written.
        if let Ok(Entry::Line(line)) = &entry {
            let _ = output.write_all(line);
        }
        if end || quiet || said.elapsed() >= WINDOW {
            said = Instant::now();
            for left_out in limit.left_out(said, end) {
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
            let _ =
                writeln!(output, "{lost} lines of the log were dropped: nobody read them in time");
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
    fn a_log_that_nobody_reads_keeps_nobody_waiting_and_says_what_it_dropped() {
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
