//! Loads the modules of the initramfs.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use crate::rig::task::{MODULE_DIR, ModuleFile};

/// Loads what this CPU can use, in the order given, with the parameters of the kernel's command line; says what failed.
pub fn load(modules: &[ModuleFile]) -> Vec<String> {
    if modules.is_empty() {
        return Vec::new();
    }
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &String| flags.split_whitespace().any(|word| word == flag);
    let words = super::kernel_words();
    let mut complaints = Vec::new();
    for module in modules.iter().filter(|module| module.cpu_flag.as_ref().is_none_or(has)) {
        let path = format!("{MODULE_DIR}/{}.ko", module.name);
        let loaded = File::open(&path)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
            .and_then(|file| insert(&file, &parameters(&module.name, &words)));
        match loaded {
            // EEXIST: built in, or loaded by the kernel itself.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => complaints.push(format!("module {} cannot be loaded: {errno}", module.name)),
        }
        // The page cache of an initramfs is memory that the tests may want.
        let _ = fs::remove_file(&path);
    }
    complaints
}

/// `kvm_amd.npt=0` on the kernel's command line is `npt=0` for kvm_amd: modprobe does that elsewhere.
fn parameters(module: &str, words: &[String]) -> String {
    let of_module = words.iter().filter_map(|word| {
        let (name, parameter) = word.split_once('.')?;
        (name.replace('-', "_") == module).then_some(parameter)
    });
    of_module.collect::<Vec<_>>().join(" ")
}

fn insert(file: &File, parameters: &str) -> nix::Result<()> {
    let parameters = CString::new(parameters).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the descriptor is open, and the string NUL-terminated and alive, during the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_from_the_command_line() {
        let words = ["quiet", "kvm-amd.npt=0", "kvm.x=1", "kvm_amd.nested=1"].map(str::to_owned);
        assert_eq!(parameters("kvm_amd", &words), "npt=0 nested=1");
        assert_eq!(parameters("kvm", &words), "x=1");
        assert_eq!(parameters("virtio_pci", &words), "");
    }
}
