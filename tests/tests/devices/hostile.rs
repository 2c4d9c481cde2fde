// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Front-ends and neighbours that know where it hurts: they undo what the agent has set, use up
//! what it has, or stand in its way.

use pageferry_protocol::control::Frame;
use pageferry_protocol::control::vhost_user::FrontendReq;
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::files::{block, memfd};
use pageferry_tests::front_end::balloon::pages;
use pageferry_tests::front_end::host::FIRST_FREE_PAGE;
use pageferry_tests::front_end::{DeviceHost, PATIENCE, Piece};
use pageferry_tests::scenario::images::paused;
use rustix::fs::{FlockOperation, OFlags, fcntl_getfl, fcntl_setfl, flock};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;

const FIRST: u64 = FIRST_FREE_PAGE;
const PAGES: u64 = 1024;
/// Most regions of a front-end.
const MAX_REGIONS: u64 = 509;

#[test]
fn table_of_any_number_of_regions_is_refused() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    let other = memfd(4096 * PAGE_SIZE).unwrap();
    // One is there already.
    let refused = (1..=MAX_REGIONS).find(|index| {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: (1 << 33) + index * 16 * PAGE_SIZE,
            memory_size: PAGE_SIZE,
            userspace_addr: (1 << 44) + index * PAGE_SIZE,
            mmap_offset: index * PAGE_SIZE,
            mmap_handle: other.as_raw_fd(),
        };
        balloon.driver.front_end.frontend.add_mem_region(&region).is_err()
    });
    assert_eq!(refused, Some(MAX_REGIONS));
    drop(balloon);
    host.agent
        .process()
        .wait_for_line("its table has 510 regions, allowed: 509", PATIENCE)
        .unwrap();
    host.balloon().inflate(&pages(FIRST, 1));
    host.assert_alive();
}

/// The event belongs to both sides, so a front-end can make it one that waits.
#[test]
fn event_that_waits_again_holds_up_no_job_and_no_vmm() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    let queue = balloon.driver.queue(0);
    let call = queue.call.try_clone().unwrap();
    // A descriptor of the same event.
    let file = fd_of(call.as_raw_fd());
    fcntl_setfl(&file, fcntl_getfl(&file).unwrap() & !OFlags::NONBLOCK).unwrap();
    call.write(u64::MAX - 1).unwrap();
    queue.put(&[Piece::readable(FIRST * PAGE_SIZE, 4096)]);
    queue.kick();
    let image = host.folder().join("image");
    let job = host.vmm.start_snapshot(&image, &paused()).unwrap();
    host.vmm.wait_job(job, PATIENCE).unwrap();
    host.vmm.client().remove_block(0).unwrap();
    host.agent.process().terminate().unwrap();
    host.agent.process().wait(PATIENCE).unwrap();
}

/// The descriptor of this process with this number, once more.
fn fd_of(fd: i32) -> OwnedFd {
    let this = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(this, fd, PidfdGetfdFlags::empty()).unwrap()
}

/// The library would refuse the table, but the agent looks at the next message before that.
#[test]
fn regions_that_overlap_end_nothing() {
    let mut host = DeviceHost::ram(PAGES);
    let balloon = host.balloon();
    let whole = balloon.driver.front_end.regions()[0];
    let words = |numbers: &[u64]| -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    };
    let region = |size: u64| words(&[whole.guest_phys_addr, size, whole.userspace_addr, 0]);
    let size = PAGES * PAGE_SIZE;
    let table = [words(&[2]), region(size), region(size / 2)].concat();
    let mut set_table = Frame::request(FrontendReq::SET_MEM_TABLE.into(), table);
    let file = || host.block(0).file().try_clone().map(OwnedFd::from).unwrap();
    set_table.fds = vec![file(), file()];
    let rings = balloon.driver.queues[&0].rings();
    let address = balloon.driver.front_end.addresses(rings);
    let (descriptors, used, available) =
        (address.desc_table_addr, address.used_ring_addr, address.avail_ring_addr);
    let body = words(&[0, descriptors, used, available, 0]);
    let set_address = Frame::request(FrontendReq::SET_VRING_ADDR.into(), body);
    host.agent.process().freeze().unwrap();
    balloon.driver.front_end.send(&set_table).unwrap();
    balloon.driver.front_end.send(&set_address).unwrap();
    host.agent.process().thaw().unwrap();
    drop(balloon);
    host.balloon().inflate(&pages(FIRST, 1));
    host.assert_alive();
}

#[test]
fn block_that_is_handed_over_twice_ends_nothing() {
    let mut host = DeviceHost::ram(PAGES);
    let mut balloon = host.balloon();
    let file = host.block(0).file().clone();
    let mut again = block(9, "again", file.as_fd(), PAGES * PAGE_SIZE);
    again.gpa = 1 << 33;
    host.vmm.client().add_block(again).unwrap();
    balloon.inflate(&pages(FIRST, 1));
    assert_eq!(host.balloon_now().outside, 0);
    host.vmm.client().remove_block(9).unwrap();
    balloon.inflate(&pages(FIRST + 1, 1));
    host.assert_alive();
}

/// Every user who may look into a folder may lock it.
#[test]
fn locked_folder_and_long_path_keep_no_front_end_away() {
    let folder = tempfile::tempdir().unwrap();
    let longest = 107 - folder.path().as_os_str().len() - 1;
    let path: PathBuf = folder.path().join("b".repeat(longest));
    let socket = folder.path().join("a");
    let mut agent = std::process::Command::new(pageferry_tests::process::program());
    agent.arg("agent").arg("--socket").arg(&socket).arg("--balloon").arg(&path);
    let mut agent = pageferry_tests::process::Process::spawn("agent", &mut agent).unwrap();
    agent.wait_for_line("balloon on", PATIENCE).unwrap();
    let locked = [folder.path().to_owned(), std::env::temp_dir()].map(|folder| {
        let folder = File::open(folder).unwrap();
        flock(&folder, FlockOperation::NonBlockingLockExclusive).map(|()| folder)
    });
    let mut front_end = UnixStream::connect(&path).unwrap();
    front_end.set_read_timeout(Some(PATIENCE)).unwrap();
    // GET_FEATURES.
    front_end.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    std::io::Read::read_exact(&mut front_end, &mut [0; 20]).unwrap();
    drop(locked);
}

/// Messages without an end, none of which wants an answer.
#[test]
fn flood_of_messages_keeps_no_agent_from_its_end() {
    let mut host = DeviceHost::ram(PAGES);
    let flood = UnixStream::connect(host.balloon_socket()).unwrap();
    // SET_VRING_NUM.
    let message: Vec<u8> =
        [8u32, 1, 8, 0, 128].iter().flat_map(|word| word.to_le_bytes()).collect();
    let many = message.repeat(2000);
    let mut writer = flood.try_clone().unwrap();
    let writing = std::thread::spawn(move || while writer.write_all(&many).is_ok() {});
    host.balloon_now();
    host.agent.process().terminate().unwrap();
    host.agent.process().wait(PATIENCE).unwrap();
    drop(flood);
    writing.join().unwrap();
}
