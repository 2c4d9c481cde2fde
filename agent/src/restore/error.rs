// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a restore is refused.

use crate::image::ImageFault;
use crate::image::blocks::BlocksDifference;
use crate::store::StoreError;
use pageferry_protocol::error::size as bytes;
use pageferry_protocol::image::working_set::{MAX_SIZE, WorkingSetError};
use pageferry_protocol::image::{ImageId, id_text};
use rustix::io::Errno;
use std::path::PathBuf;

/// Why an image cannot be restored into the memory of a VMM.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A block of the image does not exist in the VMM.
    #[error(
        "block {id} \"{name}\" of the image does not exist in this VMM: add all blocks that the guest had"
    )]
    OnlyInImage {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A block of the VMM does not exist in the image.
    #[error(
        "block {id} \"{name}\" of this VMM is not in the image: add only the blocks that the guest had"
    )]
    NotInImage {
        /// The block.
        id: u32,
        /// Its name.
        name: String,
    },
    /// A host page is too large for a lazy restore.
    #[error(
        "block {id}: the host page size is {}, a lazy restore takes at most {}: restore it eagerly",
        bytes(*size), bytes(*limit)
    )]
    HostPageTooLarge {
        /// The block.
        id: u32,
        /// Size of a host page in bytes.
        size: u64,
        /// The largest size that can be placed at once.
        limit: u64,
    },
    /// The memory is of a kind for which the kernel reports no missing faults.
    #[error(
        "block {id} is a file on a disk, and a lazy restore takes memfds, tmpfs and hugetlbfs: restore it eagerly"
    )]
    OnDisk {
        /// The block.
        id: u32,
    },
    /// The VMM gave no address for a block.
    #[error("block {id} has no vmm_address, which a lazy restore needs: restore it eagerly")]
    NotMapped {
        /// The block.
        id: u32,
    },
    /// The image is not the one from which the guest was being restored.
    #[error(
        "{path} is image {}, and the guest is of image {}: put that one there",
        id_text(found),
        id_text(expected)
    )]
    OtherImage {
        /// The path.
        path: String,
        /// The image that is there.
        found: ImageId,
        /// The image of the guest.
        expected: ImageId,
    },
    /// The file at the path of the working set cannot be used.
    #[error("working_set is {}", path.display())]
    WorkingSet {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: WorkingSetFileError,
    },
    /// A block of a guest that is to be a clone is none.
    #[error(
        "shared_base: block {id} is no private mapping of the base of this image, as it is now; \
         Client::open_base and Client::add_clone_block make it one"
    )]
    NoClone {
        /// The block.
        id: u32,
    },
    /// A field of a block differs from the image.
    #[error("block {id}: {field} is {here} in this VMM, and {image} in the image")]
    Field {
        /// The block.
        id: u32,
        /// The field that differs.
        field: &'static str,
        /// Its value in the VMM.
        here: String,
        /// Its value in the image.
        image: String,
    },
}

impl From<BlocksDifference> for RestoreError {
    fn from(difference: BlocksDifference) -> Self {
        match difference {
            BlocksDifference::OnlyInBase { id, name } => Self::OnlyInImage { id, name },
            BlocksDifference::NotInBase { id, name } => Self::NotInImage { id, name },
            BlocksDifference::Field { id, field, here, there: image } => {
                Self::Field { id, field, here, image }
            }
        }
    }
}

/// Why the file at the path cannot be used and must not be replaced.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetFileError {
    /// The kernel refused to open or read it.
    #[error("it cannot be read")]
    Read(#[source] Errno),
    /// Its store.
    #[error("it cannot be read")]
    Store(#[source] StoreError),
    /// It is not a regular file, or it is too long. With its size in bytes.
    #[error(
        "it is no working set: it is not a regular file, or its size of {} is more than the limit of {}",
        bytes(*.0), bytes(MAX_SIZE)
    )]
    NotAWorkingSet(u64),
    /// It is a file of another kind.
    #[error("it is not to be overwritten")]
    OtherKind(#[source] WorkingSetError),
    /// It is empty.
    #[error("it is empty, which is no working set: remove it, or choose another name")]
    Empty,
    /// There is no file, and none can be written.
    #[error("it could not be written")]
    Write(#[source] Box<ImageFault>),
}
