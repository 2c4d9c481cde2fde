// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! docs/control.md against the code: it has every code, every field at its place, every error,
//! phase and counter, and nothing else.

use super::bodies::{incoming, outgoing, restore, snapshot};
use super::refusals::proper;
use pageferry_protocol::control::clones::{GiveBack, GiveBackTo, OpenBaseReply};
use pageferry_protocol::control::codec::{DecodeError, Decoder, Encoder};
use pageferry_protocol::control::devices::{BalloonStatus, MemStatus};
use pageferry_protocol::control::hook::{self, GuestOrigin, Hook};
use pageferry_protocol::control::hook_reply::decode_state_reply;
use pageferry_protocol::control::job::{JobKind, JobStatus, Phase};
use pageferry_protocol::control::reply::{
    AddBlockReply, ErrorCode, HelloReply, JobStarted, RangesReply,
};
use pageferry_protocol::control::request::{self, Request};
use pageferry_protocol::control::state_pieces::PieceSize;
use pageferry_protocol::control::vhost_user::FrontendReq;
use pageferry_protocol::control::{AgentInfo, Trackers, frame};
use pageferry_protocol::memory::PageRange;
use std::collections::{BTreeMap, BTreeSet};

/// The text of the document.
pub const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/control.md"));

/// The text below this heading, up to the next of its level or above.
pub fn section(heading: &str) -> &'static str {
    let start = DOCUMENT.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("{heading}"));
    let text = &DOCUMENT[start + heading.len() + 2..];
    let level = heading.split(' ').next().unwrap();
    let end =
        (2..=level.len()).filter_map(|level| text.find(&format!("\n{} ", "#".repeat(level)))).min();
    &text[..end.unwrap_or(text.len())]
}

type Row = Vec<&'static str>;

/// All tables of a text: their rows, the first of which is the header.
fn tables(text: &'static str) -> Vec<Vec<Row>> {
    let mut tables: Vec<Vec<Row>> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        let cells = line.strip_prefix('|').and_then(|line| line.strip_suffix('|'));
        if let Some(cells) = cells.filter(|cells| !cells.starts_with(" ---")) {
            if !inside {
                tables.push(Vec::new());
            }
            tables.last_mut().unwrap().push(cells.split('|').map(str::trim).collect());
        }
        inside = line.starts_with('|');
    }
    tables
}

/// The table with this header in a text.
fn table(text: &'static str, header: &[&str]) -> Vec<Row> {
    let found = tables(text).into_iter().find(|table| table[0].starts_with(header));
    found.unwrap_or_else(|| panic!("no table {header:?}")).split_off(1)
}

/// The headings of the third level under one of the second, which are `NAME, 0xCODE`.
fn codes(heading: &str) -> BTreeMap<u32, &'static str> {
    let headings = section(heading).lines().filter_map(|line| line.strip_prefix("### "));
    let coded = headings.map(|heading| heading.split_once(", 0x").unwrap());
    coded.map(|(name, code)| (u32::from_str_radix(code, 16).unwrap(), name)).collect()
}

#[test]
fn it_has_every_request_and_every_hook() {
    use request::code::*;
    let known = (0..0x1_0000).filter(|code| Request::decode(*code, &[]).is_some());
    let documented = codes("## Native requests");
    assert_eq!(documented.keys().copied().collect::<Vec<_>>(), known.collect::<Vec<_>>());
    let named = [
        ("HELLO", HELLO),
        ("ADD_BLOCK", ADD_BLOCK),
        ("REMOVE_BLOCK", REMOVE_BLOCK),
        ("DISCARD", DISCARD),
        ("POPULATE", POPULATE),
        ("SET_TRACKERS", SET_TRACKERS),
        ("FREE", FREE),
        ("START_OUTGOING", START_OUTGOING),
        ("START_INCOMING", START_INCOMING),
        ("CANCEL", CANCEL),
        ("SET_PARAMETERS", SET_PARAMETERS),
        ("QUERY_STATUS", QUERY_STATUS),
        ("SUBSCRIBE", SUBSCRIBE),
        ("RESUME", RESUME),
        ("START_POSTCOPY", START_POSTCOPY),
        ("RECOVER", RECOVER),
        ("START_SNAPSHOT", START_SNAPSHOT),
        ("START_RESTORE", START_RESTORE),
        ("QUERY_AGENT", QUERY_AGENT),
        ("BALLOON", BALLOON),
        ("PLUGGED_MEMORY", PLUGGED_MEMORY),
        ("CONNECT_DEVICE", CONNECT_DEVICE),
        ("CONTINUE", CONTINUE),
        ("UPGRADE", UPGRADE),
        ("GRANT", GRANT),
        ("OPEN_BASE", OPEN_BASE),
    ];
    assert_eq!(documented, named.into_iter().map(|(name, code)| (code, name)).collect());
    assert!(section("### SUBSCRIBE, 0x1015").contains(&format!("EVENT, {EVENT:#x}")));

    // Every hook has a sequence number, which is read before the code is looked up.
    let hooks: BTreeMap<u32, String> = (0..0x1_0000)
        .filter(|code| Hook::decode(*code, &[0; 8]).is_some())
        .map(|code| (code, name_of_hook(code)))
        .collect();
    let documented = codes("## Hooks");
    let documented: BTreeMap<_, _> =
        documented.into_iter().map(|(code, name)| (code, name.to_owned())).collect();
    assert_eq!(documented, hooks);
    // The names of the jobs' hooks are names of hooks.
    for row in table(section("## Hooks"), &["job", "hooks"]) {
        for word in row[1].split(|letter: char| !letter.is_ascii_uppercase() && letter != '_') {
            let is_name = word.len() < 2 || hooks.values().any(|name| name == word);
            assert!(is_name, "{word} in {row:?}");
        }
    }
}

/// The name of a hook as a constant has it.
fn name_of_hook(code: u32) -> String {
    let hook = examples_of_hooks().into_iter().find(|hook| hook.code() == code);
    let hook = hook.unwrap_or_else(|| panic!("no example of hook {code:#x}"));
    hook.name().replace(' ', "_").to_uppercase()
}

/// What an agent without a VMM says of itself.
fn agent_info() -> AgentInfo {
    let (version, name) = ("0.1.0".to_owned(), "vm1".to_owned());
    AgentInfo { version, pid: 1, name, vmm_pid: 0, blocks: Vec::new() }
}

/// One of each hook.
fn examples_of_hooks() -> Vec<Hook> {
    let pieces = vec![PieceSize { name: "vcpu".into(), length: 5 }];
    vec![
        Hook::Pause,
        Hook::Resume { force: false, paused: false },
        Hook::StartTracking { sources: Trackers::HOOKS },
        Hook::StopTracking { sources: Trackers::HOOKS },
        Hook::SyncTracker,
        Hook::ClearTracker { block: 1, first: 64, bitmap: vec![1, 2] },
        Hook::Throttle { percent: 20 },
        Hook::SaveState,
        Hook::LoadState { pieces },
        Hook::Relinquish { session: [1; 16], release: true },
        Hook::MemoryArrived,
        Hook::ProbeFaults,
        Hook::RegisterFaults,
        Hook::KeepJournal { journal: vec![1, 2] },
        Hook::UnregisterFaults { complete: true },
        Hook::WatchWrites,
        Hook::UnwatchWrites,
        Hook::ExpectGuest { origin: GuestOrigin::Migration { address: "unix:/a".into() } },
        Hook::CheckGuest,
        Hook::AcceptGuest { origin: GuestOrigin::Image { path: "/image".into() } },
        Hook::Event { status: Box::default() },
    ]
}

#[test]
fn it_has_every_error_kind_phase_and_counter() {
    let errors = table(section("## Answers and errors"), &["code", "error"]);
    let errors: Vec<(u32, &str)> =
        errors.iter().map(|row| (row[0].parse().unwrap(), row[1])).collect();
    let known: Vec<(u32, String)> = (1..)
        .map(|code| (code, ErrorCode::from_wire(code)))
        .take_while(|(code, error)| *error as u32 == *code)
        .map(|(code, error)| (code, format!("{error:?}")))
        .collect();
    assert_eq!(errors, known.iter().map(|(code, name)| (*code, &**name)).collect::<Vec<_>>());

    let text = section("## The status of a job");
    let phases: Vec<(u32, &str)> = table(text, &["value", "phase"])
        .iter()
        .map(|row| (row[0].parse().unwrap(), row[1]))
        .collect();
    let known: Vec<(u32, &str)> =
        Phase::ALL.iter().map(|(phase, name)| (*phase as u32, *name)).collect();
    assert_eq!(phases, known);
    assert!(
        Phase::ALL.iter().all(|(phase, _)| phase.is_final() == matches!(*phase as u32, 0 | 15..))
    );

    let kinds: Vec<JobKind> = (0..)
        .map_while(|kind: u32| {
            let mut body = status_body();
            body[8..12].copy_from_slice(&kind.to_le_bytes());
            JobStatus::decode(&mut Decoder::new(&body)).ok().map(|status| status.kind)
        })
        .collect();
    let documented = table(text, &["value", "kind"]);
    let documented: Vec<&str> =
        documented.iter().map(|row| row[1].split(':').next().unwrap()).collect();
    assert_eq!(documented, kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>());

    // The value of each counter in this status is its offset.
    let status = JobStatus::decode(&mut Decoder::new(&status_body())).unwrap();
    let mut known = BTreeSet::new();
    for kind in &kinds {
        for (name, offset) in status.counters.of_kind(*kind) {
            known.insert((offset, name, kind.name()));
        }
    }
    let mut documented = BTreeSet::new();
    for row in table(text, &["offset", "counter", "kinds"]) {
        for kind in row[2].split(", ") {
            documented.insert((row[0].parse().unwrap(), row[1].trim_matches('`'), kind));
        }
    }
    let differ: Vec<_> = documented.symmetric_difference(&known).collect();
    assert!(differ.is_empty(), "{differ:?}");
}

/// Offset of the first counter in a status, and of what follows the last.
const COUNTERS: std::ops::Range<usize> = 26..330;

/// The body of a status in which each counter has its offset as its value.
fn status_body() -> Vec<u8> {
    let mut body = JobStatus::default().encode(Encoder::new()).finish();
    // The way of placing, and two empty texts.
    assert_eq!(body.len(), COUNTERS.end + 2 + 4 + 4);
    for offset in COUNTERS.step_by(8) {
        body[offset..offset + 8].copy_from_slice(&(offset as u64).to_le_bytes());
    }
    body
}

/// Checks a table of fields: each is where the code reads it, and has the name that the code gives
/// it. `decode` reads the start of `body` that it is given; the table begins at `base`.
#[track_caller]
fn check_fields(
    what: &str, rows: &[Row], body: &[u8], base: usize,
    decode: impl Fn(&[u8]) -> Result<(), DecodeError>,
) {
    decode(body).unwrap_or_else(|error| panic!("{what}: the example is wrong: {error}"));
    let mut next = None;
    for row in rows {
        let Ok(offset) = row[0].parse::<usize>() else {
            assert_eq!(row[0], "after it", "{what}");
            return;
        };
        assert!(next.is_none_or(|next| next == offset), "{what}: {row:?} is not at {next:?}");
        let size = match row[1] {
            "text" => 4,
            // The list of pieces, whose fields have names of their own, and a status.
            "" => return,
            size => size.parse::<usize>().unwrap_or(body.len() - base - offset),
        };
        // A body that ends inside of the field.
        let cut = &body[..base + offset + size - 1];
        match decode(cut) {
            Err(DecodeError::TooShort { field, .. }) if field == row[2] => {}
            // The counters have names of their own.
            Err(DecodeError::TooShort { .. }) if row[2] == "counters" => {}
            other => panic!("{what}: {row:?} is not what ends here: {other:?}"),
        }
        next = (row[1] != "text").then_some(offset + size);
    }
    assert!(next.is_none_or(|next| base + next == body.len()), "{what}: a field is missing");
}

#[test]
fn every_field_is_where_it_says() {
    const FIELDS: [&str; 3] = ["offset", "size", "field"];
    // Answers name their fields from offset 4 on, after the result.
    let answer = |text| tables(text).into_iter().find(|table| table[1][0] == "4");
    for (code, name) in codes("## Native requests") {
        let text = section(&format!("### {name}, {code:#x}"));
        // The first is the one with all fields.
        let (_, body, _) = proper().into_iter().find(|(proper, ..)| *proper == code).unwrap();
        if name != "CANCEL"
            && name != "QUERY_STATUS"
            && name != "QUERY_AGENT"
            && name != "START_POSTCOPY"
            && name != "GRANT"
        {
            check_fields(name, &table(text, &FIELDS), &body.0, 0, |body| {
                Request::decode(code, body).unwrap().map(drop)
            });
        }
        let reply = answer(text).map(|table| table[1..].to_vec());
        let numbers = [1; 64];
        match (name, reply) {
            ("HELLO", Some(rows)) => check_reply(&rows, &numbers[..22], HelloReply::decode),
            ("ADD_BLOCK", Some(rows)) => check_reply(&rows, &numbers[..12], AddBlockReply::decode),
            ("DISCARD" | "POPULATE" | "FREE", Some(rows)) => {
                check_reply(&rows, &numbers[..8], RangesReply::decode);
            }
            ("QUERY_AGENT", Some(rows)) => {
                let body = agent_info().encode(Encoder::new()).finish();
                check_reply(&rows, &body, AgentInfo::decode);
            }
            ("BALLOON", Some(rows)) => check_reply(
                &rows,
                &[&[1, 0, 0, 0, 0, 0, 0, 0], &numbers[..40]].concat(),
                BalloonStatus::decode,
            ),
            ("PLUGGED_MEMORY", Some(rows)) => check_reply(
                &rows,
                &[&[1, 0, 0, 0, 0, 0, 0, 0], &numbers[..48]].concat(),
                MemStatus::decode,
            ),
            ("START_OUTGOING", Some(rows)) => {
                let body = Encoder::new().u64(1).text("fd").finish();
                check_reply(&rows, &body, JobStarted::decode);
            }
            ("OPEN_BASE", Some(rows)) => check_reply(&rows, &[0; 4], OpenBaseReply::decode),
            (_, None) => {}
            other => panic!("{other:?}"),
        }
    }
    for hook in examples_of_hooks() {
        let (code, name) = (hook.code(), name_of_hook(hook.code()));
        let text = section(&format!("### {name}, {code:#x}"));
        check_fields(&name, &table(text, &FIELDS), &hook.encode(1), 0, |body| {
            Hook::decode(code, body).unwrap().map(drop)
        });
    }
    // The answer to SAVE_STATE: sequence, result, run state, pieces.
    let saved = Encoder::new().u64(1).u32(0).u32(0).u32(1).u64(5).text("vcpu").finish();
    let rows = tables(section("### SAVE_STATE, 0x2007"))[1][1..].to_vec();
    check_fields("SAVE_STATE", &rows, &saved, 0, |body| decode_state_reply(body).map(drop));

    let rows = table(section("## The status of a job"), &FIELDS);
    check_fields("status", &rows, &status_body(), 0, |body| {
        JobStatus::decode(&mut Decoder::new(body)).map(drop)
    });

    let rows = table(section("### The give-back socket"), &FIELDS);
    let sizes = rows.iter().map(|row| row[1].parse::<usize>().unwrap());
    assert_eq!(sizes.sum::<usize>(), GiveBack::SIZE);
    for row in &rows {
        let mut request = GiveBack { to: GiveBackTo::Zero, pages: PageRange::new(0, 1) }.encode();
        request[row[0].parse::<usize>().unwrap()] = 2;
        let refused = GiveBack::decode(&request, 8192).unwrap_err();
        assert!(matches!(refused, DecodeError::InvalidValue { field, .. } if field == row[2]));
    }

    let options = [
        ("an outgoing migration", request::code::START_OUTGOING, outgoing(), 4),
        ("an incoming migration", request::code::START_INCOMING, incoming(), 4),
        ("a snapshot", request::code::START_SNAPSHOT, snapshot(0), 4),
        ("a restore", request::code::START_RESTORE, restore(0), 4),
    ];
    for (of, code, body, base) in options {
        let rows = table(section(&format!("### Options of {of}")), &FIELDS);
        let body = [&[0; 4][..base], &body.0].concat();
        check_fields(of, &rows, &body, base, |body| Request::decode(code, body).unwrap().map(drop));
    }
}

/// Checks the table of an answer, whose offsets count from the result.
#[track_caller]
fn check_reply<T>(
    rows: &[Row], fields: &[u8], decode: fn(&mut Decoder<'_>) -> Result<T, DecodeError>,
) {
    let body = [&[0; 4], fields].concat();
    check_fields("answer", rows, &body, 0, |body| {
        decode(&mut Decoder::new(body.get(4..).unwrap_or_default())).map(drop)
    });
}

#[test]
fn limits_and_codes_of_vhost_user_are_those_of_the_code() {
    let limits: Vec<(&str, &str)> = table(section("## Limits"), &["what", "at most"])
        .iter()
        .map(|row| (row[0], row[1]))
        .collect();
    let number = |what: &str| {
        let (_, most) = limits.iter().find(|(limit, _)| limit.starts_with(what)).unwrap();
        most.split([',', ' ']).next().unwrap().parse::<usize>().unwrap()
    };
    use pageferry_protocol::control::{job, state_pieces, unix_path};
    use pageferry_protocol::memory::{MAX_MEM_SLOTS, geometry};
    assert_eq!(number("body of a frame") << 20, frame::MAX_BODY);
    assert_eq!(number("descriptors"), frame::MAX_FDS);
    assert_eq!(number("path of a socket"), unix_path::MAX_SOCKET_PATH);
    assert_eq!(number("blocks of a VMM"), MAX_MEM_SLOTS);
    assert_eq!(number("name of a block"), geometry::MAX_NAME);
    assert_eq!(geometry::MAX_BLOCK_LENGTH, 1 << 50);
    assert_eq!(number("ranges in a request"), request::MAX_RANGES);
    assert_eq!(number("address, path, sentence"), job::MAX_ADDRESS);
    assert_eq!(job::MAX_ADDRESS, job::MAX_SENTENCE);
    assert_eq!(number("pieces of state"), state_pieces::MAX_PIECES);
    assert_eq!(number("name of a piece"), state_pieces::MAX_PIECE_NAME);
    assert_eq!(number("state of the VMM") << 30, state_pieces::MAX_STATE as usize);
    assert_eq!(number("words in CLEAR_TRACKER") * 64, hook::MAX_CLEAR_PAGES as usize);

    for row in table(section("## Requests of vhost-user"), &["code", "request", "role"]) {
        let request = FrontendReq::try_from(row[0].parse::<u32>().unwrap()).unwrap();
        assert_eq!(format!("{request:?}"), row[1]);
        let role = pageferry_protocol::control::vhost_user::required_role(request);
        assert_eq!(format!("{role:?}").to_lowercase(), row[2].to_lowercase(), "{}", row[1]);
    }
}
