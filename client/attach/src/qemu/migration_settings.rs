// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's migration capabilities and parameters, which belong to its user.
//!
//! A save or a load of the devices needs others for a moment. They are changed in this order, so
//! that none stays changed, whatever dies meanwhile:
//!
//! 1. QEMU is asked what is set, and nothing is changed ([`Settings::for_save`]).
//! 2. The guard is told what would have to be set back.
//! 3. What differs is set ([`Settings::apply`]).
//! 4. All is set back ([`Settings::restore`]), by the attachment or by its guard.
//!
//! QEMU reads its monitor byte by byte, about 5 us each, and the guest is paused for some of it. So
//! only what differs is set, and it is set back when the guest runs.

use super::monitor::{Monitor, MonitorError};
use serde_json::{Map, Value, json};

/// Capabilities for a save. All others are off.
const SAVE: [&str; 3] = ["events", "pause-before-switchover", "x-ignore-shared"];
/// Capabilities for a load. All others are off.
const LOAD: [&str; 2] = ["events", "x-ignore-shared"];

/// Parameters for a save: bytes per second, as good as unlimited, since the stream stays on this
/// host; and milliseconds. With a low limit QEMU might not pause a guest that draws on a screen.
const SAVE_LIMITS: [(&str, u64); 2] = [("max-bandwidth", 1 << 40), ("downtime-limit", 300)];
/// The parameter that would make QEMU speak TLS on the stream, and wait for an answer.
const TLS: &str = "tls-creds";

fn save_parameters() -> Map<String, Value> {
    let limits = SAVE_LIMITS.iter().map(|(name, value)| ((*name).to_owned(), json!(value)));
    limits.chain(load_parameters()).collect()
}

fn load_parameters() -> Map<String, Value> {
    Map::from_iter([(TLS.to_owned(), json!(""))])
}

/// What a save or a load changes in QEMU.
#[derive(Debug)]
#[must_use]
pub struct Settings {
    before: Values,
    during: Values,
}

/// Values of the capabilities and parameters that are changed.
#[derive(Debug, Default)]
struct Values {
    capabilities: Vec<Value>,
    parameters: Map<String, Value>,
}

impl Values {
    fn set(&self, monitor: &mut Monitor) -> Result<(), MonitorError> {
        if !self.capabilities.is_empty() {
            let arguments = json!({ "capabilities": self.capabilities });
            monitor.command("migrate-set-capabilities", arguments)?;
        }
        if !self.parameters.is_empty() {
            let arguments = Value::Object(self.parameters.clone());
            monitor.command("migrate-set-parameters", arguments)?;
        }
        Ok(())
    }
}

impl Settings {
    /// What a load needs. Changes nothing yet.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn for_load(monitor: &mut Monitor) -> Result<Self, MonitorError> {
        Self::plan(monitor, &LOAD, load_parameters())
    }

    /// What a save needs. Changes nothing yet.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn for_save(monitor: &mut Monitor) -> Result<Self, MonitorError> {
        Self::plan(monitor, &SAVE, save_parameters())
    }

    fn plan(
        monitor: &mut Monitor, on: &[&str], mut wanted: Map<String, Value>,
    ) -> Result<Self, MonitorError> {
        let capabilities = monitor.command("query-migrate-capabilities", Value::Null)?;
        let (mut before, mut during) = (Values::default(), Values::default());
        for one in capabilities.as_array().into_iter().flatten() {
            let name = one.get("capability").and_then(Value::as_str).unwrap_or_default();
            let state = on.contains(&name);
            if one.get("state").and_then(Value::as_bool) != Some(state) {
                before.capabilities.push(one.clone());
                during.capabilities.push(json!({ "capability": name, "state": state }));
            }
        }
        let parameters = monitor.command("query-migrate-parameters", Value::Null)?;
        wanted.retain(|name, value| parameters.get(name).is_some_and(|before| before != value));
        let old =
            wanted.keys().filter_map(|name| Some((name.clone(), parameters.get(name)?.clone())));
        before.parameters = old.collect();
        during.parameters = wanted;
        Ok(Self { before, during })
    }

    /// Changes them.
    ///
    /// # Errors
    /// If QEMU refuses. A part may have changed then, so [`Settings::restore`] follows.
    pub fn apply(&self, monitor: &mut Monitor) -> Result<(), MonitorError> {
        self.during.set(monitor)
    }

    /// What [`Settings::restore`] would send, for a process that does it in place of this one.
    pub fn to_json(&self) -> Value {
        let Values { capabilities, parameters } = &self.before;
        json!({ "capabilities": capabilities, "parameters": parameters })
    }

    /// The settings that [`Settings::to_json`] has described.
    pub fn from_json(mut described: Value) -> Option<Self> {
        let mut take = |name: &str| described.get_mut(name).map(Value::take);
        match (take("capabilities")?, take("parameters")?) {
            (Value::Array(capabilities), Value::Object(parameters)) => {
                let before = Values { capabilities, parameters };
                Some(Self { before, during: Values::default() })
            }
            _ => None,
        }
    }

    /// Sets all back.
    pub fn restore(self, monitor: &mut Monitor) {
        if let Err(error) = self.before.set(monitor) {
            log::warn!("QEMU's migration settings stay changed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::monitor::test_support::at_monitor;

    /// The commands that change something in a QEMU with these settings, and how `test` ended.
    fn changes<T>(refused: &str, test: impl FnOnce(&mut Monitor) -> T) -> (T, Vec<Value>) {
        let answer = |command: &Value| {
            let name = command["execute"].as_str().unwrap();
            let said = match name {
                "query-migrate-capabilities" => json!([
                    { "capability": "events", "state": false },
                    { "capability": "x-ignore-shared", "state": true },
                    { "capability": "xbzrle", "state": true },
                ]),
                "query-migrate-parameters" => {
                    json!({ "max-bandwidth": 7, "downtime-limit": 300, "tls-creds": "t0" })
                }
                _ => json!({}),
            };
            let answer = match name == refused {
                true => json!({ "error": { "desc": "no" }, "id": command["id"] }),
                false => json!({ "return": said, "id": command["id"] }),
            };
            Some(format!("{answer}\n"))
        };
        let (outcome, commands) =
            at_monitor(answer, |path| test(&mut Monitor::connect(path).unwrap()));
        let changing = |command: &Value| {
            command["execute"].as_str().is_some_and(|name| name.starts_with("migrate-set-"))
        };
        let changing = commands.into_iter().filter(changing);
        (outcome, changing.map(|mut command| command["arguments"].take()).collect())
    }

    #[test]
    fn plan_changes_nothing_and_says_what_to_set_back() {
        let (settings, changed) = changes("", |monitor| Settings::for_load(monitor).unwrap());
        assert!(changed.is_empty(), "{changed:?}");
        let before = json!({
            "capabilities": [
                { "capability": "events", "state": false },
                { "capability": "xbzrle", "state": true },
            ],
            "parameters": { "tls-creds": "t0" },
        });
        assert_eq!(settings.to_json(), before);
    }

    #[test]
    fn what_differs_is_set_and_set_back() {
        let ((), changed) = changes("", |monitor| {
            let settings = Settings::for_save(monitor).unwrap();
            settings.apply(monitor).unwrap();
            Settings::from_json(settings.to_json()).unwrap().restore(monitor);
        });
        let [capabilities, parameters, capabilities_back, parameters_back] = &changed[..] else {
            panic!("{changed:?}")
        };
        let state = |all: &Value, at: usize| all["capabilities"][at]["state"].clone();
        assert_eq!((state(capabilities, 0), state(capabilities, 1)), (json!(true), json!(false)));
        assert_eq!(*parameters, json!({ "max-bandwidth": 1_u64 << 40, "tls-creds": "" }));
        let back = (state(capabilities_back, 0), state(capabilities_back, 1));
        assert_eq!(back, (json!(false), json!(true)));
        assert_eq!(*parameters_back, json!({ "max-bandwidth": 7, "tls-creds": "t0" }));
    }

    #[test]
    fn refused_parameter_is_an_error_of_apply() {
        let (applied, changed) = changes("migrate-set-parameters", |monitor| {
            Settings::for_save(monitor).unwrap().apply(monitor)
        });
        assert!(applied.unwrap_err().to_string().contains("refuses migrate-set-parameters"));
        assert_eq!(changed.len(), 2);
    }
}
