//! Agent or mock VMM as a process of its own, for the scenario tests.
fn main() {}
