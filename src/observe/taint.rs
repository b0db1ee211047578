//! The taint of the running kernel, `/proc/sys/kernel/tainted`.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The bits of `/proc/sys/kernel/tainted`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taint(pub u64);

/// One bit of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaintFlag {
    /// Bit number.
    pub bit: u32,
    /// The letter in an oops.
    pub letter: char,
    /// What it means.
    pub meaning: &'static str,
}

/// Documentation/admin-guide/tainted-kernels.rst, in bit order.
const FLAGS: &[(char, &str)] = &[
    ('P', "proprietary module was loaded"),
    ('F', "module was force loaded"),
    ('S', "kernel running on an out of specification system"),
    ('R', "module was force unloaded"),
    ('M', "processor reported a machine check exception"),
    ('B', "bad page referenced or some unexpected page flags"),
    ('U', "taint requested by userspace application"),
    ('D', "kernel died recently, there was an oops or bug"),
    ('A', "ACPI table overridden by user"),
    ('W', "kernel issued warning"),
    ('C', "staging driver was loaded"),
    ('I', "workaround for bug in platform firmware applied"),
    ('O', "externally-built module was loaded"),
    ('E', "unsigned module was loaded"),
    ('L', "soft lockup occurred"),
    ('K', "kernel has been live patched"),
    ('X', "auxiliary taint, defined for and used by distros"),
    ('T', "kernel was built with the struct randomization plugin"),
    ('N', "an in-kernel test has been run"),
    ('J', "userspace used a mutating debug operation in fwctl"),
];

/// Bits that say that the kernel is damaged, so that further results of this boot mean little: M, B, D, W, L.
const DAMAGE: u64 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 9 | 1 << 14;

/// `/proc/sys/kernel/tainted`, to be read often.
#[derive(Debug)]
pub struct TaintFile(File);

impl TaintFile {
    /// Opens it.
    ///
    /// # Errors
    /// What open(2) returns.
    pub fn open() -> io::Result<TaintFile> {
        File::open("/proc/sys/kernel/tainted").map(TaintFile)
    }

    /// The taint now.
    ///
    /// # Errors
    /// What pread(2) returns, and `InvalidData` when there is no number.
    pub fn now(&self) -> io::Result<Taint> {
        let mut buffer = [0; 32];
        let count = self.0.read_at(&mut buffer, 0)?;
        let number = std::str::from_utf8(&buffer[..count]).ok().and_then(|text| text.trim().parse().ok());
        number.map(Taint).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl Taint {
    /// The taint now.
    ///
    /// # Errors
    /// What reading the file gives, and `InvalidData` when it is not a number.
    pub fn now() -> io::Result<Taint> {
        TaintFile::open()?.now()
    }

    /// The bits that are set here and were not set in `earlier`.
    pub fn since(self, earlier: Taint) -> Taint {
        Taint(self.0 & !earlier.0)
    }

    /// The bits that say that the kernel is damaged.
    pub fn damage(self) -> Taint {
        Taint(self.0 & DAMAGE)
    }

    /// Whether no bit is set.
    pub fn is_clean(self) -> bool {
        self.0 == 0
    }

    /// The bits that are set.
    pub fn flags(self) -> Vec<TaintFlag> {
        let set = (0..u64::BITS).filter(|bit| self.0 >> bit & 1 == 1);
        set.map(|bit| match FLAGS.get(bit as usize) {
            Some(&(letter, meaning)) => TaintFlag { bit, letter, meaning },
            None => TaintFlag { bit, letter: '?', meaning: "a bit newer than this program" },
        })
        .collect()
    }
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        for (index, flag) in self.flags().into_iter().enumerate() {
            write!(f, "{}{}: {}", if index == 0 { " (" } else { ", " }, flag.letter, flag.meaning)?;
        }
        if self.is_clean() { Ok(()) } else { f.write_str(")") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_named_as_the_kernel_documents_them() {
        let letters: String = Taint(512 | 128 | 32).flags().iter().map(|flag| flag.letter).collect();
        assert_eq!(letters, "BDW");
        assert_eq!(Taint(512).to_string(), "512 (W: kernel issued warning)");
        assert_eq!(Taint(0).to_string(), "0");
    }

    #[test]
    fn a_loaded_module_is_no_damage_and_a_warning_is() {
        assert!(Taint(1 | 1 << 12 | 1 << 13).damage().is_clean());
        assert_eq!(Taint(1 << 9 | 1).damage(), Taint(1 << 9));
        assert_eq!(Taint(0b11).since(Taint(0b01)), Taint(0b10));
    }
}
