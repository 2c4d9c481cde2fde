// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What every fuzz target is made of: one function of `pageferry_tests::decoders`, with the memory
//! that it takes counted.

pub use libfuzzer_sys::fuzz_target;
pub use pageferry_tests::decoders;

/// The fuzz target of a function over bytes.
#[macro_export]
macro_rules! target {
    ($room:ident::$decoder:ident) => {
        #[global_allocator]
        static HEAP: $crate::decoders::heap::CountingHeap = $crate::decoders::heap::CountingHeap;

        $crate::fuzz_target!(|data: &[u8]| {
            $crate::decoders::$room::$decoder(data);
        });
    };
}
