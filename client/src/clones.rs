// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clones: many guests of one image, which share the pages that none of them has written.

use crate::block::{BlockAdded, BlockSpec};
use crate::client::Client;
use crate::error::Error;
use crate::jobs::absolute_path;
use pageferry_protocol::control::Grants;
use pageferry_protocol::control::clones::{BaseBlock, OpenBaseReply};
use pageferry_protocol::control::request::Request;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The file whose pages all clones of an image on this machine share. A VMM maps its blocks
/// privately (`MAP_PRIVATE`), and adds them with [`Client::add_clone_block`].
#[derive(Debug)]
pub struct Base {
    file: OwnedFd,
    blocks: Vec<BaseBlock>,
}

impl Base {
    /// The file, open to be read.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its blocks: those of the image.
    pub fn blocks(&self) -> &[BaseBlock] {
        &self.blocks
    }

    /// The block with this id.
    pub fn block(&self, id: u32) -> Option<BaseBlock> {
        self.blocks.iter().find(|block| block.id == id).copied()
    }
}

impl Client {
    /// Opens the file whose pages all clones of an image share, and makes it if no clone has it. It
    /// exists as long as somebody has it open or mapped.
    ///
    /// A clone is a guest whose memory is private mappings of that file:
    ///
    /// ```no_run
    /// # use pageferry_client::{BlockSpec, Client, Error, RestoreOptions};
    /// # fn map_privately(_: std::os::fd::BorrowedFd<'_>, _: u64, _: u64) -> u64 { 0 }
    /// # fn clone(client: &Client) -> Result<(), Error> {
    /// let image = "/images/vm1".as_ref();
    /// let base = client.open_base(image)?;
    /// for block in base.blocks() {
    ///     let address = map_privately(base.file(), block.offset, block.length);
    ///     client.add_clone_block(BlockSpec {
    ///         id: block.id,
    ///         name: "ram",
    ///         gpa: 0,
    ///         length: block.length,
    ///         memory: base.file(),
    ///         fd_offset: block.offset,
    ///         vmm_address: address,
    ///         granularity: 4096,
    ///         discarded: false,
    ///     })?;
    /// }
    /// let clone = RestoreOptions { shared_base: true, ..RestoreOptions::default() };
    /// client.start_restore(image, &clone)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the image cannot be opened, there is no room for the file, the agent knows no clones, or
    /// it is lost.
    pub fn open_base(&self, image: &Path) -> Result<Base, Error> {
        let request = Request::OpenBase { path: absolute_path("image", image)? };
        let grants = Grants::of(&request).into_fds();
        let mut session = self.session();
        session.control.grant(&grants)?;
        let (OpenBaseReply { blocks }, file) =
            session.control.request_with_fd(&request, OpenBaseReply::decode)?;
        Ok(Base { file, blocks })
    }

    /// Adds a block that is a private mapping of a [`Base`]: `memory` is [`Base::file`],
    /// `fd_offset` the offset of the block in it, and `vmm_address` the address of the mapping.
    ///
    /// Until a restore with [`RestoreOptions::shared_base`](crate::RestoreOptions::shared_base) the
    /// guest must not run. Afterwards the block is like any other for jobs and trackers, except
    /// that no other guest can arrive in it. What the guest gives back is given back by
    /// [`Client::discard`] and [`Client::free`] alone: a `madvise` of the VMM would show what the
    /// image has there. The agent can read all memory of this process from now on.
    ///
    /// # Errors
    /// As [`Client::add_block`], and if the kernel has no userfaultfd for this process, another
    /// process maps the memory, or the agent knows no clones.
    pub fn add_clone_block(&self, spec: BlockSpec<'_>) -> Result<BlockAdded, Error> {
        self.add(spec, true)
    }
}
