// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a test must do at its end, also if a check fails: its other threads wait for it.

/// Calls the function on drop.
#[derive(Debug)]
pub struct OnDrop<F: Fn()>(pub F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
