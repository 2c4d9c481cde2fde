// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pageferry image map`: draws a map of the guest's memory on the terminal, or to a PNG file.
//!
//! On the terminal each block is a grid of cells. With colours a line of text shows two rows of
//! cells; without colours a cell is a letter. A cell has as few pages as possible such that the
//! block fits the given number of lines.

use super::{ImageArgs, Outcome, absolute, info, text_of};
use crate::cli::exit::Exit;
use crate::cli::show;
use crate::image::map_picture::{Colour, MAX_WIDTH, Picture, Tally, View, pages_per_cell};
use crate::image::new_file::{FileKind, write_new};
use crate::image::{Chain, Image};
use clap::Args;
use pageferry_protocol::memory::{BlockGeometry, PAGE_SIZE};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

/// Columns of the address before each row.
const LABEL: usize = 18;
/// Cells in a row if there is no terminal to ask.
const COLUMNS: usize = 64;
/// The letters of cells and their meaning: at least half of the pages have content, fewer have, and
/// three letters for cells without content.
const SIGNS: [(char, &str); 5] = [
    ('#', "content"),
    ('+', "some content"),
    ('.', "zero"),
    ('-', "discarded"),
    ('=', "as in the base"),
];

/// A map.
#[derive(Debug, Args)]
pub struct MapArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// For an increment: draw the whole guest, with all images that this one builds on, instead of
    /// only what this image changes.
    #[arg(long)]
    whole: bool,
    /// Cells in a row, or the most pixels in a file [default: what fits the terminal, or 64; 1024
    /// in a file].
    #[arg(long, value_name = "CELLS", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_WIDTH)))]
    width: Option<u32>,
    /// Most lines for each block.
    #[arg(long, value_name = "LINES", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    height: u32,
    /// Write the picture to this PNG file instead of drawing it here.
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
    /// Replace the PNG file if it exists. Any other file is refused.
    #[arg(long, requires = "png")]
    replace: bool,
}

/// Draws the map.
///
/// # Errors
/// If the image cannot be opened, or the picture cannot be written.
pub(super) fn run(args: &MapArgs) -> Outcome {
    let (path, key) = (absolute(&args.image.path)?, args.image.read_key()?);
    if args.whole {
        let chain = Chain::open_with(&path, key.as_ref())?;
        draw(args, &View::Guest(&chain))
    } else {
        let image = Image::open_with(&path, key.as_ref())?;
        draw(args, &View::Image(&image))
    }
}

/// Draws the map of `view`, or writes the picture and prints a title for each block.
fn draw(args: &MapArgs, view: &View<'_>) -> Outcome {
    let picture = match &args.png {
        Some(file) => Some(write_picture(args, view, absolute(file)?)?),
        None => None,
    };
    let mut out = io::stdout().lock();
    if args.image.json {
        writeln!(out, "{}", to_json(args, view, picture.as_ref()))?;
        return Ok(Exit::Done);
    }
    let coloured = picture.is_some() || is_coloured();
    if let Some((file, picture)) = &picture {
        let Picture { width, height, pages_per_pixel, .. } = picture;
        let pixel = show::bytes(pages_per_pixel * PAGE_SIZE);
        writeln!(out, "{}: {width} x {height} pixels, each is {pixel}", file.display())?;
        let colours = Tally::default().kinds(view.is_increment()).map(|(kind, _)| {
            let [red, green, blue] = kind.colour();
            format!("{} #{red:02x}{green:02x}{blue:02x}", kind.name())
        });
        writeln!(out, "{}", colours.collect::<Vec<_>>().join("   "))?;
    } else {
        writeln!(out, "{}", legend(view, coloured))?;
    }
    for (at, block) in view.table().blocks().iter().enumerate() {
        let cells = Grid::new(args, block, coloured);
        writeln!(
            out,
            "\n{}",
            title(view, at, block, picture.is_none().then_some(cells.pages_per_cell))
        )?;
        if picture.is_none() {
            cells
                .lines(view, at, block.gpa, coloured)
                .try_for_each(|line| writeln!(out, "{line}"))?;
        }
    }
    Ok(Exit::Done)
}

fn write_picture(
    args: &MapArgs, view: &View<'_>, file: PathBuf,
) -> Result<(PathBuf, Picture), Box<dyn std::error::Error>> {
    let picture = Picture::paint(view, args.width.unwrap_or(1024));
    write_new(&file, &picture.png()?, FileKind::PNG, args.replace)?;
    Ok((file, picture))
}

fn to_json(args: &MapArgs, view: &View<'_>, picture: Option<&(PathBuf, Picture)>) -> Value {
    let blocks = view.table().blocks().iter().enumerate().map(|(at, block)| {
        let per_cell = Grid::new(args, block, false).pages_per_cell;
        let cell = |cell: Tally| json!([cell.present, cell.zero, cell.discarded, cell.unchanged]);
        let cells =
            picture.is_none().then(|| view.cells(at, per_cell).map(cell).collect::<Vec<_>>());
        let mut object = info::counts(view.block(at));
        object.insert("id".into(), json!(block.id));
        object.insert("name".into(), json!(block.name));
        object.insert("gpa".into(), json!(block.gpa));
        object.insert("pages_per_cell".into(), json!(cells.as_ref().map(|_| per_cell)));
        // Each cell is the number of its present, zero, discarded and unchanged pages.
        object.insert("cells".into(), json!(cells));
        Value::Object(object)
    });
    let picture = picture.map(|(file, picture)| {
        let Picture { width, height, pages_per_pixel, .. } = picture;
        json!({ "path": text_of(file), "width": width, "height": height, "pages_per_pixel": pages_per_pixel })
    });
    json!({ "increment": view.is_increment(), "blocks": blocks.collect::<Vec<_>>(), "picture": picture })
}

/// True if the output is a terminal and the user has not switched colours off with `NO_COLOR`, see
/// <https://no-color.org>.
fn is_coloured() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The line that explains the colours or the letters.
fn legend(view: &View<'_>, coloured: bool) -> String {
    let increment = view.is_increment();
    if coloured {
        let kinds = Tally::default().kinds(increment);
        let samples =
            kinds.map(|(kind, _)| format!("{}  \x1b[0m {}", paint(48, kind.colour()), kind.name()));
        return samples.collect::<Vec<_>>().join("   ");
    }
    let named = SIGNS.iter().filter(|(sign, _)| increment || *sign != '=');
    let sign = |(sign, name): &(char, &str)| {
        let name = if increment { name.replace("content", "changed") } else { (*name).to_owned() };
        format!("{sign} {name}")
    };
    named.map(sign).collect::<Vec<_>>().join("   ")
}

/// The title of a block: its id, name and length, and the share of each kind of page.
fn title(view: &View<'_>, at: usize, block: &BlockGeometry, per_cell: Option<u64>) -> String {
    let tally = view.block(at);
    let percent = |count: u64| count as f64 * 100.0 / tally.pages().max(1) as f64;
    let kinds = tally.kinds(view.is_increment());
    let kinds: Vec<_> =
        kinds.map(|(kind, count)| format!("{} {:.1} %", kind.name(), percent(count))).collect();
    let cell = per_cell
        .map_or(String::new(), |pages| format!(", a cell is {}", show::bytes(pages * PAGE_SIZE)));
    let (id, name, length) = (block.id, block.name.escape_debug(), show::bytes(block.length));
    format!("block {id} {name}, {length}{cell}: {}", kinds.join(", "))
}

/// The grid of cells of a block.
struct Grid {
    columns: usize,
    pages_per_cell: u64,
}

impl Grid {
    fn new(args: &MapArgs, block: &BlockGeometry, coloured: bool) -> Self {
        let columns = args.width.map_or_else(columns_that_fit, |width| width as usize);
        // With colours, a line of text shows two rows of cells.
        let rows = args.height as usize * if coloured { 2 } else { 1 };
        Self { columns, pages_per_cell: pages_per_cell(block.pages(), (columns * rows) as u64) }
    }

    /// The lines of the block at index `at`: the guest physical address of the first cell, and the
    /// cells.
    fn lines<'a>(
        &self, view: &'a View<'_>, at: usize, gpa: u64, coloured: bool,
    ) -> impl Iterator<Item = String> + use<'a, '_> {
        let (columns, per_line) = (self.columns, self.columns * if coloured { 2 } else { 1 });
        let (increment, line_bytes) =
            (view.is_increment(), self.pages_per_cell * PAGE_SIZE * per_line as u64);
        let mut cells = view.cells(at, self.pages_per_cell);
        (0..).map_while(move |line: u64| {
            let cells: Vec<Tally> = cells.by_ref().take(per_line).collect();
            let drawn = match cells.split_at_checked(columns) {
                _ if cells.is_empty() => return None,
                Some((upper, lower)) if coloured => two_rows(upper, lower, increment),
                None if coloured => two_rows(&cells, &[], increment),
                _ => cells.iter().map(sign).collect(),
            };
            // Saturating: a block may end at the last possible address.
            Some(format!("{:#016x}  {drawn}", gpa.saturating_add(line.saturating_mul(line_bytes))))
        })
    }
}

/// The largest number of cells in a row that fits the terminal. It is a power of two, so that rows
/// begin at round addresses.
fn columns_that_fit() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    let fits = size.ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
    fits.map_or(COLUMNS, |columns| 1 << columns.saturating_sub(LABEL).max(16).ilog2())
}

/// A cell as a letter.
fn sign(cell: &Tally) -> char {
    let most = cell.zero.max(cell.discarded).max(cell.unchanged);
    match cell {
        _ if cell.present > 0 && cell.present * 2 >= cell.pages() => '#',
        _ if cell.present > 0 => '+',
        _ if cell.zero == most => '.',
        _ if cell.discarded == most => '-',
        _ => '=',
    }
}

/// Draws two rows of cells in one line of text. Each letter is a block that fills the upper half of
/// its place: it has the colour of the upper cell, and the background has that of the lower cell.
fn two_rows(upper: &[Tally], lower: &[Tally], increment: bool) -> String {
    let mut line = String::new();
    let mut last = None;
    for (at, cell) in upper.iter().enumerate() {
        let colours = (cell.colour(increment), lower.get(at).map(|cell| cell.colour(increment)));
        if last != Some(colours) {
            let background =
                colours.1.map_or_else(|| "\x1b[49m".to_owned(), |colour| paint(48, colour));
            // Writing to a string does not fail.
            let _ = write!(line, "{}{background}", paint(38, colours.0));
            last = Some(colours);
        }
        line.push('\u{2580}');
    }
    line + "\x1b[0m"
}

/// The escape sequence that selects a colour. `what` is 38 for the text and 48 for the background.
/// If the terminal does not say that it has all colours, this is the nearest of the 216 colours of
/// the usual palette.
fn paint(what: u8, colour: Colour) -> String {
    let all = std::env::var("COLORTERM")
        .is_ok_and(|value| value.contains("truecolor") || value.contains("24bit"));
    let [red, green, blue] = colour;
    if all {
        return format!("\x1b[{what};2;{red};{green};{blue}m");
    }
    // The palette is a cube with these steps for each of red, green and blue: 0, 95, 135, 175, 215,
    // 255.
    let step = |value: u8| {
        u16::from(value >= 48)
            + u16::from(value >= 115)
            + u16::from(value >= 155)
            + u16::from(value >= 195)
            + u16::from(value >= 235)
    };
    format!("\x1b[{what};5;{}m", 16 + 36 * step(red) + 6 * step(green) + step(blue))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test_support::{Page, write, zero};
    use crate::image::writer::Base;

    fn args(width: u32, height: u32) -> MapArgs {
        let image = ImageArgs { path: PathBuf::new(), key: None, json: false };
        MapArgs { image, whole: false, width: Some(width), height, png: None, replace: false }
    }

    #[test]
    fn a_block_is_drawn_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut model = zero();
        model[1][0..40].fill(Page::Content(1));
        model[1][64] = Page::Content(1);
        model[1][256..512].fill(Page::Discarded);
        write(&path, &model, &Base::default(), 64);
        let image = Image::open(&path).unwrap();
        let view = View::Image(&image);
        let grid = Grid::new(&args(10, 4), &view.table().blocks()[1], false);
        assert_eq!(grid.pages_per_cell, 32);
        let lines: Vec<String> = grid.lines(&view, 1, 6 << 30, false).collect();
        let expected = [
            "0x00000180000000  #++.....--",
            "0x00000180140000  ------....",
            "0x00000180280000  ..........",
            "0x000001803c0000  .....",
        ];
        assert_eq!(lines, expected);
        let title = title(&view, 1, &view.table().blocks()[1], Some(32));
        assert_eq!(
            title,
            "block 6 ram6, 4.3 MiB, a cell is 128.0 KiB: content 3.7 %, zero 73.0 %, discarded 23.3 %"
        );
        let coloured: Vec<String> = grid.lines(&view, 1, 0, true).collect();
        assert_eq!(coloured.len(), 2);
        assert!(
            coloured
                .iter()
                .all(|line| line.matches('\u{2580}').count() == 10 && line.ends_with("\x1b[0m"))
        );
        assert_eq!(legend(&view, false), "# content   + some content   . zero   - discarded");
    }
}
