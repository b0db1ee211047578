//! The process that runs claims one after another, as it is told on standard input.

use std::cell::RefCell;
use std::io::{self, BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use super::super::child::{Opener, panic_text, run};
use super::super::exit::{GOOD, USAGE};
use super::super::plan::{Claim, claims};
use super::super::{Context, Seed, Stop, Suite};
use super::{Finding, Job, Said};
use crate::machine::MachineSpec;

/// The first argument of a worker.
pub const WORKER_ARGUMENT: &str = "__mutation-worker";

/// The seed of every claim: what kills a mutant today kills it tomorrow.
const SEED: Seed = Seed(0x6d75_7461_6e74_7331);

/// Carries out jobs until there is none.
pub fn worker(suites: &[&'static Suite], open: Opener) -> ExitCode {
    let all = claims(suites);
    // A panic is a finding, told with the claim; the text of thousands of them is of no use to anybody.
    std::panic::set_hook(Box::new(|_| {}));
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let Ok(job) = serde_json::from_str::<Job>(&line) else {
            eprintln!("gmemtest: {WORKER_ARGUMENT} is for the runner's own use");
            return ExitCode::from(USAGE);
        };
        if carry_out(&job, &all, open, &mut out).is_err() {
            // Nobody listens any more.
            break;
        }
    }
    ExitCode::from(GOOD)
}

fn carry_out(job: &Job, all: &[Claim], open: Opener, out: &mut impl Write) -> io::Result<()> {
    let mut failures = 0;
    let spec = job.machine.parse::<MachineSpec>();
    for &index in &job.claims {
        say(out, &Said::Begin(index))?;
        let finding = match (&spec, all.get(index)) {
            (Ok(spec), Some(claim)) => find(claim, spec, open),
            (Err(error), _) => Finding::Failed { message: error.to_string() },
            (_, None) => Finding::Failed { message: format!("there is no claim number {index}") },
        };
        failures += usize::from(finding.is_failure());
        say(out, &Said::End(index, finding))?;
        if failures >= job.stop_after {
            break;
        }
    }
    say(out, &Said::Done)
}

fn say(out: &mut impl Write, said: &Said) -> io::Result<()> {
    let mut line = serde_json::to_vec(said)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

fn find(claim: &Claim, spec: &MachineSpec, open: Opener) -> Finding {
    let first_line = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    let tried = catch_unwind(AssertUnwindSafe(|| {
        let machine = open(spec)?;
        let notes = RefCell::new(Vec::new());
        // Closing the machine is part of the claim.
        run(claim, &Context::new(machine.as_ref(), &claim.name, SEED.of_test(&claim.name), &notes))
    }));
    match tried {
        Ok(Ok(())) => Finding::Held,
        Ok(Err(Stop::Skip { .. })) => Finding::Skipped,
        Ok(Err(Stop::Fail(failure))) => Finding::Failed { message: first_line(&failure.message) },
        Err(payload) => Finding::Panicked { message: first_line(&panic_text(payload.as_ref())) },
    }
}
