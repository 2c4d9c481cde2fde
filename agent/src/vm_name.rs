// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The name of the VM that this agent serves, for people: in the log, the status and the metrics.
//!
//! The operator may give it when the agent starts. Otherwise the VMM may give it when it connects,
//! and it holds until that VMM is gone.

use crate::lock::lock;
use std::sync::{Arc, Mutex};

/// The name of the VM. Clones are the same name.
#[derive(Debug, Clone, Default)]
pub struct VmName(Arc<Mutex<Names>>);

#[derive(Debug, Default)]
struct Names {
    by_operator: Option<String>,
    by_vmm: String,
}

impl VmName {
    /// The name that the operator has given, which no VMM replaces.
    pub fn of_operator(name: String) -> Self {
        Self(Arc::new(Mutex::new(Names { by_operator: Some(name), by_vmm: String::new() })))
    }

    /// Notes the name that the VMM gives; empty if it gives none, or is gone.
    pub fn set_by_vmm(&self, name: String) {
        lock(&self.0).by_vmm = name;
    }

    /// The name that the operator has given.
    pub fn by_operator(&self) -> Option<String> {
        lock(&self.0).by_operator.clone()
    }

    /// The name; empty if there is none.
    pub fn get(&self) -> String {
        let names = lock(&self.0);
        names.by_operator.clone().unwrap_or_else(|| names.by_vmm.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_has_the_last_word() {
        let name = VmName::default();
        assert_eq!(name.get(), "");
        name.set_by_vmm("guest".into());
        assert_eq!(name.clone().get(), "guest");
        assert_eq!(name.by_operator(), None);
        let name = VmName::of_operator("vm1".into());
        name.set_by_vmm("guest".into());
        assert_eq!(name.get(), "vm1");
        assert_eq!(name.by_operator().as_deref(), Some("vm1"));
    }
}
