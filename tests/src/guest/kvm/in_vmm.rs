// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The KVM guest as a guest of the mock VMM.

use super::{GuestError, KvmGuest};
use crate::Error;
use crate::guest::Guest;
use pageferry_client::StatePiece;

/// Name of the state piece with the vCPU's registers.
const PIECE: &str = "vcpu0";

impl From<GuestError> for Error {
    fn from(error: GuestError) -> Self {
        Self::Kvm(Box::new(error))
    }
}

/// The source starts it with [`KvmGuest::boot`], and the destination by loading its state.
impl Guest for KvmGuest {
    fn start(&mut self) -> Result<(), Error> {
        Ok(Self::resume(self)?)
    }

    fn pause(&mut self) -> Result<(), Error> {
        Ok(Self::pause(self)?)
    }

    fn resume(&mut self) -> Result<(), Error> {
        Ok(Self::resume(self)?)
    }

    fn save_state(&mut self) -> Result<Vec<StatePiece>, Error> {
        Ok(vec![StatePiece { name: PIECE.into(), bytes: self.save()? }])
    }

    fn load_state(&mut self, state: &[StatePiece]) -> Result<(), Error> {
        let piece = state.iter().find(|piece| piece.name == PIECE);
        let missing = || Error::State { name: PIECE.into(), reason: "missing".into() };
        Ok(self.load(&piece.ok_or_else(missing)?.bytes)?)
    }
}
