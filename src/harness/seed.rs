//! Seeds and the generator they feed. Both are written out here, not taken from a crate, because a seed printed by a
//! failure must give the same numbers years later.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The seed of a run, printed first and accepted by `--seed`; each test derives its own from it and its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Seed(pub u64);

impl Seed {
    /// A fresh seed from the kernel's random number generator.
    ///
    /// # Errors
    /// What getrandom(2) returns.
    pub fn fresh() -> std::io::Result<Seed> {
        let mut bytes = [0u8; 8];
        // SAFETY: the pointer and the length describe `bytes`, which the kernel fills and nothing else reads meanwhile.
        let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if filled == bytes.len() as isize {
            Ok(Seed(u64::from_le_bytes(bytes)))
        } else {
            Err(std::io::Error::last_os_error())
        }
    }

    /// The seed of the round `round` of a repeated run; round 0 is the seed itself, so that the seed of any round can
    /// be given to `--seed` to get that round first.
    pub fn of_round(self, round: u64) -> Seed {
        if round == 0 { self } else { Seed(splitmix64(&mut (self.0 ^ round.wrapping_mul(0xD6E8_FEB8_6659_FD93)))) }
    }

    /// The seed of one test: depends on the seed and the test's name, not on the machine nor on the order of the run.
    pub fn of_test(self, name: &str) -> Seed {
        // FNV-1a, 64 bits.
        let hash = name
            .bytes()
            .fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3));
        Seed(splitmix64(&mut (self.0 ^ hash)))
    }

    /// A generator that starts at this seed.
    pub fn rng(self) -> Rng {
        Rng::new(self.0)
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl From<Seed> for String {
    fn from(seed: Seed) -> String {
        seed.to_string()
    }
}

impl TryFrom<String> for Seed {
    type Error = String;

    fn try_from(text: String) -> Result<Seed, String> {
        text.parse()
    }
}

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Seed, String> {
        let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        parsed.map(Seed).map_err(|_| "expected a 64-bit number, decimal or 0x hexadecimal".to_string())
    }
}

/// The splitmix64 step (Steele, Lea, Flood 2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// xoshiro256** 1.0 (Blackman, Vigna 2018), seeded by splitmix64 as its authors advise.
#[derive(Debug, Clone)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// A generator whose whole sequence follows from `seed`.
    pub fn new(seed: u64) -> Rng {
        let mut mixer = seed;
        Rng { state: std::array::from_fn(|_| splitmix64(&mut mixer)) }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `bound`, each with the same likelihood.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below 0");
        // Lemire's multiplication, with the rejection that makes it exact.
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if (product as u64) >= bound.wrapping_neg() % bound {
                return (product >> 64) as u64;
            }
        }
    }

    /// A number in `range`.
    ///
    /// # Panics
    /// When the range is empty.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// One of `items`.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// True once in `n` times on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Puts `items` in a random order (Fisher, Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of splitmix64 from state 1234567, as published with its reference code.
    #[test]
    fn splitmix64_gives_its_published_sequence() {
        let mut state = 1_234_567;
        let first: Vec<u64> = (0..5).map(|_| splitmix64(&mut state)).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821
            ]
        );
    }

    /// The first outputs of xoshiro256** from the state 1, 2, 3, 4, as its reference implementations give them.
    #[test]
    fn xoshiro_gives_its_published_sequence() {
        let mut rng = Rng { state: [1, 2, 3, 4] };
        let first: Vec<u64> = (0..5).map(|_| rng.next_u64()).collect();
        assert_eq!(first, [11520, 0, 1_509_978_240, 1_215_971_899_390_074_240, 1_216_172_134_540_287_360]);
    }

    #[test]
    fn below_reaches_every_number_and_no_other() {
        let mut rng = Rng::new(7);
        let mut seen = [0u32; 6];
        for _ in 0..6000 {
            seen[rng.below(6) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| (800..1200).contains(&count)), "{seen:?}");
    }

    #[test]
    fn round_zero_is_the_seed_itself_and_later_rounds_differ() {
        let seed = Seed(0x1234);
        assert_eq!(seed.of_round(0), seed);
        assert_ne!(seed.of_round(1), seed);
        assert_ne!(seed.of_round(1), seed.of_round(2));
    }

    #[test]
    fn a_seed_is_read_back_as_it_was_printed() {
        let seed = Seed(0xDEAD_BEEF);
        assert_eq!(seed.to_string().parse::<Seed>(), Ok(seed));
        assert_eq!("17".parse::<Seed>(), Ok(Seed(17)));
        assert!("0xnone".parse::<Seed>().is_err());
    }
}
