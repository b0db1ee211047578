//! Names of machines: `kvm:default`, `sim:tdx,kernel=7.3,policy=bug-vm`.

use std::fmt;
use std::str::FromStr;

/// Where a machine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// The KVM of the running kernel.
    Kvm,
    /// The model in this process.
    Sim,
}

/// The VM types that tests know. The numbers are the argument of KVM_CREATE_VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u64)]
pub enum VmType {
    /// KVM_X86_DEFAULT_VM: no private memory.
    Default = 0,
    /// KVM_X86_SW_PROTECTED_VM: private memory by attribute, no encryption.
    SwProtected = 1,
    /// KVM_X86_TDX_VM: a TD.
    Tdx = 5,
}

impl VmType {
    /// Every VM type, in the order in which `auto` lists them.
    pub const ALL: [VmType; 3] = [VmType::Default, VmType::SwProtected, VmType::Tdx];

    /// The name used in machine specs.
    pub fn name(self) -> &'static str {
        match self {
            VmType::Default => "default",
            VmType::SwProtected => "sw-protected",
            VmType::Tdx => "tdx",
        }
    }

    /// The argument of KVM_CREATE_VM.
    pub fn number(self) -> u64 {
        self as u64
    }

    /// Whether KVM gives this type memory that the host process cannot map (`has_private_mem`).
    pub fn has_private_memory(self) -> bool {
        self != VmType::Default
    }
}

/// A kernel release as far as behaviour depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Release {
    /// VERSION of the kernel Makefile.
    pub major: u32,
    /// PATCHLEVEL.
    pub minor: u32,
    /// SUBLEVEL; 0 when the release string has none.
    pub patch: u32,
}

impl Release {
    /// The first release of a series, `6.18` for example.
    pub const fn series(major: u32, minor: u32) -> Release {
        Release { major, minor, patch: 0 }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Release {
    type Err = SpecError;

    /// Reads the leading numbers of a release string such as `6.18.44-fc-v595` or `7.3-rc2`.
    fn from_str(text: &str) -> Result<Release, SpecError> {
        let bad = || SpecError(format!("'{text}' is not a kernel release: expected something like 6.18 or 7.3.4"));
        let number = |part: &str| {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u32>().ok()
        };
        let mut parts = text.trim().splitn(3, '.');
        let major = parts.next().and_then(number).ok_or_else(bad)?;
        let minor = parts.next().and_then(number).ok_or_else(bad)?;
        let patch = parts.next().and_then(number).unwrap_or(0);
        Ok(Release { major, minor, patch })
    }
}

/// A machine spec that could not be read; the text says what is wrong and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError(pub String);

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SpecError {}

/// A machine's name, the same in flags, results and scripts: `FAMILY:TYPE[,OPTION=VALUE]..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MachineSpec {
    /// Where the machine lives.
    pub family: Family,
    /// Its VM type.
    pub vm_type: VmType,
    /// Options in the order given; only `sim` machines have any.
    pub options: Vec<(String, String)>,
}

/// The option that stands for the simulated TDX module in a spec.
const SIMULATED_MODULE: (&str, &str) = ("module", "simulated");
/// What it is printed as.
const SIMULATED_MODULE_SUFFIX: &str = "(simulated-module)";

impl MachineSpec {
    /// The same machine, whose TDX module is the simulated one: `kvm:tdx(simulated-module)`. Results obtained on it are
    /// never shown as results of TDX hardware.
    pub fn with_simulated_module(mut self) -> MachineSpec {
        if !self.has_simulated_module() {
            self.options.push((SIMULATED_MODULE.0.to_owned(), SIMULATED_MODULE.1.to_owned()));
        }
        self
    }

    /// Whether its TDX module is the simulated one, under a real kernel.
    pub fn has_simulated_module(&self) -> bool {
        self.family == Family::Kvm && self.option(SIMULATED_MODULE.0) == Some(SIMULATED_MODULE.1)
    }

    /// A spec without options.
    pub fn new(family: Family, vm_type: VmType) -> MachineSpec {
        MachineSpec { family, vm_type, options: Vec::new() }
    }

    /// The value of an option, if it was given.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl fmt::Display for MachineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::Kvm => "kvm",
            Family::Sim => "sim",
        };
        write!(f, "{family}:{}", self.vm_type.name())?;
        if self.has_simulated_module() {
            return f.write_str(SIMULATED_MODULE_SUFFIX);
        }
        for (name, value) in &self.options {
            write!(f, ",{name}={value}")?;
        }
        Ok(())
    }
}

impl FromStr for MachineSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<MachineSpec, SpecError> {
        let known = "known machines: auto, kvm:*, kvm:default, kvm:sw-protected, kvm:tdx, sim:default, sim:sw-protected, sim:tdx";
        let unknown = || SpecError(format!("unknown machine '{text}'; {known}"));
        let mut parts = text.split(',');
        let head = parts.next().unwrap_or_default();
        let simulated = head.ends_with(SIMULATED_MODULE_SUFFIX);
        let head = head.strip_suffix(SIMULATED_MODULE_SUFFIX).unwrap_or(head);
        let (family, vm_type) = head.split_once(':').ok_or_else(unknown)?;
        let family = match family {
            "kvm" => Family::Kvm,
            "sim" => Family::Sim,
            _ => return Err(unknown()),
        };
        let vm_type = VmType::ALL.into_iter().find(|t| t.name() == vm_type).ok_or_else(unknown)?;
        if simulated && (family, vm_type) != (Family::Kvm, VmType::Tdx) {
            return Err(unknown());
        }
        let mut options: Vec<(String, String)> = Vec::new();
        for part in parts {
            let (name, value) = part
                .split_once('=')
                .filter(|(name, value)| !name.is_empty() && !value.is_empty())
                .ok_or_else(|| SpecError(format!("machine '{text}': option '{part}' is not NAME=VALUE")))?;
            if options.iter().any(|(key, _)| key == name) {
                return Err(SpecError(format!("machine '{text}': option '{name}' is given twice")));
            }
            options.push((name.to_owned(), value.to_owned()));
        }
        if family == Family::Kvm && !options.is_empty() {
            return Err(SpecError(format!(
                "machine '{text}': kvm machines take no options, the running kernel decides"
            )));
        }
        let spec = MachineSpec { family, vm_type, options };
        Ok(if simulated { spec.with_simulated_module() } else { spec })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_print_as_they_were_read() {
        for text in ["kvm:default", "kvm:sw-protected", "kvm:tdx(simulated-module)", "sim:tdx,kernel=7.3,policy=bug-vm"]
        {
            assert_eq!(text.parse::<MachineSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_specs_name_what_is_wrong() {
        for (text, part) in [
            ("kvm", "unknown machine 'kvm'"),
            ("xen:default", "unknown machine"),
            ("kvm:sev", "unknown machine"),
            ("sim:tdx,kernel", "'kernel' is not NAME=VALUE"),
            ("sim:tdx,kernel=7.3,kernel=6.18", "given twice"),
            ("kvm:tdx,kernel=7.3", "take no options"),
            ("kvm:tdx,module=simulated", "take no options"),
            ("sim:tdx(simulated-module)", "unknown machine"),
        ] {
            let error = text.parse::<MachineSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn releases_are_read_from_uname_strings() {
        assert_eq!("6.18.44-fc-v595".parse(), Ok(Release { major: 6, minor: 18, patch: 44 }));
        assert_eq!("7.3-rc2".parse(), Ok(Release::series(7, 3)));
        assert!("x.y".parse::<Release>().is_err());
        assert!(Release::series(6, 18) < Release { major: 6, minor: 18, patch: 44 });
    }
}
