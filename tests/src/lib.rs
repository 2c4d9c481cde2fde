//! Mock VMM harness.
