//! Finds the first bad one in a list, when some cannot be judged.

use super::Verdict;

/// What a search came to. Positions are indices of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The first bad one, right after the last good one.
    First {
        /// The last good one.
        good: usize,
        /// The first bad one.
        bad: usize,
    },
    /// It is among these; the ones between cannot be judged.
    Among {
        /// The last good one.
        good: usize,
        /// The first one that is known to be bad.
        bad: usize,
    },
    /// The first of the list, which ought to be good, is not.
    FirstIsNotGood(Verdict),
    /// The last of the list, which ought to be bad, is not.
    LastIsNotBad(Verdict),
}

/// Searches positions 0 to `count` - 1: both ends first, because a bisection between ends that are not what they were
/// taken for finds nonsense; then halves, going around what cannot be judged.
///
/// # Errors
/// What `judge` returns.
pub fn first_bad<E>(count: usize, mut judge: impl FnMut(usize) -> Result<Verdict, E>) -> Result<Found, E> {
    match judge(0)? {
        Verdict::Good => {}
        other => return Ok(Found::FirstIsNotGood(other)),
    }
    let (mut good, mut bad) = (0, count - 1);
    match judge(bad)? {
        Verdict::Bad => {}
        other => return Ok(Found::LastIsNotBad(other)),
    }
    let mut untold = vec![false; count];
    while let Some(middle) = nearest_to_middle(good, bad, &untold) {
        match judge(middle)? {
            Verdict::Good => good = middle,
            Verdict::Bad => bad = middle,
            Verdict::CannotTell => untold[middle] = true,
        }
    }
    Ok(match bad - good {
        1 => Found::First { good, bad },
        _ => Found::Among { good, bad },
    })
}

/// The position between `good` and `bad` nearest to their middle that has not refused to be judged.
fn nearest_to_middle(good: usize, bad: usize, untold: &[bool]) -> Option<usize> {
    let middle = good + (bad - good) / 2;
    (good + 1..bad).filter(|&position| !untold[position]).min_by_key(|position| position.abs_diff(middle))
}

#[cfg(test)]
mod tests {
    use super::Verdict::{Bad, CannotTell, Good};
    use super::*;

    fn search(list: &[Verdict]) -> (Found, usize) {
        let mut asked = 0;
        let found = first_bad::<()>(list.len(), |position| {
            asked += 1;
            Ok(list[position])
        });
        (found.unwrap(), asked)
    }

    #[test]
    fn every_first_bad_one_is_found_in_logarithmically_many_steps() {
        for first in 1..64 {
            let list: Vec<Verdict> = (0..64).map(|position| if position < first { Good } else { Bad }).collect();
            let (found, asked) = search(&list);
            assert_eq!(found, Found::First { good: first - 1, bad: first });
            assert!(asked <= 2 + 6, "{asked}");
        }
    }

    #[test]
    fn what_cannot_be_judged_is_gone_around() {
        assert_eq!(search(&[Good, Good, CannotTell, CannotTell, Bad, Bad]).0, Found::Among { good: 1, bad: 4 });
        assert_eq!(search(&[Good, CannotTell, Good, Bad, Bad]).0, Found::First { good: 2, bad: 3 });
        assert_eq!(search(&[Good, CannotTell, Bad]).0, Found::Among { good: 0, bad: 2 });
    }

    #[test]
    fn ends_that_are_not_what_they_were_taken_for_stop_the_search() {
        assert_eq!(search(&[Bad, Bad]).0, Found::FirstIsNotGood(Bad));
        assert_eq!(search(&[Good, Good]).0, Found::LastIsNotBad(Good));
        assert_eq!(search(&[Good, CannotTell]).0, Found::LastIsNotBad(CannotTell));
    }
}
