// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files that an agent opens itself (landlock): its program and the libraries, so that it can
//! be upgraded, and nothing else. All others the opener opens.
//!
//! No folder can be listed, or opened for reading: the descriptor of a folder would name it to the
//! opener.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The newest version of landlock that this file knows. An older kernel enforces what it can.
const VERSION: ABI = ABI::V6;
/// Where libraries may be.
const LIBRARIES: [&str; 6] =
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache"];

/// Enters the landlock domain, in which the programs in `programs` can be executed. Returns false
/// if the kernel has none, or not all of it.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn restrict(programs: &[PathBuf]) -> Result<bool, RulesetError> {
    let execute = AccessFs::Execute | AccessFs::ReadFile;
    let mut rules = create(CompatLevel::BestEffort)?;
    let libraries = LIBRARIES.into_iter().map(PathBuf::from);
    let paths: BTreeSet<PathBuf> =
        libraries.chain(programs.iter().cloned()).chain(mapped_from()).collect();
    for path in paths {
        rules = allow(rules, &path, execute)?;
    }
    // Where the output of a program goes that is asked for its version.
    rules = allow(rules, Path::new("/dev/null"), AccessFs::ReadFile | AccessFs::WriteFile)?;
    Ok(rules.restrict_self()?.ruleset == RulesetStatus::FullyEnforced)
}

/// Tries whether the kernel can enforce all that [`restrict`] asks for.
///
/// # Errors
/// What it lacks.
pub(super) fn try_all() -> Result<(), RulesetError> {
    create(CompatLevel::HardRequirement).map(drop)
}

/// Rules by which nothing is allowed.
fn create(level: CompatLevel) -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(VERSION))?
        .handle_access(AccessNet::from_all(VERSION))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()
}

fn allow(
    rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    // A path that does not exist needs no rule.
    match PathFd::new(path) {
        Ok(found) => rules.add_rule(PathBeneath::new(found, access)),
        Err(_) => Ok(rules),
    }
}

/// The folders of the libraries that this program uses.
fn mapped_from() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let libraries = files.filter(|file| file.to_string_lossy().contains(".so"));
    libraries.filter_map(|file| file.parent().map(Path::to_owned)).collect()
}
