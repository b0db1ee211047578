//! Questions of tests in the guest about the module: a line each way (`crate::inject::protocol`).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::service::{Service, World};
use crate::inject::protocol::{Answer, CALLS, Call, Question};
use crate::machine::{Errno, ModuleFault, PAGE_SIZE, PageOwner};
use crate::sim::machine::module::{call_of, rule_of};
use crate::sim::tdx_module::fault::FaultRule;

/// Answers until the other side closes the stream.
pub fn serve(service: &Service, stream: &UnixStream) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(1..) if line.ends_with(b"\n") => {}
            _ => return,
        }
        let answer = match serde_json::from_slice(&line) {
            Ok(Question::Begin) => begin(service),
            Ok(question) => service.with(|world| answer(world, &question)).unwrap_or(Err(Errno::ENODEV)),
            Err(_) => Err(Errno::EPROTO),
        };
        let answer = answer.unwrap_or_else(|errno| Answer::Errno(errno as i32));
        let Ok(mut text) = serde_json::to_vec(&answer) else { return };
        text.push(b'\n');
        let mut stream = stream;
        if stream.write_all(&text).is_err() {
            return;
        }
    }
}

/// How long the module is to have been silent before its TDs count as given up: a VM can outlive its process by a moment.
const SILENCE: Duration = Duration::from_millis(40);
/// How long that is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// No test is there but the one that begins: faults are nobody's any more, and TDs that are left are those of which the
/// kernel could not take every page back. The module forgets them, which no host could make it do: the kernel hands out
/// their pages, and the next test would get them.
fn begin(service: &Service) -> Result<Answer, Errno> {
    let start = Instant::now();
    let mut seen = (0, Instant::now());
    loop {
        let (tds, calls) = service
            .with(|world| {
                world.module.faults_mut().clear();
                (world.module.tds().count(), world.module.trace().calls())
            })
            .ok_or(Errno::ENODEV)?;
        if calls != seen.0 {
            seen = (calls, Instant::now());
        }
        if tds == 0 || seen.1.elapsed() >= SILENCE || start.elapsed() >= PATIENCE {
            break;
        }
        thread::sleep(SILENCE / 8);
    }
    let forget = |world: &mut World| {
        let left: Vec<u64> = world.module.tds().map(|td| td.tdr_pa).collect();
        left.into_iter().filter_map(|tdr| world.module.forget_td(tdr)).sum::<usize>()
    };
    service.with(forget).map(|pages| Answer::Number(pages as u64)).ok_or(Errno::ENODEV)
}

fn answer(world: &mut World, question: &Question) -> Result<Answer, Errno> {
    let module = &mut world.module;
    Ok(match question {
        Question::AddFault(fault) => {
            let rule = rule_of(&ModuleFault::from(*fault))?;
            module.faults_mut().add(rule);
            Answer::Number(module.faults_mut().rules().len() as u64 - 1)
        }
        Question::FaultHits(fault) => {
            let rules = module.faults_mut().rules();
            Answer::Number(rules.get(*fault as usize).map(FaultRule::hits).ok_or(Errno::ENOENT)?)
        }
        Question::ClearFaults => {
            module.faults_mut().clear();
            Answer::Done
        }
        Question::Position => Answer::Number(module.trace().calls()),
        Question::CallsSince(seq) => {
            let trace = module.trace();
            let kept = trace.records().next().map_or(trace.calls(), |record| record.seq);
            if *seq < kept {
                return Err(Errno::ERANGE);
            }
            let mut found = trace.records().filter(|record| record.seq >= *seq).filter_map(call_of).map(Call::from);
            let calls: Vec<Call> = found.by_ref().take(CALLS).collect();
            Answer::Calls { calls, more: found.next().is_some() }
        }
        Question::PageOwner(frame) => {
            let info = module.page(frame.wrapping_mul(PAGE_SIZE)).ok_or(Errno::ENXIO)?;
            let page_type = info.ty as u8;
            let tdr = if page_type == 0 { 0 } else { info.owner };
            PageOwner { page_type, tdr, size: info.size }.into()
        }
        Question::Measurement(tdr) => Answer::Measurement(module.td(*tdr).ok_or(Errno::ENOENT)?.mrtd.to_vec()),
        // Answered before, without the module in hand.
        Question::Begin => Answer::Done,
        Question::Violations => Answer::Lines(module.check().iter().map(ToString::to_string).collect()),
    })
}
