// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes inputs that each decoder accepts, and those that were kept, to `corpus/TARGET`. libFuzzer
//! starts from them.

use pageferry_fuzz::decoders::TARGETS;
use pageferry_fuzz::decoders::kept::kept;
use std::path::Path;

fn main() -> std::io::Result<()> {
    for target in &TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{index}")), seed)?;
        }
        for (index, input) in kept(target.name).iter().enumerate() {
            std::fs::write(folder.join(format!("kept-{index}")), input)?;
        }
    }
    Ok(())
}
