//! Runs in a kernel under QEMU.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{Runner, Trial};
use crate::harness::Suite;
use crate::report::{Document, Json};
use crate::rig::boot_image::BootImage;
use crate::rig::ending::Ending;
use crate::rig::qemu::Hardware;
use crate::rig::replay::{Replay, Rest};
use crate::rig::session::{Guest, OnLoss, Session};
use crate::rig::stop::StopSignal;
use crate::rig::wire::Hello;

/// Console lines that are kept of a boot without a result.
const TAIL: usize = 40;

/// Boots every kernel on the same machine.
pub struct RigRunner<'a> {
    /// The machine.
    pub hardware: &'a Hardware,
    /// The limit for each boot.
    pub timeout: Duration,
    /// Every suite of this program.
    pub suites: &'a [&'static Suite],
    /// The guest's command.
    pub words: &'a dyn Fn(Option<Rest>) -> Vec<String>,
    /// A signal ends it all.
    pub stop: &'a StopSignal,
}

impl Runner for RigRunner<'_> {
    fn prepare(&mut self, _: &BootImage) -> Result<Option<Trial>> {
        Ok(None)
    }

    fn run(&mut self, image: &BootImage) -> Result<Trial> {
        let session = Session {
            image,
            modules: None,
            hardware: self.hardware,
            timeout: self.timeout,
            console: None,
            stop: Some(self.stop),
        };
        let mut text = Vec::new();
        let mut json = Json::new(&mut text);
        let mut replay = Replay::new(self.suites, Vec::new(), &mut json);
        let boots = session.run_tests(self.words, OnLoss::Stop, &mut replay, &mut Unheard)?;
        let ended = replay.finish();
        drop(json);
        match (&boots.last.ending, ended) {
            (ending @ (Ending::NotStarted(_) | Ending::Interrupted(_)), _) => match ending.hint() {
                Some(hint) => bail!("{ending}; {hint}"),
                None => bail!("{ending}"),
            },
            (_, Some(ended)) => {
                let records = Document::parse(&String::from_utf8_lossy(&text)).map(|document| document.results);
                Ok(Trial::of(ended.summary, ended.stopped.as_ref(), &records.unwrap_or_default()))
            }
            (ending, None) => Ok(Trial::none(ending.to_string(), boots.last.console.tail(TAIL))),
        }
    }
}

struct Unheard;

impl Guest for Unheard {
    fn hello(&mut self, _: &Hello) {}
    fn stderr(&mut self, _: &[u8]) {}
}
