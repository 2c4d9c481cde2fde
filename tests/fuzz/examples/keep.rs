// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `keep TARGET FOLDER`: keeps the inputs in this folder for the test of the decoders.

use pageferry_fuzz::decoders::kept::keep;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(target), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err(std::io::Error::other("keep TARGET FOLDER"));
    };
    let inputs = std::fs::read_dir(folder)?.map(|entry| std::fs::read(entry?.path()));
    keep(&target, inputs.collect::<Result<_, _>>()?)
}
