// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A histogram of the time that faults wait, from the read of the fault to its answer.
//!
//! One thread reads a fault ([`Latency::begin_wait`]) and puts its key and the time into a table.
//! Another thread answers the fault ([`Latency::end_wait`]), takes it from the table and adds the
//! time to the histogram. All parts are atomic counters: there is no lock and no allocation.
//!
//! The table has a fixed size, with room for more faults than a guest has vCPUs. If two waiting
//! faults fall on the same place of the table, the second one is not timed.
//!
//! The buckets are narrow, for percentiles. Metrics get few and wide ones ([`Latency::waits`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Places of the table of waiting faults.
const PLACES: usize = 4096;
/// Bits of a time, after the highest one, that select its bucket. So a bucket is at most 3% wide.
const PRECISION: u32 = 5;
/// Number of buckets: for times up to 2^40 us, which are twelve days.
const BUCKETS: usize = ((40 - PRECISION as usize) + 1) << PRECISION;

/// Upper bound of the first wide bucket: 2^5 us, which are 32 us.
const FIRST_WIDE: u32 = 5;
/// Upper bound of the last wide bucket that has one: 2^24 us, which are 17 s.
const LAST_WIDE: u32 = 24;
/// Number of wide buckets. The last one has no upper bound.
const WIDE_BUCKETS: usize = (LAST_WIDE - FIRST_WIDE) as usize + 2;

/// The times that faults waited, in wide buckets: each is twice as wide as the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FaultWaits {
    counts: [u64; WIDE_BUCKETS],
    sum: Duration,
}

impl FaultWaits {
    /// Adds the times of another job.
    pub fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(sum, count)| *sum += count);
        self.sum += other.sum;
    }

    /// The sum of all times.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// The upper bound of each bucket in seconds, the last one infinite, and the number of times in
    /// it.
    pub fn buckets(&self) -> [(f64, u64); WIDE_BUCKETS] {
        std::array::from_fn(|index| {
            let bound = match index + 1 {
                WIDE_BUCKETS => f64::INFINITY,
                _ => (1u64 << (FIRST_WIDE as usize + index)) as f64 / 1e6,
            };
            (bound, self.counts[index])
        })
    }
}

/// The histogram, and the table of waiting faults.
#[derive(Debug)]
pub struct Latency {
    start: Instant,
    waiting: Box<[Waiting]>,
    buckets: Box<[AtomicU64]>,
    /// The sum of all times, in microseconds.
    sum: AtomicU64,
    /// The longest time, in microseconds.
    max: AtomicU64,
}

/// A place of the table of waiting faults.
#[derive(Debug, Default)]
struct Waiting {
    /// The key of the fault plus one; 0 if the place is free.
    key: AtomicU64,
    /// When the fault was read, in nanoseconds from the start.
    since: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            waiting: (0..PLACES).map(|_| Waiting::default()).collect(),
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl Latency {
    /// Nanoseconds from the start to `time`.
    fn nanos(&self, time: Instant) -> u64 {
        u64::try_from(time.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }

    /// The place of a fault in the table.
    fn place(&self, key: u64) -> &Waiting {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.waiting[hash as usize % PLACES]
    }

    /// Records that the fault `key` was read at `since`, and waits for its answer.
    pub fn begin_wait(&self, key: u64, since: Instant) {
        let place = self.place(key);
        if place.key.load(Ordering::Relaxed) == 0 {
            place.since.store(self.nanos(since), Ordering::Relaxed);
            place.key.store(key + 1, Ordering::Release);
        }
    }

    /// Records that the fault `key` was answered.
    pub fn end_wait(&self, key: u64) {
        let place = self.place(key);
        if place.key.load(Ordering::Acquire) != key + 1 {
            return;
        }
        let since = place.since.load(Ordering::Relaxed);
        if place.key.compare_exchange(key + 1, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.record(Duration::from_nanos(self.nanos(Instant::now()).saturating_sub(since)));
        }
    }

    /// Forgets the fault `key`: its thread does not wait any more, or waits with another fault.
    pub fn forget(&self, key: u64) {
        let place = self.place(key);
        let _ = place.key.compare_exchange(key + 1, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Adds a time to the histogram.
    pub fn record(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(micros, Ordering::Relaxed);
        self.max.fetch_max(micros, Ordering::Relaxed);
    }

    /// All times so far, in wide buckets.
    pub fn waits(&self) -> FaultWaits {
        let sum = Duration::from_micros(self.sum.load(Ordering::Relaxed));
        let mut waits = FaultWaits { sum, ..FaultWaits::default() };
        for (index, bucket) in self.buckets.iter().enumerate() {
            // A narrow bucket is within one wide bucket, because it ends at a power of two, or
            // before.
            let bits = u64::BITS - upper_bound(index).leading_zeros();
            let wide = (bits.saturating_sub(FIRST_WIDE) as usize).min(WIDE_BUCKETS - 1);
            waits.counts[wide] += bucket.load(Ordering::Relaxed);
        }
        waits
    }

    /// The 50th, 90th and 99th percentile and the maximum, in microseconds. All are zero if there
    /// was no fault.
    pub fn summary(&self) -> [u64; 4] {
        let counts: Vec<u64> =
            self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let max = self.max.load(Ordering::Relaxed);
        let quantile = |percent: u64| {
            let wanted = (total * percent).div_ceil(100);
            let mut sum = 0;
            let found = counts.iter().position(|count| {
                sum += count;
                sum >= wanted && wanted > 0
            });
            found.map_or(0, |index| upper_bound(index).min(max))
        };
        [quantile(50), quantile(90), quantile(99), max]
    }
}

/// The bucket of a time. Each small time has its own bucket; for larger times the highest bits
/// select it.
fn bucket(micros: u64) -> usize {
    let exponent = (u64::BITS - micros.leading_zeros()).saturating_sub(PRECISION + 1);
    let index = ((exponent as usize) << PRECISION) + (micros >> exponent) as usize;
    index.min(BUCKETS - 1)
}

/// The largest time of a bucket.
fn upper_bound(index: usize) -> u64 {
    let exponent = (index >> PRECISION).saturating_sub(1);
    let mantissa = index as u64 - ((exponent as u64) << PRECISION);
    ((mantissa + 1) << exponent) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_times_and_is_narrow(micros in 0u64..1 << 39) {
            let index = bucket(micros);
            let top = upper_bound(index);
            prop_assert!(micros <= top && top - micros <= micros / 32, "{} in bucket {} up to {}", micros, index, top);
            prop_assert!(index == 0 || upper_bound(index - 1) < micros, "{}", micros);
        }

        #[test]
        fn quantiles_are_those_of_the_sorted_times(mut times in prop::collection::vec(0u64..100_000, 1..300)) {
            let latency = Latency::default();
            times.iter().for_each(|micros| latency.record(Duration::from_micros(*micros)));
            times.sort_unstable();
            let [p50, p90, p99, max] = latency.summary();
            prop_assert_eq!(max, *times.last().unwrap());
            for (percent, found) in [(50, p50), (90, p90), (99, p99)] {
                let exact = times[(times.len() * percent).div_ceil(100) - 1];
                prop_assert!(found >= exact && found - exact <= exact / 32, "{}: {} for {}", percent, found, exact);
            }
        }
    }

    #[test]
    fn a_wide_bucket_has_the_times_below_its_bound() {
        let latency = Latency::default();
        for micros in [0, 31, 32, 63, 64, 1 << 20, (1 << 24) - 1, 1 << 24, 1 << 41] {
            latency.record(Duration::from_micros(micros));
        }
        let mut waits = latency.waits();
        let found: Vec<_> = waits.buckets().into_iter().filter(|(_, count)| *count > 0).collect();
        let (second, last) = (1048576e-6, 16777216e-6);
        let expected =
            [(32e-6, 2), (64e-6, 2), (128e-6, 1), (2.0 * second, 1), (last, 1), (f64::INFINITY, 2)];
        assert_eq!(found, expected);
        let sum = waits.sum();
        assert!(sum > Duration::from_micros(1 << 41));
        waits.add(&latency.waits());
        assert_eq!(waits.sum(), 2 * sum);
        assert_eq!(waits.buckets()[0].1, 4);
    }

    #[test]
    fn a_fault_is_timed_once_from_its_first_read() {
        let latency = Latency::default();
        assert_eq!(latency.summary(), [0; 4]);
        let since =
            Instant::now().checked_sub(Duration::from_millis(30)).unwrap_or_else(Instant::now);
        let latency = Latency { start: since, ..latency };
        latency.begin_wait(7, since);
        latency.begin_wait(7, Instant::now());
        latency.end_wait(7);
        latency.end_wait(7);
        latency.end_wait(8);
        assert!(latency.summary()[3] >= 30_000);
        assert_eq!(
            latency.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum::<u64>(),
            1
        );
    }
}
