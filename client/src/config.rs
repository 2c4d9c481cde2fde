// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a client is set up.

use crate::error::Error;
use crate::mapping_process::MappingProcess;
use pageferry_protocol::control::request::MAX_VM_NAME;
use std::sync::Arc;
use std::time::Duration;

/// Shortest duration in a [`Config`]. With less, threads of the client would do nothing but look at
/// the clock.
const SHORTEST: Duration = Duration::from_millis(1);
/// How a client is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the VM, for people: in the status and the log of the agent. Empty if it has none. At
    /// most 128 bytes, without control characters.
    pub name: String,
    /// Guest physical address space that the dirty log covers, in bytes from address zero. No block
    /// can lie outside. The default of 4 TiB takes a memfd of 128 MiB, which is sparse: it costs
    /// memory only where guest pages are dirty.
    pub log_covers: u64,
    /// The process that has the guest's memory mapped, if it is not this one:
    /// [`BlockSpec::vmm_address`](crate::BlockSpec::vmm_address) are its addresses, and
    /// userfaultfds are for its mappings.
    pub mapped_by: Option<Arc<dyn MappingProcess>>,
    /// How long the agent may take to answer a request, and to accept an answer. It is lost if it
    /// takes longer.
    ///
    /// During a background snapshot the agent answers a discard only when it has saved the pages.
    /// The client cuts large discards into requests that a disk can save in time at 13 MiB per
    /// second, if this and `stall_timeout` are at least 80 milliseconds. To listen at a host name,
    /// the agent may need up to 5 seconds for the lookup, so leave it more than that.
    pub request_timeout: Duration,
    /// The same while the agent holds up a guest that could continue without it: a background
    /// snapshot watches its writes, or a hook has paused it and it is not relinquished.
    /// `request_timeout` applies if that is shorter. An agent that hangs is then found within this
    /// time and half a second, and the guest continues. The agent answers at any time, however busy
    /// its jobs are; this has to cover a machine that gives the agent no processor for a while. A
    /// false alarm costs the job.
    ///
    /// The same while memory is missing (postcopy, lazy restore) that the next agent would bring,
    /// since a [`Supervisor`](crate::Supervisor) gets it. Without one, the guest cannot continue
    /// without its agent, and a false alarm could cost it: there `request_timeout` applies.
    pub stall_timeout: Duration,
    /// How long a guest waits whose agent was lost before all of its memory is here, until another
    /// agent brings the rest: after a lazy restore or a postcopy, if a
    /// [`Supervisor`](crate::Supervisor) gets the agents. Then the memory is lost
    /// ([`Hooks::memory_lost`](crate::Hooks::memory_lost)). Zero for no attempt after the first.
    pub continue_within: Duration,
    /// Interval between two signs of life of the agent while nothing waits for it. An idle agent
    /// that hangs is found within this time and `request_timeout`, and
    /// [`Hooks::agent_lost`](crate::Hooks::agent_lost) is called.
    pub heartbeat: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            log_covers: 4 << 40,
            mapped_by: None,
            request_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(3),
            continue_within: Duration::from_secs(30),
            heartbeat: Duration::from_secs(5),
        }
    }
}

impl Config {
    /// Refuses a name that the agent would refuse, and times that are too short.
    ///
    /// # Errors
    /// Which one, and what is allowed.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Config { ref name, request_timeout, stall_timeout, heartbeat, .. } = *self;
        if name.len() > MAX_VM_NAME || name.chars().any(char::is_control) {
            return Err(Error::VmName { name: name.clone() });
        }
        let times = [
            ("request_timeout", request_timeout),
            ("stall_timeout", stall_timeout),
            ("heartbeat", heartbeat),
        ];
        match times.into_iter().find(|(_, time)| *time < SHORTEST) {
            Some((field, value)) => {
                Err(Error::DurationTooShort { field, value, shortest: SHORTEST })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_not_for_people_is_refused() {
        let named = |name: &str| Config { name: name.into(), ..Config::default() }.check();
        named("vm 1").unwrap();
        for wrong in ["vm\n1", &"n".repeat(129)] {
            let error = named(wrong).unwrap_err().to_string();
            assert!(error.contains("1 to 128 bytes without control characters"), "{error}");
        }
    }

    #[test]
    fn times_that_are_too_short_are_refused_by_name() {
        Config::default().check().unwrap();
        Config { request_timeout: Duration::MAX, ..Config::default() }.check().unwrap();
        let short = Duration::from_micros(1);
        let configs = [
            ("request_timeout", Config { request_timeout: short, ..Config::default() }),
            ("stall_timeout", Config { stall_timeout: short, ..Config::default() }),
            ("heartbeat", Config { heartbeat: Duration::ZERO, ..Config::default() }),
        ];
        for (field, config) in configs {
            let error = config.check().unwrap_err().to_string();
            assert!(
                error.starts_with(field) && error.ends_with("allowed are 1ms and more"),
                "{error}"
            );
        }
    }
}
