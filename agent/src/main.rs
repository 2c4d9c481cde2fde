//! The `pageferry` binary.
fn main() {}
