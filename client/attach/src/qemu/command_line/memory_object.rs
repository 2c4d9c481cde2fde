// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rewrites one `-object` that is guest memory.
//!
//! Whatever the type of the memory was, it becomes a `memory-backend-file` with `share=on`. Only
//! that type works: QEMU's capability `x-ignore-shared` leaves memory out of the state of a
//! migration if it comes from a named file, and so not that of a `memory-backend-memfd`.
//! Properties that all types have are kept.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::{Map, Value};

use super::key_values::KeyValues;
use super::{Error, MemoryFile, size};

/// What an `-object` is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Object {
    /// No memory, or a request for help. It stays as it is.
    Other,
    /// Memory in a file of the user that is shared already. It stays as it is.
    SharedFile {
        /// Name of the object.
        id: String,
    },
    /// Memory that moves to a file of ours.
    Memory {
        /// The file.
        file: MemoryFile,
        /// The new value of the option up to the number of the file's descriptor.
        before: String,
        /// The rest of the value.
        after: &'static str,
    },
}

/// What the sizes of huge pages are.
pub(super) struct HugePages<'a> {
    /// Size of a page if only `hugetlb=on` is asked for.
    pub(super) default: u64,
    /// Size of the pages of a path, if it is on hugetlbfs.
    pub(super) of_path: &'a dyn Fn(&Path) -> Option<u64>,
}

const FILE: &str = "memory-backend-file";
const MEMFD: &str = "memory-backend-memfd";

/// Properties that are ours to say, or that only the type of before has. `discard-data` would empty
/// the file when QEMU ends, also after a migration.
const DROPPED: &[&str] = &[
    "qom-type",
    "share",
    "mem-path",
    "pmem",
    "discard-data",
    "offset",
    "rom",
    "readonly",
    "hugetlb",
    "hugetlbsize",
    "seal",
];

/// Looks at the value of an `-object`, and rewrites it if it is memory.
pub(super) fn rewrite(value: &OsStr, huge_pages: &HugePages<'_>) -> Result<Object, Error> {
    let lossy = value.to_string_lossy();
    if !lossy.contains("memory-backend-") {
        return Ok(Object::Other);
    }
    let mut properties = Properties::parse(&lossy)?;
    let Some(qom_type) = properties.text("qom-type").filter(|_| !properties.asks_for_help()) else {
        return Ok(Object::Other);
    };
    match qom_type.as_str() {
        "memory-backend-ram" | MEMFD | FILE | "memory-backend-shm" => {}
        "memory-backend-epc" => {
            return Err(Error::Refused {
                option: format!("-object {qom_type}"),
                advice: "memory of SGX enclaves cannot be read from outside; leave it out",
            });
        }
        _ => return Ok(Object::Other),
    }
    if value.to_str().is_none() {
        return Err(Error::NotUtf8 { option: "-object", value: lossy.into_owned() });
    }
    let missing =
        |property| Error::PropertyMissing { object: format!("-object {qom_type}"), property };
    let id = properties.text("id").ok_or_else(|| missing("id"))?;
    if qom_type == FILE && properties.is_on(&id, "share")? {
        return Ok(Object::SharedFile { id });
    }
    refuse_files_that_are_not_plain_memory(&properties, &id)?;
    let size = properties.size(&id, "size")?.ok_or_else(|| missing("size"))?;
    let huge_page_size = match qom_type.as_str() {
        MEMFD if properties.is_on(&id, "hugetlb")? => {
            Some(properties.size(&id, "hugetlbsize")?.unwrap_or(huge_pages.default))
        }
        FILE => {
            let path = properties.text("mem-path").ok_or_else(|| missing("mem-path"))?;
            (huge_pages.of_path)(Path::new(&path))
        }
        _ => None,
    };
    let file = MemoryFile::new(id, size, huge_page_size)?;
    properties.remove(DROPPED);
    let (before, after) = properties.print();
    Ok(Object::Memory { file, before, after })
}

/// A file that outlives the guest, or that the guest cannot write, is not moved to a file of ours.
fn refuse_files_that_are_not_plain_memory(properties: &Properties, id: &str) -> Result<(), Error> {
    for (property, advice) in [
        ("pmem", "persistent memory is not migrated; leave pmem out"),
        (
            "readonly",
            "memory must be writable; leave readonly out, or add share=on to keep the file",
        ),
        ("rom", "memory must be writable; leave rom out, or add share=on to keep the file"),
    ] {
        // `rom` also has the value auto, which follows readonly.
        let is_auto = property == "rom" && properties.text("rom").as_deref() == Some("auto");
        if !is_auto && properties.is_on(id, property)? {
            return Err(Error::Refused {
                option: format!("-object {FILE},id={id},{property}=on"),
                advice,
            });
        }
    }
    Ok(())
}

/// The properties of an object in either syntax.
enum Properties {
    Pairs(KeyValues),
    Json(Map<String, Value>),
}

impl Properties {
    fn parse(text: &str) -> Result<Self, Error> {
        if !text.starts_with('{') {
            return Ok(Properties::Pairs(KeyValues::parse(text, Some("qom-type"))));
        }
        serde_json::from_str(text)
            .map(Properties::Json)
            .map_err(|error| not_json(text, error.to_string()))
    }

    fn asks_for_help(&self) -> bool {
        match self {
            Properties::Pairs(pairs) => pairs.asks_for_help(),
            Properties::Json(_) => false,
        }
    }

    fn text(&self, property: &str) -> Option<String> {
        match self {
            Properties::Pairs(pairs) => pairs.get(property).map(str::to_owned),
            Properties::Json(map) => map.get(property)?.as_str().map(str::to_owned),
        }
    }

    fn is_on(&self, id: &str, property: &str) -> Result<bool, Error> {
        let value = match self {
            Properties::Pairs(pairs) => match pairs.get(property) {
                None | Some("off" | "no" | "false" | "n") => return Ok(false),
                Some("on" | "yes" | "true" | "y") => return Ok(true),
                Some(other) => other.to_owned(),
            },
            Properties::Json(map) => match map.get(property) {
                None => return Ok(false),
                Some(Value::Bool(on)) => return Ok(*on),
                // `rom` is an enumeration in JSON, too.
                Some(Value::String(rom)) if property == "rom" => return Ok(rom == "on"),
                Some(other) => other.to_string(),
            },
        };
        Err(Error::NotASwitch { name: id.to_owned(), property: property.to_owned(), value })
    }

    fn size(&self, id: &str, property: &str) -> Result<Option<u64>, Error> {
        match self {
            Properties::Pairs(pairs) => {
                let Some(text) = pairs.get(property) else { return Ok(None) };
                let size = size::parse(text).ok_or_else(|| Error::NotASize {
                    what: format!("{property} of memory {id:?}"),
                    value: text.to_owned(),
                })?;
                Ok(Some(size))
            }
            Properties::Json(map) => {
                let Some(value) = map.get(property) else { return Ok(None) };
                let size = value.as_u64().ok_or_else(|| {
                    let reason = format!("{property} of {id:?} is not a number of bytes");
                    not_json(&Value::from(map.clone()).to_string(), reason)
                })?;
                Ok(Some(size))
            }
        }
    }

    fn remove(&mut self, properties: &[&str]) {
        match self {
            Properties::Pairs(pairs) => pairs.remove(properties),
            Properties::Json(map) => map.retain(|name, _| !properties.contains(&name.as_str())),
        }
    }

    /// The new value before and after the number of the descriptor.
    fn print(&self) -> (String, &'static str) {
        match self {
            Properties::Pairs(pairs) => {
                (format!("{FILE},{pairs},share=on,mem-path={DESCRIPTORS}"), "")
            }
            Properties::Json(map) => {
                let mut map = map.clone();
                map.insert("qom-type".into(), FILE.into());
                map.insert("share".into(), true.into());
                let text = Value::Object(map).to_string();
                // Cannot fail: an object ends with its brace.
                let open = text.strip_suffix('}').unwrap_or(&text);
                (format!("{open},\"mem-path\":\"{DESCRIPTORS}"), "\"}")
            }
        }
    }
}

fn not_json(value: &str, reason: String) -> Error {
    Error::NotJson { option: "-object", value: value.to_owned(), reason }
}

/// Where Linux shows the files of a process to itself.
const DESCRIPTORS: &str = "/proc/self/fd/";

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use super::super::{Error, MemoryFile};
    use super::{HugePages, Object};

    const MIB: u64 = 1 << 20;

    fn rewrite(value: &str) -> Result<Object, Error> {
        let of_path = |path: &Path| path.starts_with("/dev/hugepages").then_some(1 << 30);
        super::rewrite(value.as_ref(), &HugePages { default: 2 * MIB, of_path: &of_path })
    }

    fn memory(value: &str) -> (String, MemoryFile) {
        match rewrite(value) {
            Ok(Object::Memory { file, before, after }) => (format!("{before}7{after}"), file),
            other => panic!("{value}: {other:?}"),
        }
    }

    #[test]
    fn ram_becomes_a_shared_file_and_keeps_its_properties() {
        let (value, file) = memory(
            "memory-backend-ram,id=m0,size=1.5G,share=off,host-nodes=0-1,host-nodes=3,policy=bind,\
             prealloc=on,prealloc-threads=2,reserve=on,x-use-canonical-path-for-ramblock-id=off",
        );
        assert_eq!(
            value,
            "memory-backend-file,id=m0,size=1.5G,host-nodes=0-1,host-nodes=3,policy=bind,\
             prealloc=on,prealloc-threads=2,reserve=on,x-use-canonical-path-for-ramblock-id=off,\
             share=on,mem-path=/proc/self/fd/7"
        );
        assert_eq!(file, MemoryFile { name: "m0".into(), size: 1536 * MIB, huge_page_size: None });
    }

    #[test]
    fn huge_pages_of_a_memfd_become_those_of_the_file() {
        let (value, file) =
            memory("qom-type=memory-backend-memfd,id=m,size=4M,hugetlb=on,hugetlbsize=2M,seal=off");
        assert_eq!(value, "memory-backend-file,id=m,size=4M,share=on,mem-path=/proc/self/fd/7");
        assert_eq!(file.huge_page_size, Some(2 * MIB));

        let (_, file) = memory("memory-backend-memfd,id=m,size=4M,hugetlb=on");
        assert_eq!(file.huge_page_size, Some(2 * MIB));
        let (_, file) = memory("memory-backend-memfd,id=m,size=4M,hugetlb=off,hugetlbsize=2M");
        assert_eq!(file.huge_page_size, None);
    }

    #[test]
    fn private_file_is_moved_with_the_size_of_its_pages() {
        let (value, file) = memory(
            "memory-backend-file,id=m,size=2G,mem-path=/dev/hugepages,align=1G,discard-data=on,\
             pmem=off,readonly=off,rom=auto,offset=0",
        );
        assert_eq!(
            value,
            "memory-backend-file,id=m,size=2G,align=1G,share=on,mem-path=/proc/self/fd/7"
        );
        assert_eq!(file.huge_page_size, Some(1 << 30));
    }

    #[test]
    fn shared_file_of_the_user_stays() {
        for value in [
            "memory-backend-file,id=m,size=2G,mem-path=/x,share=on,readonly=on",
            "memory-backend-file,id=m,size=2G,mem-path=/x,share",
            r#"{"qom-type":"memory-backend-file","id":"m","share":true}"#,
        ] {
            assert_eq!(rewrite(value), Ok(Object::SharedFile { id: "m".into() }), "{value}");
        }
    }

    #[test]
    fn json_is_rewritten_as_json() {
        let (value, file) = memory(
            r#"{"qom-type": "memory-backend-memfd", "id": "m", "size": 4194304, "seal": true,
                "share": false, "host-nodes": [0], "hugetlb": true, "policy": "bind"}"#,
        );
        let value: serde_json::Value = serde_json::from_str(&value).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "qom-type": "memory-backend-file", "id": "m", "size": 4194304, "share": true,
                "host-nodes": [0], "policy": "bind", "mem-path": "/proc/self/fd/7",
            })
        );
        assert_eq!(file.huge_page_size, Some(2 * MIB));
    }

    #[test]
    fn other_objects_and_help_stay() {
        for value in [
            "help",
            "iothread,id=memory-backend-ram",
            "memory-backend-ram,help",
            "rng-random,filename=/dev/urandom,id=r",
            "memory-backend-new,id=m",
            r#"{"qom-type":"iothread","id":"i"}"#,
            "{'qom-type':'iothread','id':'i'}",
        ] {
            assert_eq!(rewrite(value), Ok(Object::Other), "{value}");
        }
    }

    #[test]
    fn what_cannot_be_moved_is_refused_by_name() {
        for (value, named) in [
            ("memory-backend-epc,id=e,size=4M", "memory-backend-epc"),
            ("memory-backend-file,id=m,size=4M,mem-path=/x,pmem=on", "id=m,pmem=on"),
            ("memory-backend-file,id=m,size=4M,mem-path=/x,readonly=on", "readonly=on"),
            ("memory-backend-file,id=m,size=4M,mem-path=/x,rom=on", "rom=on"),
            ("memory-backend-file,id=m,size=4M", "mem-path="),
            ("memory-backend-ram,size=4M", "id="),
            ("memory-backend-ram,id=m", "size="),
            ("memory-backend-ram,id=m,size=4097", "4097"),
            ("memory-backend-ram,id=m,size=0", "size 0"),
            ("memory-backend-ram,id=m,size=4X", "4X"),
            ("memory-backend-memfd,id=m,size=3M,hugetlb=on", "2097152"),
            ("memory-backend-memfd,id=m,size=4M,hugetlb=on,hugetlbsize=3M", "3145728"),
            ("memory-backend-memfd,id=m,size=4M,hugetlb=maybe", "maybe"),
            (r#"{"qom-type":"memory-backend-ram","id":"m","size":"4M"}"#, "4M"),
            ("{'qom-type':'memory-backend-ram','id':'m','size':4194304}", "double quotes"),
        ] {
            let text = rewrite(value).expect_err(value).to_string();
            assert!(text.contains(named), "{value}: {text}");
        }
    }

    #[test]
    fn memory_that_is_not_utf8_is_refused_and_other_objects_pass() {
        let of_path = |_: &Path| None;
        let huge_pages = HugePages { default: 2 * MIB, of_path: &of_path };
        let memory = OsStr::from_bytes(b"memory-backend-file,id=m,size=4M,mem-path=/\xff");
        assert!(matches!(super::rewrite(memory, &huge_pages), Err(Error::NotUtf8 { .. })));
        let other = OsStr::from_bytes(b"rng-random,id=r,filename=/\xff/memory-backend-ram");
        assert_eq!(super::rewrite(other, &huge_pages), Ok(Object::Other));
    }
}
