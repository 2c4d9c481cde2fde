// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Joins runs of pages that lie near each other: for a disk, one read that is a little larger is
//! faster than two reads.

use pageferry_protocol::memory::{PAGE_SIZE, PageRange};

/// Runs with at most this many pages between them are read together: 64 KiB.
pub const NEAR: u64 = (64 << 10) / PAGE_SIZE;

/// The runs, in the order of their first pages. Runs with at most `gap` pages between them are
/// joined.
pub fn join_near_runs(
    runs: impl IntoIterator<Item = PageRange>, gap: u64,
) -> impl Iterator<Item = PageRange> {
    let mut rest = runs.into_iter().filter(|run| !run.is_empty()).peekable();
    std::iter::from_fn(move || {
        let mut run = rest.next()?;
        while let Some(next) = rest.next_if(|next| next.first <= run.end().saturating_add(gap)) {
            run.count = next.end().max(run.end()) - run.first;
        }
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_runs_with_a_small_gap_are_joined() {
        let run = PageRange::new;
        assert_eq!(
            join_near_runs([run(3, 9), run(4, 1), run(12, 1)], 0).collect::<Vec<_>>(),
            [run(3, 10)]
        );
        let runs = [run(3, 1), run(4, 2), run(8, 1), run(12, 0), run(20, 5)];
        assert_eq!(join_near_runs(runs, 0).collect::<Vec<_>>(), [run(3, 3), run(8, 1), run(20, 5)]);
        assert_eq!(join_near_runs(runs, 2).collect::<Vec<_>>(), [run(3, 6), run(20, 5)]);
        assert_eq!(join_near_runs(runs, 11).collect::<Vec<_>>(), [run(3, 22)]);
    }
}
