// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry man` and `pageferry completions`: made from the same definitions as `--help`.

use super::exit::Exit;
use clap::{Args, Command};
use clap_complete::Shell;
use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;

/// Where the man pages go.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// An existing folder, for example a `man1` folder in the MANPATH.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Which completions to print.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell that reads them.
    shell: Shell,
}

/// `pageferry man`
///
/// # Errors
/// If a page cannot be written.
pub fn write_man_pages(command: Command, args: &ManArgs) -> Result<Exit, Box<dyn Error>> {
    let failed = |error| format!("cannot write man pages to {}: {error}", args.folder.display());
    clap_mangen::generate_to(command, &args.folder).map_err(failed)?;
    Ok(Exit::Done)
}

/// `pageferry completions`
///
/// # Errors
/// If they cannot be written.
pub fn print_completions(
    mut command: Command, args: &CompletionsArgs,
) -> Result<Exit, Box<dyn Error>> {
    // Into memory first: the generator panics if it cannot write.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "pageferry", &mut text);
    io::stdout().lock().write_all(&text)?;
    Ok(Exit::Done)
}
