// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Splits QEMU's command line into options.
//!
//! QEMU's options take either no argument, or the next argument, whatever it looks like: in
//! `-append "-m 5"` and in `-name -m` there is no `-m`. So each option must be known. The two lists
//! below are those of QEMU 10.0 and 11.1, tried one by one, and those that older releases had. An
//! option that is on neither list is newer than this file. It is taken to have an argument, unless
//! what follows it is an option of the lists.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// An argument, or two that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// An option.
    Option {
        /// As it was written, with one or two dashes.
        written: OsString,
        /// Its value, if it takes one and one follows.
        value: Option<OsString>,
    },
    /// An argument without dash: a disk image.
    Image(OsString),
}

impl Item {
    /// Name of the option without its dashes.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Item::Option { written, .. } => option_name(written)?.to_str(),
            Item::Image(_) => None,
        }
    }

    /// The value of an option, as far as it is text; other bytes become replacement characters.
    pub(super) fn text(&self) -> String {
        match self {
            Item::Option { value: Some(value), .. } => value.to_string_lossy().into_owned(),
            Item::Option { value: None, .. } | Item::Image(_) => String::new(),
        }
    }
}

/// Splits the arguments that follow the program's name.
pub(super) fn split(arguments: &[OsString]) -> Vec<Item> {
    let mut items = Vec::new();
    let mut rest = arguments.iter().peekable();
    while let Some(argument) = rest.next() {
        let Some(name) = option_name(argument) else {
            items.push(Item::Image(argument.clone()));
            continue;
        };
        let takes_value = if is_one_of(name, WITHOUT_ARGUMENT) {
            false
        } else if is_one_of(name, WITH_ARGUMENT) {
            true
        } else {
            !rest.peek().and_then(|next| option_name(next)).is_some_and(|next| {
                is_one_of(next, WITHOUT_ARGUMENT) || is_one_of(next, WITH_ARGUMENT)
            })
        };
        let value = if takes_value { rest.next().cloned() } else { None };
        items.push(Item::Option { written: argument.clone(), value });
    }
    items
}

/// The name of an option: what follows one or two dashes.
fn option_name(argument: &OsStr) -> Option<&OsStr> {
    let bytes = argument.as_bytes();
    let name = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-"))?;
    Some(OsStr::from_bytes(name))
}

fn is_one_of(name: &OsStr, names: &str) -> bool {
    names.split_ascii_whitespace().any(|known| name == known)
}

/// Options that stand alone, separated by white space.
const WITHOUT_ARGUMENT: &str = "
    S async-teardown daemonize enable-fips enable-hax enable-kvm enable-sync-profile full-screen h
    help jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config
    nodefaults nographic old-param only-migratable perfmap preconfig s semihosting singlestep
    snapshot usb version win2k-hack xen-attach xen-domid-restrict
";

/// Options that take the next argument, separated by white space.
const WITH_ARGUMENT: &str = "
    D L M accel acpitable action add-fd append audio audiodev balloon bios blockdev boot bt cdrom
    chardev chroot compat cpu d debugcon device dfilter display drive dtb dump-vmstate echr fda
    fdb fsdev fw_cfg g gdb global hda hdb hdc hdd icount incoming initrd iscsi k kernel loadvm m
    machine mem-path mon monitor msg mtdblock name net netdev nic numa object option-rom
    overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty qtest qtest-log readconfig
    realtime rtc run-with runas sandbox sd seed semihosting-config serial set shim smbios smp
    soundhw spice tb-size tpmdev trace usbdevice uuid vga virtfs virtfs_synth vnc watchdog
    watchdog-action writeconfig xen-domid
";

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::{Item, WITH_ARGUMENT, WITHOUT_ARGUMENT, is_one_of, split};

    fn names(arguments: &[&str]) -> Vec<String> {
        let arguments: Vec<_> = arguments.iter().map(Into::into).collect();
        split(&arguments).iter().map(|item| item.name().unwrap_or("image").to_owned()).collect()
    }

    #[test]
    fn values_that_look_like_options_are_values() {
        assert_eq!(names(&["-append", "-m", "-name", "-m", "-m", "5"]), ["append", "name", "m"]);
    }

    #[test]
    fn flags_take_nothing() {
        assert_eq!(
            names(&["-S", "-m", "5", "--snapshot", "disk.img"]),
            ["S", "m", "snapshot", "image"]
        );
    }

    #[test]
    fn unknown_options_have_a_value_unless_an_option_follows() {
        assert_eq!(names(&["-new", "x", "-new", "-m", "5"]), ["new", "new", "m"]);
        assert_eq!(names(&["-new", "-1", "-S"]), ["new", "S"]);
    }

    #[test]
    fn an_option_at_the_end_has_no_value() {
        let items = split(&["-m".into()]);
        assert_eq!(items, [Item::Option { written: "-m".into(), value: None }]);
    }

    #[test]
    fn no_option_is_on_both_lists() {
        let mut alone = WITHOUT_ARGUMENT.split_ascii_whitespace();
        assert!(alone.all(|name| !is_one_of(OsStr::new(name), WITH_ARGUMENT)));
    }
}
