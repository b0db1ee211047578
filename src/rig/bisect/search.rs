//! Finds where the verdict changes in a list, when some of it cannot be judged.

use super::Verdict;

/// What a search came to. Positions are indices of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The last one with the verdict of the first, and right after it the first one with the other verdict.
    Change {
        /// The last one before the change.
        before: usize,
        /// The first one after it.
        after: usize,
    },
    /// The change is between these; the ones between them cannot be judged.
    Among {
        /// The last one known to be before the change.
        before: usize,
        /// The first one known to be after it.
        after: usize,
    },
    /// This end of the list cannot be judged.
    EndCannotTell(usize),
    /// Both ends have this verdict.
    Same(Verdict),
}

/// Searches positions 0 to `count` - 1: both ends first, because a bisection between ends that do not differ finds
/// nonsense; then halves, going around what cannot be judged. Either end may be the good one.
///
/// # Errors
/// What `judge` returns.
pub fn change<E>(count: usize, mut judge: impl FnMut(usize) -> Result<Verdict, E>) -> Result<Found, E> {
    let (mut before, mut after) = (0, count - 1);
    let mut of_end = |end| judge(end).map(|verdict| (end, verdict));
    let ends = [of_end(before)?, of_end(after)?];
    if let Some(&(end, _)) = ends.iter().find(|(_, verdict)| *verdict == Verdict::CannotTell) {
        return Ok(Found::EndCannotTell(end));
    }
    let [(_, first), (_, last)] = ends;
    if first == last {
        return Ok(Found::Same(first));
    }
    let mut untold = vec![false; count];
    while let Some(middle) = nearest_to_middle(before, after, &untold) {
        match judge(middle)? {
            Verdict::CannotTell => untold[middle] = true,
            verdict if verdict == first => before = middle,
            _ => after = middle,
        }
    }
    Ok(match after - before {
        1 => Found::Change { before, after },
        _ => Found::Among { before, after },
    })
}

/// The position between `before` and `after` nearest to their middle that has not refused to be judged.
fn nearest_to_middle(before: usize, after: usize, untold: &[bool]) -> Option<usize> {
    let middle = before + (after - before) / 2;
    (before + 1..after).filter(|&position| !untold[position]).min_by_key(|position| position.abs_diff(middle))
}

#[cfg(test)]
mod tests {
    use super::Verdict::{Bad, CannotTell, Good};
    use super::*;

    fn search(list: &[Verdict]) -> (Found, usize) {
        let mut asked = 0;
        let found = change::<()>(list.len(), |position| {
            asked += 1;
            Ok(list[position])
        });
        (found.unwrap(), asked)
    }

    #[test]
    fn every_change_is_found_in_logarithmically_many_steps() {
        for [old, new] in [[Good, Bad], [Bad, Good]] {
            for after in 1..64 {
                let list: Vec<Verdict> = (0..64).map(|position| if position < after { old } else { new }).collect();
                let (found, asked) = search(&list);
                assert_eq!(found, Found::Change { before: after - 1, after });
                assert!(asked <= 2 + 6, "{asked}");
            }
        }
    }

    #[test]
    fn what_cannot_be_judged_is_gone_around() {
        assert_eq!(search(&[Good, Good, CannotTell, CannotTell, Bad, Bad]).0, Found::Among { before: 1, after: 4 });
        assert_eq!(search(&[Bad, CannotTell, Bad, Good, Good]).0, Found::Change { before: 2, after: 3 });
        assert_eq!(search(&[Good, CannotTell, Bad]).0, Found::Among { before: 0, after: 2 });
    }

    #[test]
    fn ends_that_do_not_differ_stop_the_search() {
        assert_eq!(search(&[Bad, Good, Bad]), (Found::Same(Bad), 2));
        assert_eq!(search(&[Good, Good]).0, Found::Same(Good));
        assert_eq!(search(&[Good, CannotTell]).0, Found::EndCannotTell(1));
        assert_eq!(search(&[CannotTell, Bad]).0, Found::EndCannotTell(0));
    }
}
