// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration space of the balloon: four numbers of 32 bits.

/// Bytes of the configuration space.
const SIZE: usize = 16;
/// Version of the saved state.
const VERSION: u32 = 1;

/// The configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// Pages that the balloon is to hold.
    pub target_pages: u32,
    /// Pages that it holds, as the driver says.
    pub actual_pages: u32,
    /// With what the driver fills free pages; only with `PAGE_POISON`.
    pub poison: u32,
}

impl Config {
    /// The configuration space: target, actual, the command of free page hinting, and the pattern.
    pub fn to_bytes(self, hint_command: u32) -> Vec<u8> {
        [self.target_pages, self.actual_pages, hint_command, self.poison]
            .map(u32::to_le_bytes)
            .concat()
    }

    /// A write of the driver. It may write two of the numbers; the rest of the write is ignored.
    pub fn write(&mut self, offset: u32, bytes: &[u8]) {
        let mut space = self.to_bytes(0);
        let start = offset as usize;
        if start >= SIZE {
            return;
        }
        let length = bytes.len().min(SIZE - start);
        space[start..start + length].copy_from_slice(&bytes[..length]);
        let number = |at: usize| {
            u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]])
        };
        (self.actual_pages, self.poison) = (number(4), number(12));
    }

    /// The state of the device: version, and the three numbers.
    pub fn save(self) -> Vec<u8> {
        [VERSION, self.target_pages, self.actual_pages, self.poison].map(u32::to_le_bytes).concat()
    }

    /// Reads a state.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn load(state: &[u8]) -> Result<Self, String> {
        let numbers: Vec<u32> = state
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        match (numbers.as_slice(), state.len()) {
            (&[VERSION, target_pages, actual_pages, poison], 16) => {
                Ok(Self { target_pages, actual_pages, poison })
            }
            (&[version, ..], _) if version != VERSION => {
                Err(format!("version is {version}, allowed is {VERSION}"))
            }
            _ => Err(format!("it has {} bytes, allowed are 16", state.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn driver_writes_two_of_the_numbers() {
        let mut config = Config { target_pages: 7, ..Config::default() };
        config.write(4, &5u32.to_le_bytes());
        config.write(12, &6u32.to_le_bytes());
        assert_eq!(config, Config { target_pages: 7, actual_pages: 5, poison: 6 });
        config.write(0, &[0xff; 100]);
        assert_eq!(config.target_pages, 7);
        assert_eq!(config.actual_pages, u32::MAX);
        let saved = config.save();
        assert_eq!(Config::load(&saved), Ok(config));
        assert!(Config::load(&saved[..15]).unwrap_err().contains("15 bytes"));
        assert!(Config::load(&[9; 16]).unwrap_err().contains("version"));
    }

    proptest! {
        #[test]
        fn no_write_and_no_state_does_harm(offset: u32, bytes: Vec<u8>) {
            Config::default().write(offset, &bytes);
            let _ = Config::load(&bytes);
        }
    }
}
