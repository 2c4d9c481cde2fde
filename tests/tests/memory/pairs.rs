// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of docs/postcopy.md, cell by cell: which jobs work with each kind of memory, and the
//! error of those that do not.
//!
//! There is no row for host pages of 1 GiB, because few machines have one to spare. Unit tests
//! cover their checks.

use pageferry_client::tracking::uffd::WriteProtect;
use pageferry_client::{
    BlockSpec, Client, Error, IncomingOptions, Mode, OutgoingOptions, Phase, RestoreMode,
    RestoreOptions, SnapshotMode, SnapshotOptions, Target, Trackers,
};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::files;
use pageferry_tests::huge_pages::hugetlb_memfd;
use pageferry_tests::in_process::InProcessAgent;
use pageferry_tests::require;
use pageferry_tests::scenario::{SOON, ScriptedHooks, ScriptedVmm, config, passes};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const LENGTH: u64 = 4 << 20;

/// A row: the memory of the VMM that receives the guest, or that saves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Memfd,
    Tmpfs,
    Huge,
    Disk,
    /// `F_SEAL_FUTURE_WRITE`, set after the VMM has mapped it.
    Sealed,
    /// `vmm_address` is 0.
    NotMapped,
    /// The VMM has registered its mapping with its own userfaultfd.
    Registered,
}

#[derive(Debug, Clone, Copy)]
enum Column {
    Precopy,
    Postcopy,
    Hybrid,
    Eager,
    Lazy,
    Background,
    Paused,
    WriteProtect,
}

/// A VMM with one block, and its agent. The VMM is dropped first.
struct Place {
    client: Client,
    _registered: Option<WriteProtect>,
    mapping: MmapRegion,
    _agent: InProcessAgent,
}

/// The file under the block. `None` if this machine cannot have such a file.
fn file(row: Row) -> Option<File> {
    match row {
        Row::Huge => Some(hugetlb_memfd(LENGTH).unwrap().into()),
        Row::Tmpfs => require::tmpfs().map(|tmpfs| tmpfs.file("size=16M", LENGTH).unwrap()),
        Row::Disk => require::file_on_disk(Path::new(env!("CARGO_TARGET_TMPDIR")), LENGTH),
        _ => Some(files::unsealed_memfd("ram", LENGTH, MemfdFlags::empty()).unwrap().into()),
    }
}

impl Place {
    fn new(row: Row) -> Option<Self> {
        let file = file(row)?;
        let mapping =
            MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), LENGTH as usize)
                .unwrap();
        let address = mapping.as_ptr() as u64;
        if row == Row::Sealed {
            fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        }
        let registered =
            (row == Row::Registered).then(|| WriteProtect::register(&[(address, LENGTH)]).unwrap());
        let (agent, socket) = InProcessAgent::start().unwrap();
        let (client, channel) = Client::from_socket(socket, config()).unwrap();
        channel.spawn(ScriptedHooks(ScriptedVmm::new())).unwrap();
        let vmm_address = if row == Row::NotMapped { 0 } else { address };
        let block = files::block(0, "ram", file.as_fd(), LENGTH);
        client.add_block(BlockSpec { vmm_address, ..block }).unwrap();
        client.set_trackers(Trackers::LOG_IS_COMPLETE).unwrap();
        Some(Self { client, _registered: registered, mapping, _agent: agent })
    }

    /// A place whose memory holds something.
    fn full(row: Row) -> Option<Self> {
        let place = Self::new(row)?;
        let memory = place.mapping.as_volatile_slice();
        for page in (0..LENGTH / PAGE_SIZE).step_by(3) {
            memory.write_obj(page + 1, (page * PAGE_SIZE) as usize).unwrap();
        }
        Some(place)
    }

    #[track_caller]
    fn assert_full(&self) {
        let memory = self.mapping.as_volatile_slice();
        for page in 0..LENGTH / PAGE_SIZE {
            let found: u64 = memory.read_obj((page * PAGE_SIZE) as usize).unwrap();
            assert_eq!(found, if page % 3 == 0 { page + 1 } else { 0 }, "page {page:#x}");
        }
    }

    /// The result of the job.
    fn ends(&self, started: Result<u64, Error>) -> Result<(), String> {
        let job = match started {
            Ok(job) => job,
            Err(Error::Refused { sentence, .. }) => return Err(sentence),
            Err(error) => panic!("{error}"),
        };
        let status = self.client.wait(job, SOON).unwrap();
        match status.phase {
            Phase::Completed => Ok(()),
            Phase::Failed => Err(status.error_text().to_owned()),
            phase => panic!("{}: {}", phase.name(), status.error_text()),
        }
    }

    fn snapshot(&self, image: &Path, mode: SnapshotMode) -> Result<(), String> {
        let options = SnapshotOptions { mode, ..SnapshotOptions::default() };
        self.ends(self.client.start_snapshot(image, &options).map(|started| started.job))
    }

    fn restore(&self, image: &Path, mode: RestoreMode) -> Result<(), String> {
        let options = RestoreOptions { mode, ..RestoreOptions::default() };
        self.ends(self.client.start_restore(image, &options).map(|started| started.job))
    }
}

/// Migrates the guest. The error is the one at the source.
fn moves(source: &Place, destination: &Place, options: &OutgoingOptions) -> Result<(), String> {
    let listen = Target::Address("tcp:127.0.0.1:0".into());
    let incoming = destination.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
    let outgoing = source.client.start_outgoing(Target::Address(incoming.address), options);
    source.ends(outgoing.map(|started| started.job))?;
    assert_eq!(destination.client.wait(incoming.job, SOON).unwrap().phase, Phase::Completed);
    destination.assert_full();
    Ok(())
}

/// The result of a cell. `None` if this machine lacks something for it.
fn cell(row: Row, column: Column) -> Option<Result<(), String>> {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let saved = || Place::full(Row::Memfd).unwrap().snapshot(&image, SnapshotMode::Paused).unwrap();
    let came = |mode| {
        Some(moves(
            &Place::full(Row::Memfd)?,
            &Place::new(row)?,
            &OutgoingOptions { mode, ..passes(1) },
        ))
    };
    let restored = |mode| {
        saved();
        let place = Place::new(row)?;
        let outcome = place.restore(&image, mode);
        if outcome.is_ok() {
            place.assert_full();
        }
        Some(outcome)
    };
    match column {
        Column::Precopy => came(Mode::Precopy),
        Column::Postcopy => came(Mode::Postcopy),
        Column::Hybrid => came(Mode::Hybrid),
        Column::Eager => restored(RestoreMode::Eager),
        Column::Lazy => restored(RestoreMode::Lazy),
        Column::Background => Some(Place::full(row)?.snapshot(&image, SnapshotMode::Background)),
        Column::Paused => Some(Place::full(row)?.snapshot(&image, SnapshotMode::Paused)),
        Column::WriteProtect => {
            let place = Place::full(row)?;
            if let Err(error) = place.client.set_trackers(Trackers::WRITE_PROTECT) {
                return Some(Err(error.to_string()));
            }
            Some(moves(&place, &Place::new(Row::Memfd)?, &passes(1)))
        }
    }
}

const COLUMNS: [Column; 8] = [
    Column::Precopy,
    Column::Postcopy,
    Column::Hybrid,
    Column::Eager,
    Column::Lazy,
    Column::Background,
    Column::Paused,
    Column::WriteProtect,
];
/// In a cell: the job works.
const YES: &str = "";
const DISK: &str = "block 0 is a file on a disk";
const SEALED: &str = "block 0 is sealed against writing";
const NO_ADDRESS: &str = "block 0 has no vmm_address";
const IN_USE: &str = "block 0 cannot be registered";
const TAKEN: &str = "block 0 is registered with another userfaultfd already";

/// In the order of [`COLUMNS`].
const TABLE: [(Row, [&str; 8]); 7] = [
    (Row::Memfd, [YES; 8]),
    (Row::Tmpfs, [YES; 8]),
    (Row::Huge, [YES; 8]),
    (Row::Disk, [YES, DISK, DISK, YES, DISK, DISK, YES, YES]),
    (Row::Sealed, [SEALED, SEALED, SEALED, SEALED, SEALED, YES, YES, YES]),
    (Row::NotMapped, [YES, NO_ADDRESS, NO_ADDRESS, YES, NO_ADDRESS, NO_ADDRESS, YES, NO_ADDRESS]),
    (Row::Registered, [YES, IN_USE, IN_USE, YES, IN_USE, TAKEN, YES, TAKEN]),
];

#[test]
fn each_kind_of_memory_takes_what_the_table_says() {
    if !require::uffd() {
        return;
    }
    let pool = require::hugetlb(4);
    let mut wrong = Vec::new();
    for (row, cells) in TABLE {
        if row == Row::Huge && pool.is_none() {
            continue;
        }
        for (column, expected) in COLUMNS.into_iter().zip(cells) {
            let as_expected = match cell(row, column) {
                None => continue,
                Some(Ok(())) if expected == YES => continue,
                Some(Err(error)) if expected != YES && error.contains(expected) => continue,
                Some(outcome) => outcome,
            };
            wrong.push(format!("{row:?}, {column:?}: {as_expected:?}, expected: \"{expected}\""));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
