// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Options that cannot be combined with an attached agent.

use super::key_values::KeyValues;
use super::options::Item;
use super::{Error, Purpose};

/// Finds the first option that cannot be used, and says what to do.
pub(super) fn refuse(items: &[Item], purpose: Purpose) -> Result<(), Error> {
    for item in items {
        let Some(name) = item.name() else { continue };
        if let Some((part, advice)) = refusal(name, &item.text(), purpose) {
            return Err(Error::Refused { option: format!("-{name}{part}"), advice });
        }
    }
    Ok(())
}

/// The part of an option's value that is not allowed, and the advice.
fn refusal(name: &str, value: &str, purpose: Purpose) -> Option<(String, &'static str)> {
    let alone = |advice| Some((String::new(), advice));
    match (name, purpose) {
        ("daemonize", _) => alone(
            "pageferry watches the process that it starts; leave it out, and let the service \
                   manager put pageferry in the background",
        ),
        ("preconfig", _) => alone(
            "pageferry configures the machine by the command line; use options instead of \
                   preconfiguration commands",
        ),
        ("readconfig", _) => alone(
            "pageferry does not read the file, which may configure memory; write its settings \
                   as options",
        ),
        ("incoming", Purpose::Run) => alone(
            "this QEMU is to run a new guest; use pageferry qemu receive for a guest that \
                   arrives",
        ),
        ("incoming", Purpose::Receive) => {
            alone("pageferry adds -incoming defer itself; leave it out")
        }
        ("loadvm", Purpose::Receive) => {
            alone("the guest's state comes from the sender; leave it out")
        }
        ("machine" | "M", _) => confidential_guest(&KeyValues::parse(value, Some("type"))),
        ("numa", _) => {
            let node = KeyValues::parse(value, Some("type"));
            let size = node.get("mem")?;
            let advice = "add an -object memory-backend-ram for each node, and name it by memdev=";
            Some((format!(" node,mem={size}"), advice))
        }
        ("device", _) => device(value),
        _ => None,
    }
}

fn confidential_guest(machine: &KeyValues) -> Option<(String, &'static str)> {
    ["memory-encryption", "confidential-guest-support"].into_iter().find_map(|property| {
        let object = machine.get(property)?;
        let advice = "memory of confidential guests cannot be read from outside; leave it out";
        Some((format!(" {property}={object}"), advice))
    })
}

fn device(value: &str) -> Option<(String, &'static str)> {
    let driver = if value.starts_with('{') {
        match serde_json::from_str::<serde_json::Value>(value) {
            Ok(device) => device.get("driver")?.as_str()?.to_owned(),
            // QEMU also reads single quotes. Who hides a refused driver in them is refused, too.
            Err(_) => ["nvdimm", "ivshmem-plain"]
                .into_iter()
                .find(|driver| value.contains(driver))?
                .to_owned(),
        }
    } else {
        KeyValues::parse(value, Some("driver")).get("driver")?.to_owned()
    };
    let advice = match driver.as_str() {
        "nvdimm" => "persistent memory is not migrated; use pc-dimm or virtio-mem-pci",
        "ivshmem-plain" => "the guest moves this memory in its address space; leave it out",
        _ => return None,
    };
    Some((format!(" {driver}"), advice))
}

#[cfg(test)]
mod tests {
    use super::super::{Purpose, options};
    use super::refuse;

    fn refused(arguments: &[&str], purpose: Purpose) -> Option<String> {
        let arguments: Vec<_> = arguments.iter().map(Into::into).collect();
        refuse(&options::split(&arguments), purpose).err().map(|error| error.to_string())
    }

    #[test]
    fn refusals_name_the_option() {
        for (arguments, named) in [
            (&["-daemonize"][..], "-daemonize"),
            (&["--preconfig"], "-preconfig"),
            (&["-readconfig", "x.cfg"], "-readconfig"),
            (&["-incoming", "defer"], "-incoming"),
            (&["-machine", "q35,memory-encryption=sev0"], "-machine memory-encryption=sev0"),
            (&["-M", "confidential-guest-support=tdx0"], "-M confidential-guest-support=tdx0"),
            (&["-numa", "node,mem=1G"], "-numa node,mem=1G"),
            (&["-device", "nvdimm,memdev=m"], "-device nvdimm"),
            (&["-device", "memdev=m,driver=nvdimm"], "-device nvdimm"),
            (&["-device", r#"{"driver":"nvdimm","memdev":"m"}"#], "-device nvdimm"),
            (&["-device", "{'driver':'nvdimm','memdev':'m'}"], "-device nvdimm"),
            (&["-device", "ivshmem-plain,memdev=m"], "-device ivshmem-plain"),
        ] {
            for purpose in [Purpose::Run, Purpose::Receive] {
                let text = refused(arguments, purpose).unwrap_or_default();
                assert!(text.starts_with(&format!("{named} cannot be used")), "{text}");
            }
        }
    }

    #[test]
    fn a_snapshot_is_loaded_by_a_new_guest_only() {
        assert_eq!(refused(&["-loadvm", "s"], Purpose::Run), None);
        assert!(refused(&["-loadvm", "s"], Purpose::Receive).is_some());
    }

    #[test]
    fn harmless_options_pass() {
        let arguments = [
            "-snapshot",
            "-numa",
            "node,memdev=m",
            "-device",
            "pc-dimm,memdev=m",
            "-device",
            "help",
            "-device",
            r#"{"driver":"virtio-mem-pci"}"#,
            "-append",
            "-daemonize",
            "-machine",
            "q35,accel=kvm",
            "-name",
            "nvdimm",
        ];
        assert_eq!(refused(&arguments, Purpose::Receive), None);
    }
}
