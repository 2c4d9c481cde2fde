// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The counters of a job, and the kinds of jobs that have them.

use super::JobKind;
use crate::control::codec::{DecodeError, Decoder, Encoder};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident: $($kind:ident)|+,)*) => {
        /// The counters of a job. The wire, `--json` and the tables all follow this list. A counter
        /// is zero in jobs of a kind that does not have it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// The counters that jobs of this kind have, with their names.
            pub fn of_kind(&self, kind: JobKind) -> impl Iterator<Item = (&'static str, u64)> {
                let all: [(&[JobKind], _, _); _] =
                    [$((&[$(JobKind::$kind),+], stringify!($name), self.$name),)*];
                let has = all.into_iter().filter(move |(kinds, _, _)| kinds.contains(&kind));
                has.map(|(_, name, value)| (name, value))
            }

            pub(super) fn encode(&self, encoder: Encoder) -> Encoder {
                encoder$(.u64(self.$name))*
            }

            pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
                Ok(Self { $($name: decoder.u64(stringify!($name))?,)* })
            }
        }
    };
}

counters! {
    /// Passes that have ended, including the last one with the guest paused.
    passes: Outgoing | Incoming,
    /// Pages sent with their content. A page sent in two passes counts twice.
    pages_sent: Outgoing,
    /// Pages received with their content. A page received in two passes counts twice.
    pages_received: Incoming,
    /// Pages whose content was written to the image.
    pages_saved: Snapshot,
    /// Pages that were read from the image and placed.
    pages_restored: Restore,
    /// Allocated pages that were read and found to be zero, and holes that were sent as zero.
    /// Incoming: pages that were received as zero. Restore: pages that are zero in the image. They
    /// are holes from the start, and nothing is done for them.
    zero_pages: Outgoing | Incoming | Snapshot | Restore,
    /// Pages announced to the destination as discarded, or discarded in the image.
    discarded_pages: Outgoing | Incoming | Snapshot | Restore,
    /// Of the zero pages, those that were not read, because the guest freed them and has not
    /// written since.
    freed_pages: Outgoing,
    /// Discarded pages that were sent because the guest wrote into them afterwards.
    stray_pages: Outgoing | Incoming,
    /// Bytes written to, or read from, all streams: headers, content and state.
    wire_bytes: Outgoing | Incoming,
    /// Bytes of content written to, or read from, the image.
    image_bytes: Snapshot | Restore,
    /// Pages that are dirty and not sent yet; in postcopy, those that the destination still lacks;
    /// those that are still to be saved or restored.
    remaining_pages: Outgoing | Incoming | Snapshot | Restore,
    /// Pages that the current pass started with.
    pass_pages: Outgoing,
    /// Pages of the current pass that are done.
    pass_pages_done: Outgoing,
    /// Microseconds since the start of the job, until its end.
    total_us: Outgoing | Incoming | Snapshot | Restore,
    /// Microseconds from the pause hook until the destination confirmed that the guest runs, or
    /// stays paused as requested. Snapshot: until the VMM confirmed. Zero for a guest that its
    /// operator had paused before.
    downtime_us: Outgoing | Snapshot,
    /// Microseconds that the guest would be paused if the job paused it now.
    expected_downtime_us: Outgoing,
    /// Bytes per second over the last pass.
    bandwidth: Outgoing,
    /// Pages per second that the guest dirtied during the last pass.
    dirty_pages_per_s: Outgoing,
    /// Microseconds that the last sync of the trackers took.
    sync_us: Outgoing,
    /// Percent by which the guest is throttled.
    throttle_percent: Outgoing,
    /// Postcopy and lazy restore: accesses of the guest and its devices to missing pages that were
    /// answered.
    faults: Incoming | Restore,
    /// Writes of the guest and its devices to protected pages that were answered.
    write_faults: Snapshot,
    /// Postcopy and lazy restore: pages that were requested because the guest waited for them.
    requested_pages: Outgoing | Incoming | Restore,
    /// Postcopy and lazy restore: pages that were sent or placed without a request.
    pushed_pages: Outgoing | Incoming | Restore,
    /// Postcopy and lazy restore: missing pages that the guest discarded or freed, so that they are
    /// no longer needed.
    dropped_pages: Outgoing | Incoming | Restore,
    /// Postcopy: pages that the source freed because the destination has them.
    released_pages: Outgoing,
    /// Postcopy: microseconds without a connection.
    disconnected_us: Outgoing | Incoming,
    /// Microseconds from reading a fault or write fault to answering it, for half of them.
    fault_p50_us: Incoming | Snapshot | Restore,
    /// The same for 90 of 100.
    fault_p90_us: Incoming | Snapshot | Restore,
    /// The same for 99 of 100.
    fault_p99_us: Incoming | Snapshot | Restore,
    /// The same for the slowest.
    fault_max_us: Incoming | Snapshot | Restore,
    /// Pages that were saved early because the guest was about to write to them.
    copied_before_write_pages: Snapshot,
    /// Pages that were saved early because the guest discarded or freed them.
    copied_before_discard_pages: Snapshot,
    /// Pages that are unchanged since the base.
    unchanged_pages: Snapshot,
    /// Pages of the working set that were read ahead.
    working_set_pages: Restore,
    /// Microseconds from the request until the VMM confirmed that the guest runs, or is loaded and
    /// stays paused.
    time_to_run_us: Restore,
    /// Huge pages that the agent had the kernel make for what it placed.
    huge_pages: Incoming | Restore,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_has_the_counters_of_its_kind_only() {
        let counters = Counters { pages_saved: 7, pages_sent: 9, ..Counters::default() };
        let of = |kind| counters.of_kind(kind).collect::<Vec<_>>();
        assert!(of(JobKind::None).is_empty());
        assert!(of(JobKind::Snapshot).contains(&("pages_saved", 7)));
        assert!(of(JobKind::Outgoing).contains(&("pages_sent", 9)));
        for kind in [JobKind::Incoming, JobKind::Snapshot, JobKind::Restore] {
            assert!(of(kind).iter().all(|(name, _)| *name != "pages_sent"), "{kind:?}");
            assert!(of(kind).iter().any(|(name, _)| *name == "total_us"), "{kind:?}");
        }
    }
}
