// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A value whose memory is zeroed when it is dropped.
//!
//! For keys of the cryptography library, which does not zero them itself. What the compiler copied
//! on the way into the box, such as the stack of a function that returned, is not zeroed.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ops::Deref;
use zeroize::Zeroize;

/// A value in memory of its own, which is zeroed on drop.
pub(super) struct Wiped<T>(Box<MaybeUninit<T>>);

impl<T> Wiped<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Box::new(MaybeUninit::new(value)))
    }
}

impl<T> Deref for Wiped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` has initialized it, and only `drop` ends that.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        // SAFETY: it is initialized, see `deref`, and is not used after this.
        unsafe { self.0.assume_init_drop() };
        self.0.as_mut().zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_value_is_dropped_once() {
        let value = Arc::new(7);
        let wiped = Wiped::new(value.clone());
        assert_eq!((**wiped, Arc::strong_count(&value)), (7, 2));
        drop(wiped);
        assert_eq!(Arc::strong_count(&value), 1);
    }
}
