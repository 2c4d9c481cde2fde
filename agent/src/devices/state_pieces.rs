// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The states of the agent's devices in its own jobs: pieces after those of the VMM.
//!
//! The VMM does not see them. The source adds them when the VMM has saved its state, and the
//! destination takes them away before the VMM loads it.

use super::device::Device;
use super::registry::Devices;
use pageferry_protocol::control::state_pieces::PieceSize;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Names of the pieces: this, and the name of the device.
const PREFIX: &str = "pageferry-device:";
/// The largest state of a device.
const MAX_STATE: u64 = 64 << 10;

/// Adds the states of all devices. `file` has the `pieces` of the VMM. Returns the file that has
/// all pieces.
///
/// # Errors
/// If the kernel has no memory for the file.
pub fn add(
    devices: &Devices, pieces: &mut Vec<PieceSize>, file: Option<OwnedFd>,
) -> io::Result<Option<OwnedFd>> {
    // A device whose memory is not there has no state.
    let states: Vec<(&str, Vec<u8>)> = devices
        .all()
        .map(|device| (device.name(), device.save()))
        .filter(|(_, state)| !state.is_empty())
        .collect();
    if states.is_empty() {
        return Ok(file);
    }
    let mut all = File::from(memfd_create("pageferry-state", MemfdFlags::CLOEXEC)?);
    if let Some(file) = file {
        let mut vmms = File::from(file);
        vmms.rewind()?;
        io::copy(&mut vmms, &mut all)?;
    }
    for (name, state) in states {
        all.write_all(&state)?;
        let name = format!("{PREFIX}{name}");
        pieces.push(PieceSize { name, length: state.len() as u64 });
    }
    Ok(Some(all.into()))
}

/// Takes the states of devices away from `pieces`, and hands them to the devices. `file` has all
/// pieces, those of the VMM first. Returns a sentence if the agent lacks a device of the guest.
///
/// # Errors
/// If a state cannot be read, or a device refuses it.
pub fn take(
    devices: &Devices, pieces: &mut Vec<PieceSize>, file: BorrowedFd<'_>,
) -> io::Result<Option<String>> {
    let Some(first) = pieces.iter().position(|piece| piece.name.starts_with(PREFIX)) else {
        return Ok(None);
    };
    let mut lacking = Vec::new();
    let file = File::from(file.try_clone_to_owned()?);
    let mut at: u64 = pieces[..first].iter().map(|piece| piece.length).sum();
    for piece in pieces.split_off(first) {
        let name = piece.name.strip_prefix(PREFIX).unwrap_or(&piece.name);
        match devices.all().find(|device| device.name() == name) {
            Some(device) => load(&**device, &file, at, piece.length)?,
            None => lacking.push(name.to_owned()),
        }
        at += piece.length;
    }
    let sentence = |names: String| {
        format!(
            "the guest has a {names} that this agent does not have, so its state is lost: start \
             the agent with the devices of the one at the source"
        )
    };
    Ok((!lacking.is_empty()).then(|| sentence(lacking.join(" and a "))))
}

fn load(device: &dyn Device, file: &File, at: u64, length: u64) -> io::Result<()> {
    let name = device.name();
    let invalid = |why: String| {
        io::Error::new(io::ErrorKind::InvalidData, format!("the state of {name}: {why}"))
    };
    if length > MAX_STATE {
        return Err(invalid(format!("it has {length} bytes, allowed: at most {MAX_STATE}")));
    }
    let mut state = vec![0; length as usize];
    file.read_exact_at(&mut state, at)?;
    device.load(&state).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::access::SessionMemory;
    use crate::devices::balloon::Balloon;
    use crate::devices::registry::NewDevice;
    use crate::memory::GuestMemory;
    use std::os::fd::AsFd;
    use std::sync::Arc;

    #[derive(Debug)]
    struct Nothing;

    impl SessionMemory for Nothing {
        fn with_memory(&self, _: &mut dyn FnMut(&Arc<GuestMemory>)) -> bool {
            false
        }

        fn memory(&self) -> Option<Arc<GuestMemory>> {
            None
        }
    }

    fn with_balloon() -> (Devices, Arc<Balloon>) {
        let devices = Devices::default();
        devices.set_session(Arc::new(Nothing));
        let (front_end, _) = rustix::pipe::pipe().unwrap();
        devices.connect(NewDevice::Balloon, front_end).unwrap();
        let balloon = devices.balloon().unwrap().0.clone();
        (devices, balloon)
    }

    #[test]
    fn states_of_devices_travel_behind_those_of_the_vmm() {
        let (source, balloon) = with_balloon();
        balloon.set_target(5 << 20).unwrap();
        let vmms = crate::hooks::state_file_of([&b"cpus"[..]]).unwrap();
        let cpu = PieceSize { name: "cpu".into(), length: 4 };
        let mut pieces = vec![cpu.clone()];
        let file = add(&source, &mut pieces, Some(vmms)).unwrap().unwrap();
        assert_eq!(pieces[1].name, "pageferry-device:balloon");

        let (destination, balloon) = with_balloon();
        assert_eq!(take(&destination, &mut pieces.clone(), file.as_fd()).unwrap(), None);
        assert_eq!(balloon.status().target, 5 << 20);
        // Without such a device the guest comes all the same, and its VMM sees its own pieces.
        let mut seen = pieces.clone();
        let lost = take(&Devices::default(), &mut seen, file.as_fd()).unwrap().unwrap();
        assert!(lost.starts_with("the guest has a balloon that this agent"), "{lost}");
        assert_eq!(seen, [cpu]);
        pieces[1].length -= 1;
        let refused = take(&destination, &mut pieces, file.as_fd()).unwrap_err().to_string();
        assert!(refused.starts_with("the state of balloon: it has 15 bytes"), "{refused}");
    }
}
