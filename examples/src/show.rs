// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processes of an example, and their reports.
//!
//! Each example is one program. In the processes that it starts it is the agent, or a VMM. A VMM
//! prints a line of JSON at its end.

use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::Error;
use pageferry_tests::process::Process;
use serde_json::Value;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Bytes of a mebibyte.
pub const MIB: u64 = 1 << 20;
/// Longest time for one process.
pub const LIMIT: Duration = Duration::from_secs(300);

/// Runs the agent if this process should be one, or else `run`. Prints errors.
pub fn program(run: impl FnOnce() -> Result<(), Error>) -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "agent") {
        return pageferry_tests::agent::main(arguments);
    }
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.sentence());
            ExitCode::FAILURE
        }
    }
}

/// Calls `work` with the path of this program and a folder. The folder is removed when `work` ends,
/// also if it panics. Ctrl-C leaves it.
///
/// # Errors
/// If the folder cannot be created, or `work` fails.
pub fn in_folder<T>(work: impl FnOnce(&Path, &Path) -> Result<T, Error>) -> Result<T, Error> {
    let program = std::env::current_exe().map_err(Error::io("find this program"))?;
    let folder = tempfile::Builder::new()
        .prefix("pageferry-")
        .tempdir()
        .map_err(Error::io("make a folder"))?;
    let outcome = work(&program, folder.path())?;
    folder.close().map_err(Error::io("remove a folder"))?;
    Ok(outcome)
}

/// Waits for the end of a VMM and reads its last line.
///
/// # Errors
/// If it fails.
pub fn report_of(vmm: &mut Process) -> Result<Value, Error> {
    let status = vmm.wait(LIMIT)?;
    let last = vmm.lines().pop().unwrap_or_default();
    if !status.success() {
        return Err(Error::Mismatch(format!("a VMM failed ({status}): {last}")));
    }
    parse(&last)
}

/// The report of a VMM.
///
/// # Errors
/// If it is not JSON.
pub fn parse(text: &str) -> Result<Value, Error> {
    serde_json::from_str(text)
        .map_err(|error| Error::Mismatch(format!("a VMM says \"{text}\": {error}")))
}

/// A number of a report, or 0 if the report has no such number.
pub fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_default()
}

/// A time of a report, which has it in microseconds, in words.
pub fn time(report: &Value, name: &str) -> String {
    format!("{:.1} ms", number(report, name) as f64 / 1000.0)
}

/// Bytes, in words.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}

/// Pages, in words.
pub fn pages(count: u64) -> String {
    format!("{count} pages, {}", mib(count * PAGE_SIZE))
}
