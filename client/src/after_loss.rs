// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a lost agent is replaced without the VMM or its operator.
//!
//! The next agent is attached only after the lost one has exited. So it must not be attached while
//! somebody may still need the lost one, or while nobody needs another
//! ([`one-owner`](crate::invariants#one-owner)).

use crate::client::Client;
use crate::ownership::Ownership;

/// What a [`Supervisor`](crate::Supervisor) does after the loss of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterLoss {
    /// It starts the next agent.
    Replace,
    /// Another thread starts it: memory of the guest is missing, and the thread of the supervisor
    /// may wait for it ([`missing_pages`](crate::missing_pages)).
    Await,
    /// It starts none, for this reason.
    Stay(&'static str),
}

impl Client {
    /// What a supervisor does after the loss of the agent of connection `link`.
    pub(crate) fn after_loss(&self, link: u64) -> AfterLoss {
        let session = self.session();
        let is_current = session.control.link().id == link;
        let was_ended = session.was_ended();
        drop(session);
        let (ownership, missing) = (self.ownership(), self.missing());
        match decide(is_current, was_ended, ownership, missing.is_lost()) {
            AfterLoss::Replace if missing.is_continued_without(link) => AfterLoss::Await,
            decided => decided,
        }
    }
}

fn decide(is_current: bool, was_ended: bool, ownership: Ownership, is_lost: bool) -> AfterLoss {
    match ownership {
        _ if !is_current => AfterLoss::Stay("the VMM has attached another itself"),
        _ if was_ended => AfterLoss::Stay("the VMM has ended the agent"),
        Ownership::Relinquished => {
            AfterLoss::Stay("the guest was given up, and may need the lost agent where it runs")
        }
        Ownership::Gone => AfterLoss::Stay("the guest has left"),
        Ownership::Ours if is_lost => AfterLoss::Stay("memory of the guest is lost"),
        Ownership::Ours | Ownership::Awaiting => AfterLoss::Replace,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_replaced_only_where_that_loses_nothing() {
        let all = [Ownership::Ours, Ownership::Relinquished, Ownership::Gone, Ownership::Awaiting];
        for ownership in all {
            for is_lost in [false, true] {
                let replaced = matches!(
                    (ownership, is_lost),
                    (Ownership::Ours, false) | (Ownership::Awaiting, _)
                );
                let decided = decide(true, false, ownership, is_lost);
                assert_eq!(decided == AfterLoss::Replace, replaced, "{ownership:?} {is_lost}");
                assert_ne!(decide(false, false, ownership, is_lost), AfterLoss::Replace);
                assert_ne!(decide(true, true, ownership, is_lost), AfterLoss::Replace);
            }
        }
    }
}
