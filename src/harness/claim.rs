//! The assertions. Each one returns from the enclosing function with a [`Stop`](super::Stop) when it does not hold;
//! nothing panics, and the message holds what was seen, what was expected, and the line.
//!
//! ```
//! use gmemtest::harness::TestResult;
//! use gmemtest::{claim, claim_eq};
//!
//! fn halves(size: u64) -> TestResult {
//!     claim!(size.is_power_of_two(), "size {size:#x} is a power of two");
//!     claim_eq!(size / 2 * 2, size, "two halves of {size:#x} make the whole");
//!     Ok(())
//! }
//! assert!(halves(4096).is_ok());
//! assert!(halves(3).is_err());
//! ```

/// Claims that a condition holds: `claim!(condition)` or `claim!(condition, "what {}", detail)`.
#[macro_export]
macro_rules! claim {
    ($condition:expr $(,)?) => {
        $crate::claim!($condition, "{}", stringify!($condition))
    };
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return ::core::result::Result::Err($crate::harness::Stop::fail(
                ::std::format!("{}\n  is false: {}", ::core::format_args!($($what)+), stringify!($condition)),
            ));
        }
    };
}

/// Claims that two values are equal: `claim_eq!(actual, expected, "what {}", detail)`. The claim says what was
/// expected in words; the values are printed below it.
#[macro_export]
macro_rules! claim_eq {
    ($actual:expr, $expected:expr $(,)?) => {
        $crate::claim_eq!($actual, $expected, "{}", stringify!($actual))
    };
    ($actual:expr, $expected:expr, $($what:tt)+) => {
        match (&$actual, &$expected) {
            (actual, expected) => {
                if !(*actual == *expected) {
                    return ::core::result::Result::Err($crate::harness::Stop::Fail(
                        $crate::harness::Failure::compared(::core::format_args!($($what)+), actual, "expected", expected),
                    ));
                }
            }
        }
    };
}

/// Claims that two values differ: `claim_ne!(actual, unwanted, "what {}", detail)`.
#[macro_export]
macro_rules! claim_ne {
    ($actual:expr, $unwanted:expr $(,)?) => {
        $crate::claim_ne!($actual, $unwanted, "{}", stringify!($actual))
    };
    ($actual:expr, $unwanted:expr, $($what:tt)+) => {
        match (&$actual, &$unwanted) {
            (actual, unwanted) => {
                if *actual == *unwanted {
                    return ::core::result::Result::Err($crate::harness::Stop::Fail(
                        $crate::harness::Failure::compared(::core::format_args!($($what)+), actual, "unwanted", unwanted),
                    ));
                }
            }
        }
    };
}

/// Claims that a value matches a pattern: `claim_matches!(actual, Ok(Exit::MemoryFault { .. }), "what {}", detail)`.
/// The pattern may carry a guard (`Some(n) if n > 3`).
#[macro_export]
macro_rules! claim_matches {
    ($actual:expr, $pattern:pat $(if $guard:expr)? $(,)?) => {
        $crate::claim_matches!($actual, $pattern $(if $guard)?, "{}", stringify!($actual))
    };
    ($actual:expr, $pattern:pat $(if $guard:expr)?, $($what:tt)+) => {
        match &$actual {
            actual => {
                if !::core::matches!(actual, $pattern $(if $guard)?) {
                    return ::core::result::Result::Err($crate::harness::Stop::Fail(
                        $crate::harness::Failure::compared(
                            ::core::format_args!($($what)+),
                            actual,
                            "expected",
                            &::core::format_args!("{}", stringify!($pattern $(if $guard)?)),
                        ),
                    ));
                }
            }
        }
    };
}

/// Claims that a call succeeds and gives its value: `let vm = claim_ok!(machine.create_vm(config), "what {}", detail)`.
/// The error has to be `Debug`, the value need not be.
#[macro_export]
macro_rules! claim_ok {
    ($result:expr $(,)?) => {
        $crate::claim_ok!($result, "{}", stringify!($result))
    };
    ($result:expr, $($what:tt)+) => {
        match $result {
            ::core::result::Result::Ok(value) => value,
            ::core::result::Result::Err(error) => {
                return ::core::result::Result::Err($crate::harness::Stop::Fail(
                    $crate::harness::Failure::compared(
                        ::core::format_args!($($what)+),
                        &::core::format_args!("Err({error:?})"),
                        "expected",
                        &::core::format_args!("Ok(_)"),
                    ),
                ));
            }
        }
    };
}

/// Claims that a call fails with a given error: `claim_err!(vm.create_guest_memfd(0, 0), Errno::EINVAL, "what")`.
/// The error has to be `Debug` and comparable, the value need not be.
#[macro_export]
macro_rules! claim_err {
    ($result:expr, $error:expr $(,)?) => {
        $crate::claim_err!($result, $error, "{}", stringify!($result))
    };
    ($result:expr, $error:expr, $($what:tt)+) => {
        match ($result, &$error) {
            (result, expected) => {
                let seen = match &result {
                    ::core::result::Result::Ok(_) => ::std::string::String::from("Ok(_)"),
                    ::core::result::Result::Err(error) if *error == *expected => ::std::string::String::new(),
                    ::core::result::Result::Err(error) => ::std::format!("Err({error:?})"),
                };
                if !seen.is_empty() {
                    return ::core::result::Result::Err($crate::harness::Stop::Fail(
                        $crate::harness::Failure::compared(
                            ::core::format_args!($($what)+),
                            &::core::format_args!("{seen}"),
                            "expected",
                            &::core::format_args!("Err({expected:?})"),
                        ),
                    ));
                }
            }
        }
    };
}

/// Ends the test as failed: `fail!("what {}", detail)`.
#[macro_export]
macro_rules! fail {
    ($($what:tt)+) => {
        return ::core::result::Result::Err($crate::harness::Stop::fail(::std::format!($($what)+)))
    };
}

/// Ends the test as skipped: `skip!(NoHardware, "what is missing {}", detail)`, with a variant of
/// [`SkipKind`](crate::machine::SkipKind).
#[macro_export]
macro_rules! skip {
    ($kind:ident, $($reason:tt)+) => {
        return ::core::result::Result::Err($crate::harness::Stop::skip(
            $crate::machine::SkipKind::$kind,
            ::std::format!($($reason)+),
        ))
    };
}
