//! Whose doing it is when the kernel complains and several tests ran: that of the tests which the report names.
//!
//! A report says which task was running ("CPU: 1 UID: 0 PID: 77 Comm: reads_hole#12", "by task reads_hole#12/77",
//! "stuck for 26s! [reads_hole#12:77]"). The process of a test has a name that no other test of the run has; its threads
//! and its forks inherit it. What names no test (an interrupt, a worker of the kernel, another program) may be the doing
//! of any that ran.

/// Bytes of a task's name that the kernel keeps (TASK_COMM_LEN, less the NUL).
const COMM: usize = 15;

/// The name of a test's process: the beginning of the claim's name in its suite, and the number of the test in the run,
/// which is the end of `mark` (`PID.NUMBER`).
pub fn comm(name_in_suite: &str, mark: &str) -> String {
    let number = mark.rsplit('.').next().unwrap_or_default();
    let mut room = COMM.saturating_sub(1 + number.len()).min(name_in_suite.len());
    while !name_in_suite.is_char_boundary(room) {
        room -= 1;
    }
    format!("{}#{number}", &name_in_suite[..room])
}

/// Whether a line of the kernel log is about the task of that name, which ends in a number.
fn is_about(line: &str, comm: &str) -> bool {
    line.match_indices(comm).any(|(at, _)| !line[at + comm.len()..].starts_with(|next: char| next.is_ascii_digit()))
}

/// Part of a report that a CPU did not get on: whatever ran then had to wait for it, whoever it names.
const STALLED: &str = "detected stall";

/// Whether a report is about a CPU that did not get on.
pub fn is_stall(report: &[String]) -> bool {
    report.iter().any(|line| line.contains(STALLED))
}

/// For each of the tests that ran, by the names of their processes, whether `report` may be its doing or has hurt it:
/// those that the report names, and every one when it names none or is about a CPU that did not get on.
pub fn accused(report: &[String], comms: &[&str]) -> Vec<bool> {
    if is_stall(report) {
        return vec![true; comms.len()];
    }
    let named: Vec<bool> = comms.iter().map(|comm| report.iter().any(|line| is_about(line, comm))).collect();
    if named.contains(&true) { named } else { vec![true; comms.len()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_the_kernel_and_is_the_tests_alone() {
        assert_eq!(comm("reads_hole", "17.3"), "reads_hole#3");
        assert_eq!(comm("recreated_slot_shows_its_data::quirk_on", "17.2151"), "recreated_#2151");
        assert_eq!(comm("x", "17.3"), "x#3");
        assert_eq!(comm("ääääääääääää", "17.12").len(), 15);
        assert_eq!(comm("ääääääääääää", "17.1").len(), 14, "no half of a character");
    }

    #[test]
    fn a_report_accuses_those_that_it_names_and_else_all() {
        let tests = ["reads_hole#1", "reads_hole#12"];
        let of = |line: &str| accused(&["WARNING: x".to_owned(), line.to_owned()], &tests);
        assert_eq!(of("CPU: 1 UID: 0 PID: 77 Comm: reads_hole#12 Not tainted 7.3.4 #1"), [false, true]);
        assert_eq!(of("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [reads_hole#1:77]"), [true, false]);
        assert_eq!(of("CPU: 1 UID: 0 PID: 77 Comm: kworker/1:2"), [true, true]);
        assert_eq!(of("freed by reads_hole#1/7, used by reads_hole#12/8"), [true, true]);
        assert_eq!(of("Comm: reads_hole#1"), [true, false], "at the end of a line");
        assert_eq!(of("rcu: INFO: rcu_sched detected stalls on CPUs/tasks: Comm: reads_hole#1"), [true, true]);
    }
}
