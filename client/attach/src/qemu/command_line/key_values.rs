// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's option values: `key=value` lists.
//!
//! Pairs are separated by commas. A comma inside a value is written twice. The first value may
//! stand without its key if the option has an implied key, as `-m 512` is `-m size=512`. Any other
//! key without a value is a switch: `key` means `key=on`, and `nokey` means `key=off`.

use std::fmt;

/// The pairs of one option, in order; a key may occur more than once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyValues(Vec<(String, Option<String>)>);

impl KeyValues {
    /// Parses the value of an option, `implied` being the key of a first value without key.
    pub(super) fn parse(text: &str, implied: Option<&str>) -> Self {
        let mut pairs = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let key_length = rest.find(['=', ',']).unwrap_or(rest.len());
            if rest[key_length..].starts_with('=') {
                let (value, after) = take_value(&rest[key_length + 1..]);
                pairs.push((rest[..key_length].to_owned(), Some(value)));
                rest = after;
            } else if let (Some(implied), true) = (implied, pairs.is_empty()) {
                let (value, after) = take_value(rest);
                pairs.push((implied.to_owned(), Some(value)));
                rest = after;
            } else {
                pairs.push((rest[..key_length].to_owned(), None));
                rest = rest.get(key_length + 1..).unwrap_or_default();
            }
        }
        KeyValues(pairs)
    }

    /// The value of a key. The last one counts, as in QEMU.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find_map(|pair| match pair {
            (name, Some(value)) => (name == key).then_some(value.as_str()),
            (name, None) if name == key => Some("on"),
            (name, None) => (name.strip_prefix("no") == Some(key)).then_some("off"),
        })
    }

    /// Whether QEMU prints help about the properties instead of using them.
    pub(super) fn asks_for_help(&self) -> bool {
        self.0.iter().any(|(key, value)| value.is_none() && matches!(key.as_str(), "help" | "?"))
    }

    /// Removes every pair whose key, or whose switched-off key, is one of `keys`.
    pub(super) fn remove(&mut self, keys: &[&str]) {
        self.0.retain(|(name, value)| {
            let switch = name.strip_prefix("no").filter(|_| value.is_none());
            !keys.iter().any(|key| name == key || switch == Some(key))
        });
    }
}

impl fmt::Display for KeyValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (key, value)) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            f.write_str(key)?;
            if let Some(value) = value {
                write!(f, "={}", value.replace(',', ",,"))?;
            }
        }
        Ok(())
    }
}

/// Splits a value from what follows it, and removes its escapes.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::KeyValues;

    #[test]
    fn first_value_gets_the_implied_key() {
        let memory = KeyValues::parse("512,slots=2,maxmem=4G", Some("size"));
        assert_eq!(memory.get("size"), Some("512"));
        assert_eq!(memory.get("maxmem"), Some("4G"));
        assert_eq!(memory.to_string(), "size=512,slots=2,maxmem=4G");
    }

    #[test]
    fn doubled_commas_belong_to_the_value() {
        let object = KeyValues::parse("mem-path=/a,,b,,,id=x", None);
        assert_eq!(object.get("mem-path"), Some("/a,b,"));
        assert_eq!(object.get("id"), Some("x"));
    }

    #[test]
    fn keys_without_value_are_switches() {
        let object = KeyValues::parse("ram,share,noprealloc", Some("type"));
        assert_eq!(object.get("share"), Some("on"));
        assert_eq!(object.get("prealloc"), Some("off"));
    }

    #[test]
    fn last_value_of_a_key_counts() {
        let object = KeyValues::parse("size=1,size=2,nosize,size=3", None);
        assert_eq!(object.get("size"), Some("3"));
    }

    #[test]
    fn removing_a_key_removes_its_switches() {
        let mut object = KeyValues::parse("share=on,noshare,share,id=a,node=1", None);
        object.remove(&["share"]);
        assert_eq!(object.to_string(), "id=a,node=1");
    }

    #[test]
    fn help_is_a_key_without_value() {
        assert!(KeyValues::parse("memory-backend-ram,help", Some("qom-type")).asks_for_help());
        assert!(!KeyValues::parse("id=help", Some("qom-type")).asks_for_help());
    }

    proptest! {
        #[test]
        fn printed_pairs_are_read_back(
            pairs in prop::collection::vec(("[a-z.-]{1,6}", prop::option::of(".{0,6}")), 0..6),
        ) {
            let printed = KeyValues(pairs.clone()).to_string();
            prop_assert_eq!(KeyValues::parse(&printed, None), KeyValues(pairs));
        }

        #[test]
        fn any_text_is_read(text in "[a,=é]{0,16}") {
            let parsed = KeyValues::parse(&text, Some("size"));
            let _ = parsed.get("a");
            let _ = parsed.to_string();
        }
    }
}
