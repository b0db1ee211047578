//! What a result was obtained on, as far as it can be told without privileges.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Taint;

/// The kernel and the hardware that results were obtained on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// `uname -r`.
    pub kernel_release: String,
    /// `uname -v`.
    pub kernel_version: String,
    /// `uname -m`.
    pub architecture: String,
    /// `/proc/cmdline`.
    pub command_line: String,
    /// `/proc/sys/kernel/random/boot_id`: tells two boots of one kernel apart.
    pub boot_id: String,
    /// `/proc/config.gz`, where the kernel has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<KernelConfig>,
    /// Parameters of the KVM modules by module; only those that are loaded or built in.
    pub module_parameters: BTreeMap<String, ModuleParameters>,
    /// `model name` of the first CPU.
    pub cpu_model: String,
    /// `microcode` of the first CPU.
    pub microcode: String,
    /// CPUs that are online.
    pub cpus: u64,
    /// `MemTotal`, bytes.
    pub memory_bytes: u64,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub transparent_huge_pages: String,
    /// `/proc/sys/kernel/tainted` when the run started.
    pub taint: u64,
    /// Lines of the kernel log about the TDX module, where the log can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tdx_module: Vec<String>,
}

/// Values of the parameters of a module by name.
pub type ModuleParameters = BTreeMap<String, String>;

/// The kernel's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelConfig {
    /// SHA-256 of the uncompressed text, hexadecimal.
    pub sha256: String,
    /// The options that results depend on, `n` for those that are not set.
    pub options: BTreeMap<String, String>,
}

/// The options that results depend on.
const OPTIONS: &[&str] = &[
    "KVM",
    "KVM_INTEL",
    "KVM_AMD",
    "KVM_GUEST_MEMFD",
    "KVM_PRIVATE_MEM",
    "KVM_SW_PROTECTED_VM",
    "KVM_GENERIC_MEMORY_ATTRIBUTES",
    "KVM_INTEL_TDX",
    "INTEL_TDX_HOST",
    "KVM_AMD_SEV",
    "CACHESTAT_SYSCALL",
    "USERFAULTFD",
    "TRANSPARENT_HUGEPAGE",
    "MEMORY_FAILURE",
    "PROC_PAGE_MONITOR",
    "PROC_KCORE",
    "MEMCG",
    "NUMA",
    "GUP_TEST",
    "DEBUG_VM",
    "DEBUG_PAGE_REF",
    "PROVE_LOCKING",
    "KASAN",
    "KCSAN",
    "UBSAN",
    "FAULT_INJECTION",
    "FAIL_PAGE_ALLOC",
    "FAIL_FUNCTION",
    "PREEMPT",
    "PREEMPT_DYNAMIC",
];

impl Environment {
    /// Reads it. What cannot be read is empty.
    pub fn read() -> Environment {
        let uname = nix::sys::utsname::uname().ok();
        let field =
            |field: &dyn Fn(&nix::sys::utsname::UtsName) -> String| uname.as_ref().map(field).unwrap_or_default();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Environment {
            kernel_release: field(&|name| name.release().to_string_lossy().into_owned()),
            kernel_version: field(&|name| name.version().to_string_lossy().into_owned()),
            architecture: field(&|name| name.machine().to_string_lossy().into_owned()),
            command_line: line("/proc/cmdline"),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            config: KernelConfig::read(),
            module_parameters: module_parameters(),
            cpu_model: value_of(&cpuinfo, "model name"),
            microcode: value_of(&cpuinfo, "microcode"),
            cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count() as u64,
            memory_bytes: memory_bytes(),
            transparent_huge_pages: line("/sys/kernel/mm/transparent_hugepage/enabled"),
            taint: Taint::now().unwrap_or_default().0,
            tdx_module: tdx_module_lines(),
        }
    }
}

impl KernelConfig {
    /// Reads `/proc/config.gz`; `None` when the kernel has none (CONFIG_IKCONFIG_PROC).
    fn read() -> Option<KernelConfig> {
        let mut text = String::new();
        flate2::read::GzDecoder::new(fs::File::open("/proc/config.gz").ok()?).read_to_string(&mut text).ok()?;
        Some(KernelConfig::parse(&text))
    }

    fn parse(text: &str) -> KernelConfig {
        let set: BTreeMap<&str, &str> =
            text.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('=')).collect();
        let options =
            OPTIONS.iter().map(|name| (name.to_string(), set.get(name).unwrap_or(&"n").to_string())).collect();
        let sha256 = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        KernelConfig { sha256, options }
    }
}

fn line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim_end().to_owned()
}

fn value_of(cpuinfo: &str, key: &str) -> String {
    let pairs = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    pairs.into_iter().find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// Parameters of `kvm` and of everything that calls itself after it: `kvm_intel`, `kvm_amd`, and out-of-tree kinds.
fn module_parameters() -> BTreeMap<String, ModuleParameters> {
    let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let names = modules.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name == "kvm" || name.starts_with("kvm_"))
        .filter_map(|name| parameters(&name).map(|set| (name, set)))
        .collect()
}

fn parameters(module: &str) -> Option<ModuleParameters> {
    let entries = fs::read_dir(format!("/sys/module/{module}/parameters")).ok()?;
    let read = entries.flatten().map(|entry| {
        let value = fs::read_to_string(entry.path()).unwrap_or_default().trim_end().to_owned();
        (entry.file_name().to_string_lossy().into_owned(), value)
    });
    Some(read.collect())
}

fn memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// What the kernel said at boot about the TDX module: its version, or why it is not used.
fn tdx_module_lines() -> Vec<String> {
    let mut log = vec![0; 1 << 20];
    // SAFETY: the kernel writes at most the given length into the buffer (SYSLOG_ACTION_READ_ALL, 3).
    let count = unsafe { libc::klogctl(3, log.as_mut_ptr().cast(), log.len() as i32) };
    log.truncate(usize::try_from(count).unwrap_or(0));
    String::from_utf8_lossy(&log)
        .lines()
        .filter(|line| line.contains("virt/tdx:"))
        .map(str::to_owned)
        .take(16)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_are_not_set_are_said_to_be_n() {
        let config = KernelConfig::parse("CONFIG_KVM=y\n# CONFIG_KVM_SW_PROTECTED_VM is not set\nCONFIG_NUMA=y\n");
        assert_eq!(config.options["KVM"], "y");
        assert_eq!(config.options["KVM_SW_PROTECTED_VM"], "n");
        assert_eq!(config.sha256.len(), 64);
        assert_eq!(
            KernelConfig::parse("abc").sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn the_running_kernel_has_a_release_and_a_boot() {
        let environment = Environment::read();
        assert!(environment.kernel_release.contains('.'), "{environment:?}");
        assert_eq!(environment.boot_id.len(), 36);
        assert!(environment.cpus > 0 && environment.memory_bytes > 0);
    }
}
