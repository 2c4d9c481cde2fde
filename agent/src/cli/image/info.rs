// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry image info`: shows the header, blocks and state of an image, and its chain.
//!
//! The names in an image are not trusted, because any program may have written them. Characters
//! that a terminal would take for a command are escaped.

use super::{ImageArgs, Outcome, absolute, counted, text_of};
use crate::cli::exit::Exit;
use crate::cli::show;
use crate::error::chain as sentence;
use crate::image::chain::{base_path, images};
use crate::image::map_picture::{Tally, View};
use crate::image::{Image, ImageError, ImageFault};
use pageferry_protocol::image::header::VERSION;
use pageferry_protocol::image::{Header, id_text};
use pageferry_protocol::memory::PAGE_SIZE;
use serde_json::{Map, Value, json};
use std::io::{self, Write};
use std::path::Path;

/// Shows an image and the images that it builds on. If one of those cannot be opened, the image is
/// still shown, and the error with it. Of a sealed image without its key, the header is shown.
///
/// # Errors
/// If the image, or one that it builds on, cannot be opened.
pub(super) fn run(args: &ImageArgs) -> Outcome {
    let (path, key) = (absolute(&args.path)?, args.read_key()?);
    let (images, opened) = images(&path, key.as_ref());
    let error = opened.as_ref().err();
    let (object, lines) = match images.first() {
        Some(newest) => (to_json(newest, &images, error), lines(newest, &images)),
        None if error.is_some_and(|error| matches!(error.fault, ImageFault::NeedsKey)) => {
            let (header, file) = Image::peek(&path)?;
            let mut object = Map::new();
            header_to_json(&path, &header, file.disk_bytes(), &mut object);
            object.insert("error".into(), json!(error.map(|error| sentence(error))));
            (object, header_lines(&path, &header, None, file.disk_bytes()))
        }
        None => return opened.map(|()| Exit::Done).map_err(Into::into),
    };
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", Value::Object(object))?;
    } else {
        lines.iter().try_for_each(|(name, value)| writeln!(out, "{name:18} {value}"))?;
    }
    opened?;
    Ok(Exit::Done)
}

/// What the header says, and whether a key is needed to see the rest.
fn header_to_json(path: &Path, header: &Header, disk_bytes: u64, object: &mut Map<String, Value>) {
    object.insert("path".into(), json!(text_of(path)));
    object.insert("version".into(), json!(VERSION));
    object.insert("features".into(), json!(header.features()));
    object.insert("sealed".into(), json!(header.sealing.is_some()));
    object.insert("id".into(), json!(id_text(&header.id)));
    let base = header.is_increment().then(|| json!({ "id": id_text(&header.base) }));
    object.insert("base".into(), json!(base));
    object.insert("taken".into(), json!(header.taken));
    object.insert("guest".into(), json!(header.guest.name()));
    object.insert("taken_utc".into(), json!(utc(header.taken)));
    object.insert("file_bytes".into(), json!(header.file_length));
    object.insert("disk_bytes".into(), json!(disk_bytes));
}

fn to_json(newest: &Image, images: &[Image], error: Option<&ImageError>) -> Map<String, Value> {
    let (header, contents, view) = (newest.header(), newest.contents(), View::Image(newest));
    let base = header.is_increment().then(
        || json!({ "id": id_text(&header.base), "name": contents.base_name, "path": text_of(&base_path(newest)) }),
    );
    let blocks = contents.table.blocks().iter().enumerate().map(|(at, block)| {
        let mut object = counts(view.block(at));
        object.insert("id".into(), json!(block.id));
        object.insert("name".into(), json!(block.name));
        object.insert("gpa".into(), json!(block.gpa));
        object.insert("length".into(), json!(block.length));
        object.insert("granularity".into(), json!(block.granularity));
        Value::Object(object)
    });
    let state =
        contents.pieces.iter().map(|piece| json!({ "name": piece.name, "bytes": piece.length }));
    let chain = images.iter().map(|image| {
        let mut object = counts(View::Image(image).all());
        object.insert("path".into(), json!(text_of(image.path())));
        object.insert("id".into(), json!(id_text(&image.header().id)));
        object.insert("taken".into(), json!(image.header().taken));
        object.insert("disk_bytes".into(), json!(image.file().disk_bytes()));
        Value::Object(object)
    });
    let mut object = counts(view.all());
    header_to_json(newest.path(), header, newest.file().disk_bytes(), &mut object);
    object.insert("base".into(), json!(base));
    object.insert("blocks".into(), Value::Array(blocks.collect()));
    object.insert("state".into(), Value::Array(state.collect()));
    object.insert("state_bytes".into(), json!(contents.state_size()));
    object.insert("chain".into(), Value::Array(chain.collect()));
    object.insert("error".into(), json!(error.map(|error| sentence(error))));
    object
}

/// Numbers of pages by state, as a JSON object.
pub(super) fn counts(tally: Tally) -> Map<String, Value> {
    let named = [
        ("present_pages", tally.present),
        ("zero_pages", tally.zero),
        ("discarded_pages", tally.discarded),
        ("unchanged_pages", tally.unchanged),
    ];
    named.into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect()
}

/// The lines of what the header says: name and value.
fn header_lines(
    path: &Path, header: &Header, base_name: Option<&str>, disk_bytes: u64,
) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
    line("image", text_of(path));
    line("version", format!("{VERSION}, features {:#x}", header.features()));
    line("sealed", if header.sealing.is_some() { "yes" } else { "no" }.into());
    line("id", id_text(&header.id));
    line("taken", utc(header.taken));
    line("guest", header.guest.name().to_owned());
    if header.is_increment() {
        let name =
            base_name.map_or("(its name is sealed)".into(), |name| name.escape_debug().to_string());
        line("base", format!("{} {name}", id_text(&header.base)));
    }
    let (length, on_disk) = (show::bytes(header.file_length), show::bytes(disk_bytes));
    line("file", format!("{length}, {on_disk} on the disk"));
    lines
}

/// The lines for an operator: name and value.
fn lines(newest: &Image, images: &[Image]) -> Vec<(String, String)> {
    let (header, contents, view) = (newest.header(), newest.contents(), View::Image(newest));
    let on_disk = newest.file().disk_bytes();
    let mut lines = header_lines(newest.path(), header, Some(&contents.base_name), on_disk);
    let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
    tally_lines(&mut line, &view, view.all());
    for (at, block) in contents.table.blocks().iter().enumerate() {
        let (length, granularity) = (show::bytes(block.length), show::bytes(block.granularity));
        let name = block.name.escape_debug();
        line(
            &format!("block {}", block.id),
            format!(
                "{name}, gpa {:#x} + {:#x} ({length}), discards of {granularity}",
                block.gpa, block.length
            ),
        );
        tally_lines(&mut line, &view, view.block(at));
    }
    line(
        "state of the VMM",
        format!(
            "{}, {}",
            show::bytes(contents.state_size()),
            counted(contents.pieces.len(), "piece")
        ),
    );
    for piece in &contents.pieces {
        line("", format!("{} ({})", piece.name.escape_debug(), show::bytes(piece.length)));
    }
    for (number, image) in images.iter().enumerate().skip(1) {
        let header = image.header();
        line(
            if number == 1 { "builds on" } else { "which builds on" },
            format!(
                "{}, id {}",
                image.path().display().to_string().escape_debug(),
                id_text(&header.id)
            ),
        );
        let content = show::bytes(View::Image(image).all().present * PAGE_SIZE);
        line(
            "",
            format!(
                "taken {}, content {content}, {} on the disk",
                utc(header.taken),
                show::bytes(image.file().disk_bytes())
            ),
        );
    }
    lines
}

/// Adds a line for each kind of page.
fn tally_lines(line: &mut impl FnMut(&str, String), view: &View<'_>, tally: Tally) {
    for (kind, count) in tally.kinds(view.is_increment()) {
        line(
            &format!("  {}", kind.name()),
            format!("{count} pages ({})", show::bytes(count * PAGE_SIZE)),
        );
    }
}

/// Formats seconds since 1970 as a date and a time in UTC.
///
/// Days are counted from the 1st of March of the year 0, so a leap day is the last day of a year.
/// 400 years are an era of 146097 days.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Month 0 is March. From there on, every five months together have 153 days.
    let month = (5 * day + 2) / 153;
    let (day, year) = (day - (153 * month + 2) / 5 + 1, year + era * 400);
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_formatted_as_dates() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_000_000_000, "2001-09-09T01:46:40Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), date);
        }
        // An image may contain any number.
        assert!(utc(u64::MAX).ends_with(":15Z"));
    }

    #[test]
    fn each_day_follows_the_one_before() {
        let (mut year, mut month, mut day) = (1970u64, 1, 1);
        for number in 0..200_000u64 {
            assert_eq!(utc(number * 86400), format!("{year:04}-{month:02}-{day:02}T00:00:00Z"));
            let leap =
                year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            let days = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > days {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }
}
