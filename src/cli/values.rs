//! Values on the command line that more than one subcommand reads.

use std::time::Duration;

use crate::machine::SkipKind;

/// No run takes longer, and sums of shorter times do not overflow.
const LONGEST: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// A duration: a number of seconds, or a number with `ms`, `s`, `m`, `h` or `d`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)];
    let (number, scale) =
        units.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale))).unwrap_or((text, 1.0));
    let expected = "expected a time above zero and below 30 years: seconds, or a number with s, m, h or d, such as 90, 30m or 1.5h";
    let seconds = number.trim().parse::<f64>().map_err(|_| expected.to_owned())? * scale;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() && duration < LONGEST => Ok(duration),
        _ => Err(expected.to_owned()),
    }
}

/// A size in bytes: a number, or a number with `K`, `M`, `G` or `T`.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let units = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let unit =
        units.iter().find_map(|&(unit, shift)| Some((text.strip_suffix([unit, unit.to_ascii_lowercase()])?, shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let size = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    size.filter(|&size| size > 0).ok_or_else(|| "expected a size above zero such as 1073741824, 512M or 2G".to_owned())
}

/// A kind of skip by its word.
pub(super) fn skip_kind(text: &str) -> Result<SkipKind, String> {
    let words: Vec<&str> = SkipKind::ALL.iter().map(|kind| kind.word()).collect();
    SkipKind::ALL
        .into_iter()
        .find(|kind| kind.word() == text)
        .ok_or_else(|| format!("expected one of {}", words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("2G"), Ok(2 << 30));
        assert_eq!(size("512m"), Ok(512 << 20));
        for bad in ["", "G", "0", "-1M", "1.5G", "99999999999T", "2GB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("30m"), Ok(Duration::from_secs(1800)));
        assert_eq!(duration("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "m", "-1", "0", "1e300d", "1e15", "nan", "3 weeks"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
