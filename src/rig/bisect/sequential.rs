//! A verdict from repeated runs: Wald's sequential probability ratio test.
//!
//! Two hypotheses: the kernel is bad, and a run of it fails with probability `failing`; or it is good, and a run fails
//! with probability `noise`. Every run moves the logarithm of the likelihood ratio; the test stops when it leaves the
//! interval that the accepted error rates give. A failure that shows every time takes one run, a rare one takes as many
//! as its rarity asks for and no more.

use std::fmt;

/// What is known of the failure, and which errors are accepted. All are probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// How often a run of a bad kernel fails.
    pub failing: f64,
    /// How often a run of a good kernel fails.
    pub noise: f64,
    /// How often a good kernel may be called bad.
    pub false_bad: f64,
    /// How often a bad kernel may be called good.
    pub false_good: f64,
}

impl Default for Rates {
    /// A failure that shows every time, and never without cause.
    fn default() -> Rates {
        Rates { failing: 1.0, noise: 0.0, false_bad: 0.01, false_good: 0.01 }
    }
}

impl Rates {
    /// Whether a test can be made of these; the error names the flag that is wrong.
    pub fn check(self) -> Result<Rates, String> {
        for (flag, rate) in [("--failure-rate", self.failing), ("--noise-rate", self.noise)] {
            if !(0.0..=1.0).contains(&rate) {
                return Err(format!("{flag} {rate}: is a probability, between 0 and 1"));
            }
        }
        for (flag, rate) in [("--false-bad", self.false_bad), ("--false-good", self.false_good)] {
            if !(rate > 0.0 && rate < 0.5) {
                return Err(format!("{flag} {rate}: an accepted error rate lies above 0 and below 0.5"));
            }
        }
        if self.noise >= self.failing {
            return Err(format!(
                "--noise-rate {} must be below --failure-rate {}: otherwise no number of runs tells good from bad",
                self.noise, self.failing
            ));
        }
        Ok(self)
    }
}

/// What the runs so far say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tendency {
    /// Good, at the accepted error rate.
    Good,
    /// Bad, at the accepted error rate.
    Bad,
    /// More runs are needed.
    Open,
}

/// The runs of one kernel.
#[derive(Clone, Copy, Debug)]
pub struct Sequential {
    rates: Rates,
    /// Logarithm of the likelihood of bad over that of good.
    ratio: f64,
    /// Runs that failed.
    pub failed: u32,
    /// Runs that did not.
    pub passed: u32,
}

impl Sequential {
    /// No run yet.
    pub fn new(rates: Rates) -> Sequential {
        Sequential { rates, ratio: 0.0, failed: 0, passed: 0 }
    }

    /// Takes a failed run.
    pub fn fail(&mut self) -> Tendency {
        self.failed += 1;
        self.step(self.rates.failing, self.rates.noise)
    }

    /// Takes a run that did not fail.
    pub fn pass(&mut self) -> Tendency {
        self.passed += 1;
        self.step(1.0 - self.rates.failing, 1.0 - self.rates.noise)
    }

    /// What the runs so far say.
    pub fn tendency(&self) -> Tendency {
        let bad_above = ((1.0 - self.rates.false_good) / self.rates.false_bad).ln();
        let good_below = (self.rates.false_good / (1.0 - self.rates.false_bad)).ln();
        match self.ratio {
            ratio if ratio >= bad_above => Tendency::Bad,
            ratio if ratio <= good_below => Tendency::Good,
            _ => Tendency::Open,
        }
    }

    /// `when_bad` and `when_good` are not both zero: `noise` is below `failing`. An impossible run decides at once.
    fn step(&mut self, when_bad: f64, when_good: f64) -> Tendency {
        self.ratio += (when_bad / when_good).ln();
        self.tendency()
    }
}

impl fmt::Display for Sequential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} runs failed", self.failed, self.failed + self.passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_that_shows_every_time_takes_one_run() {
        assert_eq!(Sequential::new(Rates::default()).fail(), Tendency::Bad);
        assert_eq!(Sequential::new(Rates::default()).pass(), Tendency::Good);
    }

    #[test]
    fn a_rare_failure_takes_as_many_passes_as_its_rarity() {
        // 0.8^n falls below 0.01 / 0.99 at n = 21.
        let mut runs = Sequential::new(Rates { failing: 0.2, ..Rates::default() });
        for _ in 0..20 {
            assert_eq!(runs.pass(), Tendency::Open);
        }
        assert_eq!(runs.pass(), Tendency::Good);
        // Without noise, a single failure proves it.
        let mut runs = Sequential::new(Rates { failing: 0.2, ..Rates::default() });
        assert_eq!(runs.pass(), Tendency::Open);
        assert_eq!(runs.fail(), Tendency::Bad);
    }

    #[test]
    fn with_noise_a_single_failure_does_not_decide() {
        let mut runs = Sequential::new(Rates { failing: 0.9, noise: 0.1, false_bad: 0.01, false_good: 0.01 });
        // Each failure multiplies the ratio by 9; 99 is passed at the third.
        assert_eq!(runs.fail(), Tendency::Open);
        assert_eq!(runs.fail(), Tendency::Open);
        assert_eq!(runs.fail(), Tendency::Bad);
        assert_eq!(runs.to_string(), "3 of 3 runs failed");
    }

    /// The error rates that were asked for are kept, whatever the kernel is: a linear congruential generator stands for it.
    #[test]
    fn the_accepted_error_rates_are_kept() {
        let rates = Rates { failing: 0.3, noise: 0.05, false_bad: 0.05, false_good: 0.05 };
        let mut state = 0x853c_49e6_748f_ea9bu64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / (1u64 << 31) as f64
        };
        for (rate, wrong) in [(rates.failing, Tendency::Good), (rates.noise, Tendency::Bad)] {
            let mut errors = 0;
            for _ in 0..2000 {
                let mut runs = Sequential::new(rates);
                let verdict = loop {
                    match if random() < rate { runs.fail() } else { runs.pass() } {
                        Tendency::Open => continue,
                        verdict => break verdict,
                    }
                };
                errors += u32::from(verdict == wrong);
            }
            // 5 % of 2000, and four standard deviations of that.
            assert!(errors < 139, "{wrong:?}: {errors} of 2000");
        }
    }

    #[test]
    fn rates_that_decide_nothing_are_refused_by_their_flag() {
        for (rates, part) in [
            (Rates { failing: 1.5, ..Rates::default() }, "--failure-rate 1.5"),
            (Rates { failing: 0.1, noise: 0.1, ..Rates::default() }, "--noise-rate 0.1 must be below"),
            (Rates { false_bad: 0.0, ..Rates::default() }, "--false-bad 0"),
            (Rates { false_good: f64::NAN, ..Rates::default() }, "--false-good NaN"),
        ] {
            let error = rates.check().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(Rates::default().check().is_ok());
    }
}
