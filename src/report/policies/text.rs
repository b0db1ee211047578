//! The comparison for a terminal of 120 columns.

use std::fmt::Write;

use super::properties::Judgement;
use super::{Cell, Comparison};

const LABEL: usize = 34;
const CELL: usize = 14;

/// Whether the text may use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// Escape sequences for a terminal.
    Ansi,
    /// None.
    Plain,
}

#[derive(Clone, Copy)]
enum Paint {
    Red,
    Green,
    Bold,
    Dim,
    None,
}

impl Colour {
    /// `text` in a field of `width`, with the escapes outside of what is counted.
    fn field(self, text: &str, width: usize, paint: Paint) -> String {
        let padded = format!("{text:<width$}");
        let code = match paint {
            Paint::Red => "1;31",
            Paint::Green => "32",
            Paint::Bold => "1",
            Paint::Dim => "2",
            Paint::None => "",
        };
        if self == Colour::Plain || code.is_empty() { padded } else { format!("\x1b[{code}m{padded}\x1b[0m") }
    }
}

/// What a cell says, in at most thirteen columns.
fn short(cell: &Cell) -> String {
    let at = if cell.offset.is_some() { "@" } else { "" };
    let dead = if cell.vm_dead == Some(true) { " \u{2020}" } else { "" };
    let away = match (cell.is_unsafe(), cell.leaked_pages) {
        (true, _) => " UNSAFE".to_owned(),
        (false, 0) => String::new(),
        (false, pages) if pages % 512 == 0 => format!(" -{}M", pages / 256),
        (false, pages) => format!(" -{}K", pages * 4),
    };
    format!("{}{at}{dead}{away}", cell.result)
}

/// A number as short as it can be.
pub(super) fn number(value: f64) -> String {
    if value == 0.0 {
        "-".to_owned()
    } else if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

/// The whole comparison.
pub fn render(comparison: &Comparison, colour: Colour) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        let _ = writeln!(out, "{}", text.trim_end());
    };
    let names: String = comparison.policies.iter().map(|policy| colour.field(policy.name, CELL, Paint::Bold)).collect();
    let heading = |title: &str| format!("{}{names}", colour.field(title, LABEL, Paint::Bold));

    let mut group = "";
    for row in &comparison.scenarios {
        if row.group != group {
            if !group.is_empty() {
                line(String::new());
            }
            group = row.group;
            line(heading(group));
        }
        let label = if row.group.starts_with("4K") || row.group.starts_with("2M") || row.group.starts_with("part") {
            row.name.to_owned()
        } else {
            row.fault.to_owned()
        };
        let cells: String = row
            .cells
            .iter()
            .map(|cell| {
                let paint = if cell.is_unsafe() { Paint::Red } else { Paint::None };
                colour.field(&short(cell), CELL, paint)
            })
            .collect();
        line(format!("  {label:<width$}{cells}", width = LABEL - 2));
    }

    line(String::new());
    line(heading("properties"));
    for row in &comparison.properties {
        let cells: String = row
            .cells
            .iter()
            .map(|cell| {
                let paint = if cell.judgement == Judgement::Good { Paint::Green } else { Paint::Red };
                colour.field(&cell.answer, CELL, paint)
            })
            .collect();
        line(format!("  {:<width$}{cells}", row.name, width = LABEL - 2));
    }

    for page in ["4K", "2M"] {
        line(String::new());
        line(heading(&format!("costs with {page} pages")));
        let mut phase = "";
        for row in comparison.costs.iter().filter(|row| row.page == page) {
            if row.phase != phase {
                phase = row.phase;
                line(colour.field(&format!("  {phase}"), LABEL, Paint::Dim));
            }
            let label = match row.unit {
                "per MiB" => format!("{} / MiB", row.name.replace("safety checks of references", "reference checks")),
                "per call" => format!("{} / call", row.name),
                "bytes/page" => format!("bytes/page, {}", row.name.replace("counters, ", "")),
                _ => row.name.to_owned(),
            };
            let label = label.replace("in ranges, every other mapping", "alternating");
            let cells: String = row
                .cells
                .iter()
                .map(|figure| {
                    let paint = if figure.value == 0.0 { Paint::Dim } else { Paint::None };
                    colour.field(&number(figure.value), CELL, paint)
                })
                .collect();
            line(format!("    {label:<width$}{cells}", width = LABEL - 4));
        }
    }

    line(String::new());
    for text in LEGEND {
        line(colour.field(text, 0, Paint::Dim));
    }
    out
}

const LEGEND: [&str; 11] = [
    "0, EFAULT@   what the caller is told; @: with the offset of what failed",
    "\u{2020}            the VM is dead: every ioctl on it is EIO",
    "UNSAFE       the page is free, or mapped by the host, while the TDX module has it",
    "-4K, -2M     so much guest memory is lost for good; the TD's root page besides, wherever the module keeps a page",
    "",
    "forget-remove is a bug of KVM that drops a page table without telling TDX: only counts kept elsewhere can notice.",
    "No false alarm: a transient reference of somebody else is not taken for a page that is stuck.",
    "Reference checks on the way to shared are what 'check every reference count at conversion' costs. Those on the way",
    "to private are made by in-place conversion under every policy, and stand here to compare with.",
    "Every cell was measured just now on sim:tdx (kernel=7.3, in-place and huge); nothing here is a result on hardware.",
    "Everything in full: --format json, --format html.",
];
