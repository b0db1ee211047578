//! The comparison as one page: tables, and the costs as bars. No script, nothing from elsewhere.

use std::fmt::Write;

use super::properties::Judgement;
use super::text::number;
use super::{Cell, Comparison, CostRow};

const STYLE: &str = include_str!("policies.css");

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Everything that a cell has to say, for the tooltip.
fn long(cell: &Cell) -> String {
    let mut parts = vec![match cell.result.as_str() {
        "0" => "the caller is told nothing".to_owned(),
        errno => format!("the caller is told {errno}"),
    }];
    parts.extend(cell.offset.map(|offset| format!("error_offset {offset:#x}")));
    parts.extend(cell.vm_dead.map(|dead| format!("the VM is {}", if dead { "dead" } else { "alive" })));
    if cell.free_while_owned {
        parts.push("the page is free while the TDX module has it".into());
    }
    if cell.mapped_while_owned {
        parts.push("the host may map the page while the TDX module has it".into());
    }
    parts.push(format!("{} guest pages are lost", cell.leaked_pages));
    parts.push(if cell.root_lost { "the TD's root page is lost" } else { "the TD's root page comes back" }.into());
    parts.push(format!("{} lines in the kernel log", cell.complaints));
    parts.join("; ")
}

fn badge(cell: &Cell) -> String {
    let class = match cell {
        cell if cell.is_unsafe() => "unsafe",
        cell if cell.result == "EAGAIN" => "odd",
        cell if cell.leaked_pages > 0 => "leak",
        _ => "calm",
    };
    let result = if cell.result == "0" { "returns 0" } else { &cell.result };
    let mut marks = String::new();
    if cell.offset.is_some() {
        marks.push_str("<i>offset</i>");
    }
    if cell.vm_dead == Some(true) {
        marks.push_str("<i class=\"dead\">VM dead</i>");
    }
    if cell.free_while_owned {
        marks.push_str("<i class=\"bad\">freed</i>");
    }
    if cell.mapped_while_owned {
        marks.push_str("<i class=\"bad\">host maps it</i>");
    }
    if cell.leaked_pages > 0 && !cell.is_unsafe() {
        let plural = if cell.leaked_pages == 1 { "" } else { "s" };
        let _ = write!(marks, "<i class=\"lost\">{} page{plural} lost</i>", cell.leaked_pages);
    }
    format!("<td class=\"{class}\" title=\"{}\"><b>{}</b>{marks}</td>", escape(&long(cell)), escape(result))
}

fn table_head(comparison: &Comparison, first: &str) -> String {
    let mut head = format!("<thead><tr><th>{first}</th>");
    for policy in &comparison.policies {
        let _ = write!(head, "<th title=\"{}\"><code>{}</code></th>", escape(policy.summary), policy.name);
    }
    head + "</tr></thead>"
}

fn scenarios(comparison: &Comparison) -> String {
    let mut out = String::from("<div class=\"scroll\"><table>") + &table_head(comparison, "what happens");
    let mut group = "";
    for row in &comparison.scenarios {
        if row.group != group {
            group = row.group;
            let columns = comparison.policies.len() + 1;
            let _ = write!(out, "<tr class=\"group\"><th colspan=\"{columns}\">{}</th></tr>", escape(group));
        }
        let kernel = escape(row.kernel);
        let fault = escape(row.fault);
        let _ = write!(out, "<tr><th title=\"{fault}\">{} <small>kernel={kernel}</small></th>", escape(row.name));
        out.extend(row.cells.iter().map(badge));
        out.push_str("</tr>");
    }
    out + "</table></div>"
}

fn properties(comparison: &Comparison) -> String {
    let mut out = String::from("<div class=\"scroll\"><table>") + &table_head(comparison, "question");
    for row in &comparison.properties {
        let _ = write!(out, "<tr><th>{}<small class=\"how\">{}</small></th>", escape(row.name), escape(row.measured));
        for cell in &row.cells {
            let class = if cell.judgement == Judgement::Good { "good" } else { "poor" };
            let _ = write!(out, "<td class=\"{class}\"><b>{}</b></td>", escape(&cell.answer));
        }
        out.push_str("</tr>");
    }
    out + "</table></div>"
}

/// Width of the labels, of a bar at full length, and height of a line, in units of the drawing.
const NAMES: f64 = 112.0;
const FULL: f64 = 190.0;
const LINE: f64 = 20.0;

/// One quantity as bars, one a policy.
fn chart(comparison: &Comparison, row: &CostRow) -> String {
    let most = row.cells.iter().map(|figure| figure.value).fold(0.0, f64::max);
    let height = LINE * row.cells.len() as f64;
    let width = NAMES + FULL + 60.0;
    let title = format!("{}: {} ({}), {} pages", row.phase, row.name, row.unit, row.page);
    let mut out = format!(
        "<figure><figcaption>{} <small>{}</small></figcaption><svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(row.name),
        escape(row.unit),
        escape(&title)
    );
    for (i, (policy, figure)) in comparison.policies.iter().zip(&row.cells).enumerate() {
        let y = LINE * i as f64;
        let middle = y + LINE * 0.68;
        let bar =
            if most > 0.0 { (figure.value / most * FULL).max(if figure.value > 0.0 { 2.0 } else { 0.0 }) } else { 0.0 };
        let value = if figure.value == 0.0 { "0".to_owned() } else { number(figure.value) };
        let class = if figure.value == 0.0 { "none" } else { "some" };
        let _ = write!(
            out,
            "<text class=\"who\" x=\"{}\" y=\"{middle:.1}\">{}</text><rect x=\"{NAMES}\" y=\"{:.1}\" width=\"{bar:.1}\" height=\"{:.1}\" rx=\"2\"/><text class=\"{class}\" x=\"{:.1}\" y=\"{middle:.1}\">{value}</text>",
            NAMES - 8.0,
            policy.name,
            y + 3.5,
            LINE - 7.0,
            NAMES + bar + 5.0,
        );
    }
    out + "</svg></figure>"
}

/// What is added up for the summary, and the class of its colour. Everything that is counted per MiB.
const KINDS: [(&str, &str); 5] = [
    ("reference updates", "k0"),
    ("reference checks", "k1"),
    ("counter updates", "k2"),
    ("counter checks", "k3"),
    ("safety checks of references", "k4"),
];

/// Everything that one MiB costs from mapping to conversion there and back, one bar a policy, in parts by kind.
fn sum_chart(comparison: &Comparison, page: &str) -> String {
    let sums: Vec<Vec<f64>> = (0..comparison.policies.len())
        .map(|i| {
            let of_kind = |name: &str| {
                let rows = comparison.costs.iter().filter(|row| row.page == page && row.unit == "per MiB");
                rows.filter(|row| row.name == name).map(|row| row.cells[i].value).sum()
            };
            KINDS.iter().map(|(name, _)| of_kind(name)).collect()
        })
        .collect();
    let most = sums.iter().map(|parts| parts.iter().sum::<f64>()).fold(1.0, f64::max);
    let (full, line) = (640.0, 24.0);
    let (width, height) = (NAMES + full + 70.0, line * sums.len() as f64);
    let mut out = format!(
        "<figure class=\"sum\"><figcaption>Everything, for one MiB mapped, converted to shared and back <small>per MiB</small></figcaption>\
<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"all work per MiB with {page} pages\">"
    );
    for (i, (policy, parts)) in comparison.policies.iter().zip(&sums).enumerate() {
        let y = line * i as f64;
        let middle = y + line * 0.66;
        let _ = write!(out, "<text class=\"who\" x=\"{}\" y=\"{middle:.1}\">{}</text>", NAMES - 8.0, policy.name);
        let mut x = NAMES;
        for ((name, class), part) in KINDS.iter().zip(parts).filter(|(_, part)| **part > 0.0) {
            let bar = part / most * full;
            let _ = write!(
                out,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{bar:.1}\" height=\"{:.1}\"><title>{name}: {}</title></rect>",
                y + 4.0,
                line - 8.0,
                number(*part)
            );
            x += bar;
        }
        let sum = number(parts.iter().sum());
        let _ = write!(out, "<text x=\"{:.1}\" y=\"{middle:.1}\">{sum}</text>", x + 6.0);
    }
    out.push_str("</svg><p class=\"kinds\">");
    for (name, class) in KINDS {
        let _ = write!(
            out,
            "<span><svg viewBox=\"0 0 10 10\"><rect class=\"{class}\" width=\"10\" height=\"10\" rx=\"2\"/></svg>{name}</span>"
        );
    }
    out + "</p></figure>"
}

fn costs(comparison: &Comparison) -> String {
    let mut out = String::new();
    for (page, title) in [("4K", "4K pages"), ("2M", "2M folios")] {
        let _ = write!(out, "<h3>{title}</h3>{}", sum_chart(comparison, page));
        for (phase, title) in [
            ("map", "Mapping into the S-EPT"),
            ("to shared", "Conversion to shared"),
            ("to private", "Conversion to private, the same under every policy"),
            ("memory", "Memory"),
        ] {
            let rows: Vec<&CostRow> =
                comparison.costs.iter().filter(|row| row.page == page && row.phase == phase).collect();
            let (used, unused): (Vec<&CostRow>, Vec<&CostRow>) =
                rows.into_iter().partition(|row| row.cells.iter().any(|figure| figure.value > 0.0));
            let _ = write!(out, "<h4>{title}</h4><div class=\"charts\">");
            out.extend(used.into_iter().map(|row| chart(comparison, row)));
            out.push_str("</div>");
            if !unused.is_empty() {
                let names: Vec<&str> = unused.iter().map(|row| row.name).collect();
                let _ = write!(out, "<p class=\"zero\">Nobody needs: {}.</p>", escape(&names.join(", ")));
            }
        }
    }
    out
}

/// The page.
pub fn render(comparison: &Comparison) -> String {
    let mut policies = String::new();
    for policy in &comparison.policies {
        let _ = write!(policies, "<li><code>{}</code> {}</li>", policy.name, escape(policy.summary));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
<title>When a TDX private page cannot be unmapped</title><style>{STYLE}</style></head><body><main>\
<h1>When a TDX private page cannot be unmapped</h1>\
<p class=\"lead\">Six answers to one question, each of which was given by Linux or proposed for it, measured one beside the \
other. Every cell was obtained by running the answer on the simulated machine <code>sim:tdx</code>; nothing on this page is a \
result on TDX hardware.</p><ul class=\"policies\">{policies}</ul>\
<h2>What comes of a failure</h2>\
<p>What the caller is told, whether the VM dies, and what becomes of the page. <b class=\"key unsafe\">Red</b>: the page is \
given to somebody while the TDX module has it. <b class=\"key leak\">Yellow</b>: pages are lost for good, and nobody gets \
them. <b class=\"key odd\">Violet</b>: EAGAIN, &ldquo;try again&rdquo;, of what no retry can cure. Hold the pointer over a \
cell for all of it.</p>{}\
<h2>What each can and cannot do</h2>{}\
<h2>What each costs while nothing fails</h2>\
<p>Counted in the model while memory is mapped, converted to shared and back. &ldquo;Reference checks&rdquo; on the way to \
shared are what <i>checking every reference count at conversion</i> costs; the safety checks on the way to private are \
made by in-place conversion under every policy and stand here to compare with.</p>{}\
<footer>gmemtest {} &middot; <code>gmemtest policies --format html</code> &middot; schema {}</footer></main></body></html>\n",
        scenarios(comparison),
        properties(comparison),
        costs(comparison),
        env!("CARGO_PKG_VERSION"),
        comparison.schema,
    )
}
