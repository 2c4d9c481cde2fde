// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What cannot be done with a clone, in words.

use super::{Clone, content, image};
use pageferry_client::error::chain;
use pageferry_client::{BlockSpec, Device, IncomingOptions, Target};
use pageferry_protocol::memory::PAGE_SIZE;
use pageferry_tests::memory::{BlockLayout, TestMemory, of_clone};
use pageferry_tests::require;
use pageferry_tests::scenario::image_guest::{
    PAGES, assert_completed, assert_failed, cloning, restore_modes,
};
use pageferry_tests::scenario::images::paused;
use pageferry_tests::scenario::{Guest, Host};

#[test]
fn no_other_guest_comes_into_the_memory_of_a_clone() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let host = Host::start();
    let guest = Guest::clone_of(&host, &image);
    for options in restore_modes() {
        let refused = guest.restored(&image, &options);
        assert_failed(&refused, &["block 0 is a clone's", "a restore with a shared base"]);
    }
    let listen = Target::Address("tcp:127.0.0.1:0".to_owned());
    let started = guest.client.start_incoming(listen, &IncomingOptions::default()).unwrap();
    let source_host = Host::start();
    let source = Guest::full(&source_host, PAGES);
    let target = Target::Address(started.address);
    let job = source.client.start_outgoing(target, &Default::default()).unwrap().job;
    assert_failed(&source.wait(job), &["block 0 is a clone's"]);
    guest.client.cancel().unwrap();
    guest.wait(started.job);
    assert!(!source.vmm.is_paused());
    // None of this is in the way of what it is for.
    assert_completed(&guest.restored(&image, &cloning()));
    assert_eq!(guest.block().load(3 * PAGE_SIZE + 8).unwrap(), content(3));
}

#[test]
fn only_a_mapping_of_the_base_of_the_image_becomes_a_clone() {
    if !require::uffd() {
        return;
    }
    let (host, image) = image();
    let plain = Guest::new(&host, PAGES);
    let refused = plain.restored(&image, &cloning());
    assert_failed(&refused, &["shared_base: block 0 is no private mapping of the base"]);
    drop(plain);
    // An image of its own, whose content is the same.
    let clone = Clone::of(&image);
    clone.guest.saved(&clone.host, "other", &paused());
    let other = clone.host.images.path("other");
    drop(clone.guest);
    let guest = Guest::clone_of(&clone.host, &other);
    let refused = guest.restored(&image, &cloning());
    assert_failed(&refused, &["shared_base: block 0 is no private mapping of the base"]);
    assert_completed(&guest.restored(&other, &cloning()));
}

#[test]
fn a_clone_has_no_device_in_another_process() {
    if !require::uffd() {
        return;
    }
    let (_host, image) = image();
    let clone = Clone::of(&image);
    let refused = chain(&clone.guest.client.device_socket(Device::Balloon).unwrap_err());
    assert!(refused.contains("block 0 is a clone's"), "{refused}");
}

#[test]
fn a_block_that_is_not_mapped_is_no_clone() {
    let (_host, image) = image();
    let host = Host::start();
    let (client, _) =
        pageferry_client::Client::connect(host.agent.socket(), Default::default()).unwrap();
    let base = client.open_base(&image).unwrap();
    let block = base.block(0).unwrap();
    let spec = BlockSpec {
        id: 0,
        name: "ram",
        gpa: 0,
        length: block.length,
        memory: base.file(),
        fd_offset: block.offset,
        vmm_address: 0,
        granularity: PAGE_SIZE,
        discarded: false,
    };
    let refused = chain(&client.add_clone_block(spec).unwrap_err());
    assert!(refused.contains("block 0 has no vmm_address"), "{refused}");
    let missing = chain(&client.open_base("/no/such/image".as_ref()).unwrap_err());
    assert!(missing.contains("/no/such/image"), "{missing}");
}

#[test]
fn a_block_must_be_mapped_privately_and_where_it_says() {
    let (_host, image) = image();
    let host = Host::start();
    let (client, _) =
        pageferry_client::Client::connect(host.agent.socket(), Default::default()).unwrap();
    let base = client.open_base(&image).unwrap();
    let block = base.block(0).unwrap();
    let layouts = of_clone(&client, &image, vec![BlockLayout::ram(block.length)]).unwrap();
    let memory = TestMemory::new(layouts).unwrap();
    let address = memory.blocks()[0].address();
    let refused = |vmm_address: u64, fd_offset: u64, length: u64| {
        let spec = BlockSpec {
            id: 0,
            name: "ram",
            gpa: 0,
            length,
            memory: base.file(),
            fd_offset,
            vmm_address,
            granularity: PAGE_SIZE,
            discarded: false,
        };
        chain(&client.add_clone_block(spec).unwrap_err())
    };
    let (offset, half) = (block.offset, block.length / 2);
    for wrong in [
        refused(address + half, offset, half),
        refused(address, offset + half, half),
        refused(address, 0, half),
    ] {
        assert!(wrong.contains("of the base: vmm_address must be a private mapping"), "{wrong}");
    }
    let not_mapped = refused(PAGE_SIZE, offset, half);
    assert!(not_mapped.contains("nothing is mapped at 0x1000"), "{not_mapped}");
}
