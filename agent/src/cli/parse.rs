// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads the values of options. An error says what is allowed, in the words of a user.

use crate::store;
use crate::transport::Address;

pub use crate::sizes::parse_size;
use pageferry_protocol::control::job::{
    Compression, HugePages, MIN_BANDWIDTH, MIN_CAPTURE_MEMORY, Mode, NonConvergence, ResumePolicy,
};
use pageferry_protocol::control::request::MAX_VM_NAME;
use pageferry_protocol::image::stored::{SCHEMES, is_stored, unknown_scheme};
use pageferry_protocol::memory::PAGE_SIZE;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reads a time: a number with us, ms, s, m or h.
///
/// # Errors
/// If the text is malformed. The error says what is allowed.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("\"{text}\": write a number and us, ms, s, m or h, as 300ms")),
    };
    let number: f64 =
        digits.parse().map_err(|_| format!("\"{text}\": \"{digits}\" is not a number"))?;
    let time = Duration::try_from_secs_f64(number * unit);
    time.map_err(|_| format!("\"{text}\": write a time that is not negative, as 300ms"))
}

/// Reads the longest time that something may take: as [`parse_duration`], but at least a
/// microsecond and at most a day.
///
/// # Errors
/// If the text is malformed or the time not allowed. The error says what is allowed.
pub fn parse_timeout(text: &str) -> Result<Duration, String> {
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    match parse_duration(text)? {
        time if (Duration::from_micros(1)..=LONGEST).contains(&time) => Ok(time),
        _ => Err(format!("\"{text}\": write a time from 1us to 24h")),
    }
}

/// Reads the path of a folder, which must exist.
///
/// # Errors
/// If it does not.
pub fn parse_folder(text: &str) -> Result<PathBuf, String> {
    match std::fs::metadata(text) {
        Ok(found) if found.is_dir() => Ok(text.into()),
        Ok(_) => Err("not a folder".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The unit of a virtio-mem device.
///
/// # Errors
/// If the text is malformed, or no power of two of at least a page.
pub fn parse_block_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size.is_power_of_two() && size >= PAGE_SIZE {
        return Ok(size);
    }
    Err(format!("\"{text}\": write a power of two of at least 4K, as 2M"))
}

/// Reads a throttle: a part of the guest's time.
///
/// # Errors
/// If the text is malformed. The error says what is allowed.
pub fn parse_throttle(text: &str) -> Result<u32, String> {
    let percent = text.strip_suffix('%').unwrap_or(text).parse().ok();
    percent
        .filter(|percent| *percent <= 99)
        .ok_or_else(|| format!("\"{text}\": write a number of percent from 0 to 99, as 20"))
}

/// Reads a bandwidth limit: as [`parse_size`], but at least [`MIN_BANDWIDTH`], or 0 for no limit.
///
/// # Errors
/// If the text is malformed or the limit too low. The error says what is allowed.
pub fn parse_bandwidth(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        rate @ (0 | MIN_BANDWIDTH..) => Ok(rate),
        _ => Err(format!("\"{text}\": write at least {}K, or 0 for no limit", MIN_BANDWIDTH >> 10)),
    }
}

/// Reads the memory for captured pages: as [`parse_size`], but at least [`MIN_CAPTURE_MEMORY`].
///
/// # Errors
/// If the text is malformed or the memory too small. The error says what is allowed.
pub fn parse_capture_memory(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        bytes @ MIN_CAPTURE_MEMORY.. => Ok(bytes),
        _ => Err(format!("\"{text}\": write at least {}M", MIN_CAPTURE_MEMORY >> 20)),
    }
}

/// The absolute path of a file. The name of an image in a store stays as it is.
///
/// # Errors
/// If the name has a scheme that is of no store, or there is no current folder.
pub fn absolute(path: &Path) -> io::Result<PathBuf> {
    let name = path.display();
    if let Some(scheme) = path.to_str().and_then(unknown_scheme) {
        let allowed = SCHEMES.join(", ");
        let sentence = format!(
            "\"{name}\": {scheme} is no scheme of a store, allowed are {allowed}; \
             a file of this name is ./{name}"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
    }
    if store::is_stored(path) {
        return Ok(path.to_owned());
    }
    std::path::absolute(path)
        .map_err(|error| io::Error::new(error.kind(), format!("path \"{name}\": {error}")))
}

/// Reads the name of a store, or of a part of it.
pub(super) fn parse_store(text: &str) -> Result<String, String> {
    if is_stored(text) {
        return Ok(text.to_owned());
    }
    let sentence =
        "write s3://BUCKET, gs://BUCKET, az://CONTAINER or file:///FOLDER, as s3://images";
    Err(format!("\"{text}\": {sentence}"))
}

/// Reads an address of a migration. The agent gets the text.
pub(super) fn parse_address(text: &str) -> Result<String, String> {
    Address::parse(text).map(|_| text.to_owned()).map_err(|error| crate::error::chain(&error))
}

/// Reads the name of a VM.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_VM_NAME || text.chars().any(char::is_control) {
        return Err(format!("{text:?}: write 1 to {MAX_VM_NAME} bytes without control characters"));
    }
    Ok(text.to_owned())
}

pub(super) fn parse_policy(text: &str) -> Result<NonConvergence, String> {
    let found = NonConvergence::NAMES.iter().find(|(name, _)| *name == text);
    found
        .map(|(_, policy)| *policy)
        .ok_or_else(|| format!("\"{text}\": write keep-going, throttle, stop, fail or postcopy"))
}

pub(super) fn parse_mode(text: &str) -> Result<Mode, String> {
    let found = Mode::NAMES.iter().find(|(name, _)| *name == text);
    found
        .map(|(_, mode)| *mode)
        .ok_or_else(|| format!("\"{text}\": write precopy, postcopy or hybrid"))
}

/// Reads whether a guest runs where it arrives: auto or never.
///
/// # Errors
/// If the text is something else. The error says what is allowed.
pub fn parse_resume(text: &str) -> Result<ResumePolicy, String> {
    let found = ResumePolicy::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, policy)| *policy).ok_or_else(|| format!("\"{text}\": write auto or never"))
}

/// Parses whether a guest gets huge pages.
///
/// # Errors
/// If the text is something else. The error says what is allowed.
pub fn parse_huge_pages(text: &str) -> Result<HugePages, String> {
    let found = HugePages::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, choice)| *choice).ok_or_else(|| format!("\"{text}\": write auto or never"))
}

pub(super) fn parse_compression(text: &str) -> Result<Compression, String> {
    match (text, text.strip_prefix("zstd:")) {
        ("none", _) => Ok(Compression::None),
        ("lz4", _) => Ok(Compression::Lz4),
        ("zstd", _) => Ok(Compression::Zstd(Compression::DEFAULT_LEVEL)),
        (_, Some(level)) => match level.parse() {
            Ok(level @ 1..=Compression::MAX_LEVEL) => Ok(Compression::Zstd(level)),
            _ => Err(format!(
                "\"{text}\": \"{level}\" is not a level from 1 to {}",
                Compression::MAX_LEVEL
            )),
        },
        _ => Err(format!("\"{text}\": write none, lz4, zstd or zstd:LEVEL")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_an_unknown_scheme_is_not_taken_for_a_path() {
        for name in ["s3://images/vm", "file:///images/vm"] {
            assert_eq!(absolute(Path::new(name)).unwrap(), Path::new(name));
        }
        for name in ["http://host/images/vm", "https://host/vm", "gcs://images/vm", "://vm"] {
            let error = absolute(Path::new(name)).unwrap_err().to_string();
            assert!(error.contains("allowed are s3, s3a, gs, az,"), "{name}: {error}");
        }
        for path in ["vm.img", "./http://vm", "/images/a://b", "C:vm"] {
            assert!(absolute(Path::new(path)).unwrap().is_absolute(), "{path}");
        }
    }

    #[test]
    fn times_and_sizes_are_read_or_refused_with_the_reason() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for wrong in ["", "3", "ms", "-1s", "1e99h"] {
            assert!(
                parse_duration(wrong).unwrap_err().contains(&format!("\"{wrong}\"")),
                "{wrong}"
            );
        }
        assert!(parse_timeout("0s").unwrap_err().contains("1us to 24h"));
        assert!(parse_timeout("25h").unwrap_err().contains("1us to 24h"));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("0x1000"), Ok(4096));
        for wrong in ["", "G", "-1", "99999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!((parse_throttle("20"), parse_throttle("99%")), (Ok(20), Ok(99)));
        for wrong in ["", "%", "100", "-1", "20%%", "half"] {
            assert!(parse_throttle(wrong).unwrap_err().contains("from 0 to 99"), "{wrong}");
        }
        assert_eq!(parse_capture_memory("4M"), Ok(4 << 20));
        assert!(parse_capture_memory("4095K").unwrap_err().contains("at least 4M"));
        assert_eq!((parse_bandwidth("0"), parse_bandwidth("64K")), (Ok(0), Ok(64 << 10)));
        for wrong in ["1", "63K", "65535"] {
            assert!(parse_bandwidth(wrong).unwrap_err().contains("at least 64K"), "{wrong}");
        }
    }

    #[test]
    fn an_address_is_read_or_refused_with_the_forms() {
        for right in ["tcp:10.0.0.2:4444", "tcp:[::1]:0", "unix:stream", "unix:/run/stream"] {
            assert_eq!(parse_address(right).as_deref(), Ok(right));
        }
        let long = format!("unix:/{}", "x".repeat(108));
        for wrong in
            ["", "4444", "10.0.0.2:4444", "tcp:4444", "tcp://10.0.0.2:4444", "unix:", &long]
        {
            let error = parse_address(wrong).unwrap_err();
            assert!(error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn a_compression_is_read_or_refused_with_the_reason() {
        assert_eq!(parse_compression("none"), Ok(Compression::None));
        assert_eq!(parse_compression("lz4"), Ok(Compression::Lz4));
        assert_eq!(parse_compression("zstd"), Ok(Compression::Zstd(1)));
        assert_eq!(parse_compression("zstd:19"), Ok(Compression::Zstd(19)));
        for wrong in
            ["", "gzip", "lz4:1", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:257", "ZSTD"]
        {
            assert!(
                parse_compression(wrong).unwrap_err().contains(&format!("\"{wrong}\"")),
                "{wrong}"
            );
        }
    }
}
