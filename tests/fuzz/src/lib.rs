// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Common part of the fuzz targets. A target runs one function of `pageferry_tests::decoders`, with
//! an allocator that counts the memory of the decoder.

pub use libfuzzer_sys::fuzz_target;
pub use pageferry_tests::decoders;

/// Defines the fuzz target of a function over bytes.
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
