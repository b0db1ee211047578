//! What the formats for people say of a run and of a result, line by line.

use crate::harness::Record;
use crate::harness::event::RunInfo;
use crate::harness::outcome::{Output, StuckThread};
use crate::harness::plan::Plan;

/// Lines of a test's output that are shown with its failure; the rest is counted.
const OUTPUT_LINES: usize = 20;

/// What is said before the first result; the seed comes first.
pub(super) fn header(info: &RunInfo, plan: &Plan) -> Vec<String> {
    let environment = &info.environment;
    let machines: Vec<String> = plan.machines.iter().map(ToString::to_string).collect();
    let mut lines = vec![
        format!("seed {}", info.seed),
        format!(
            "gmemtest {} on {} {} {}",
            env!("CARGO_PKG_VERSION"),
            environment.kernel_release,
            environment.kernel_version,
            environment.architecture
        ),
        format!("cpu {} x {}", environment.cpus, environment.cpu_model),
        format!("machines {}; {} tests each", machines.join(" "), plan.claims.len()),
    ];
    if let Some(order) = info.shuffle {
        lines.push(format!("order shuffled with seed {order}"));
    }
    lines
}

/// Everything there is to say about a result besides its outcome, line by line.
pub(super) fn details(record: &Record) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    if let Some(message) = &record.message {
        lines.extend(message.lines().map(str::to_owned));
    }
    if let Some(location) = record.location.as_ref().filter(|location| !location.is_empty()) {
        lines.push(format!("at {location}"));
    }
    lines.extend(record.notes.iter().flat_map(|note| note.lines()).map(|line| format!("note: {line}")));
    lines.extend(record.stuck.iter().flat_map(stuck));
    for line in &record.kernel_log {
        lines.push(format!("kernel: {line}"));
    }
    if !record.overlapped.is_empty() {
        lines.push(format!("these ran then too, and may be the cause: {}", record.overlapped.join(", ")));
    }
    if record.outcome.counts_as_failure() {
        lines.extend(output("stdout", &record.stdout));
        lines.extend(output("stderr", &record.stderr));
    }
    lines
}

fn stuck(thread: &StuckThread) -> Vec<String> {
    let StuckThread { pid, tid, name, state, wchan, syscall, stack } = thread;
    let wchan = if wchan.is_empty() { "-" } else { wchan };
    let mut lines = vec![format!("thread {pid}/{tid} ({name}) state {state}, in {wchan}, syscall {syscall}")];
    lines.extend(stack.iter().map(|frame| format!("  {frame}")));
    lines
}

fn output(name: &str, output: &Output) -> Vec<String> {
    let all: Vec<&str> = output.text.lines().collect();
    let shown = &all[all.len().saturating_sub(OUTPUT_LINES)..];
    let mut lines = Vec::new();
    if shown.len() < all.len() || output.bytes > output.text.len() as u64 {
        lines.push(format!("{name}: {} bytes in all, the last {} lines:", output.bytes, shown.len()));
    }
    lines.extend(shown.iter().map(|line| format!("{name}| {}", printable(line))));
    lines
}

/// A line may hold anything: control characters are shown, not obeyed.
fn printable(line: &str) -> String {
    line.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}
