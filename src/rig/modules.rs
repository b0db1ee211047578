//! The modules that a kernel needs before its KVM can be tested, out of the directory that `make modules_install` or a
//! package made: `lib/modules/RELEASE`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

use super::decompress::decompress;
use super::task::ModuleFile;

/// What the rig loads where the kernel has it as a module, in this order: the result port first, so that everything
/// after it can be reported.
const WANTED: [(&str, Option<&str>); 5] = [
    ("virtio_pci", None),
    ("virtio_console", None),
    ("kvm_amd", Some("svm")),
    ("kvm_intel", Some("vmx")),
    ("hwpoison_inject", None),
];

/// A module ready for the initramfs.
#[derive(Debug)]
pub struct Module {
    /// What the init has to know about it.
    pub file: ModuleFile,
    /// The unpacked ELF file: in-kernel decompression is a config option, and slow under TCG.
    pub bytes: Vec<u8>,
}

/// Reads the modules of `release` that the rig wants, with what they depend on, in loading order. `directory` is
/// `lib/modules/RELEASE`, or a root that has it.
pub fn collect(directory: &Path, release: &str) -> Result<Vec<Module>> {
    let directory = find(directory, release)?;
    let tree = Tree::read(&directory)?;
    let mut modules = Vec::new();
    let mut seen = BTreeSet::new();
    for (name, cpu_flag) in WANTED {
        tree.add(name, cpu_flag, &mut seen, &mut modules)?;
    }
    Ok(modules)
}

/// The modules that lie where packages put them beside a kernel: the directory that `lib/modules/RELEASE/vmlinuz` is in, or
/// `lib/modules/RELEASE` beside `boot/vmlinuz-RELEASE`.
pub fn beside(kernel: &Path, release: &str) -> Option<PathBuf> {
    let directory = kernel.parent()?;
    let root = directory.parent()?;
    let in_packages = || [root.join("usr/lib/modules").join(release), root.join("lib/modules").join(release)];
    let candidates = match directory.file_name()?.to_str()? {
        "boot" => in_packages().into(),
        name if name == release => vec![directory.to_owned()],
        _ => Vec::new(),
    };
    candidates.into_iter().find(|path| path.join("kernel").is_dir())
}

/// The directory itself, or the one for this release below it.
fn find(directory: &Path, release: &str) -> Result<PathBuf> {
    if !directory.is_dir() {
        bail!("--modules {}: is not a directory", directory.display());
    }
    let candidates = [
        directory.to_owned(),
        directory.join(release),
        directory.join("lib/modules").join(release),
        directory.join("usr/lib/modules").join(release),
    ];
    let Some(found) = candidates.into_iter().find(|path| path.join("kernel").is_dir()) else {
        bail!("--modules {}: has no modules of {release} (expected lib/modules/{release})", directory.display());
    };
    let canonical = found.canonicalize().unwrap_or_else(|_| found.clone());
    match canonical.file_name().and_then(|name| name.to_str()) {
        Some(name) if name != release && name.starts_with(|first: char| first.is_ascii_digit()) => {
            bail!("--modules {}: are modules of {name}, the kernel is {release}", directory.display())
        }
        _ => Ok(found),
    }
}

/// The modules of a directory by name.
struct Tree {
    directory: PathBuf,
    /// Path below the directory.
    paths: BTreeMap<String, String>,
    /// What each one depends on, in loading order; empty when there is no modules.dep.
    dependencies: Option<BTreeMap<String, Vec<String>>>,
}

impl Tree {
    fn read(directory: &Path) -> Result<Tree> {
        let mut tree = Tree { directory: directory.to_owned(), paths: BTreeMap::new(), dependencies: None };
        match fs::read_to_string(directory.join("modules.dep")) {
            Ok(text) => tree.read_dependencies(&text),
            // Unpacked packages have none: depmod runs when they are installed. The modules themselves name what they need.
            Err(_) => tree.walk("kernel")?,
        }
        Ok(tree)
    }

    /// modules.dep: `path: dependency dependency ..`, the one to be loaded first at the end.
    fn read_dependencies(&mut self, text: &str) {
        let mut dependencies = BTreeMap::new();
        for (path, rest) in text.lines().filter_map(|line| line.split_once(':')) {
            self.paths.insert(module_name(path), path.to_owned());
            dependencies.insert(module_name(path), rest.split_whitespace().rev().map(module_name).collect());
        }
        self.dependencies = Some(dependencies);
    }

    fn walk(&mut self, below: &str) -> Result<()> {
        let directory = self.directory.join(below);
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = format!("{below}/{name}");
            if entry.file_type()?.is_dir() {
                self.walk(&path)?;
            } else if name.contains(".ko") {
                self.paths.insert(module_name(&name), path);
            }
        }
        Ok(())
    }

    fn add(
        &self,
        name: &str,
        cpu_flag: Option<&str>,
        seen: &mut BTreeSet<String>,
        modules: &mut Vec<Module>,
    ) -> Result<()> {
        // Without a file it is built in, or not there at all; the init will see which.
        let Some(path) = self.paths.get(name) else { return Ok(()) };
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.directory.join(path);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        let bytes = decompress(&bytes).unwrap_or(Ok(bytes)).with_context(|| path.display().to_string())?;
        let dependencies = match &self.dependencies {
            Some(dependencies) => dependencies.get(name).cloned().unwrap_or_default(),
            None => own_dependencies(&bytes).with_context(|| format!("{}: is not a module", path.display()))?,
        };
        for dependency in dependencies {
            self.add(&dependency, cpu_flag, seen, modules)?;
        }
        modules
            .push(Module { file: ModuleFile { name: name.to_owned(), cpu_flag: cpu_flag.map(str::to_owned) }, bytes });
        Ok(())
    }
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is `kvm_amd`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The `depends=` of the module's `.modinfo` section.
fn own_dependencies(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let info = file.section_by_name(".modinfo").context("no .modinfo section")?.data()?;
    let depends = info.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(depends.unwrap_or_default()).into_owned();
    Ok(names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the named files, all of the same content, and a modules.dep.
    fn tree(files: &[&str], dependencies: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("lib/modules/7.3.4");
        for file in files {
            let path = directory.join("kernel").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        fs::write(directory.join("modules.dep"), dependencies).unwrap();
        root
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.file.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let root = tree(
            &["kvm.ko", "kvm-amd.ko", "ccp.ko", "irqbypass.ko", "rng-core.ko", "kvm-intel.ko"],
            "kernel/kvm.ko: kernel/irqbypass.ko\n\
             kernel/kvm-amd.ko: kernel/kvm.ko kernel/irqbypass.ko kernel/ccp.ko kernel/rng-core.ko\n\
             kernel/kvm-intel.ko: kernel/kvm.ko kernel/irqbypass.ko\n\
             kernel/ccp.ko: kernel/rng-core.ko\nkernel/irqbypass.ko:\nkernel/rng-core.ko:\n",
        );
        let modules = collect(root.path(), "7.3.4").unwrap();
        assert_eq!(names(&modules), ["rng_core", "ccp", "irqbypass", "kvm", "kvm_amd", "kvm_intel"]);
        assert_eq!(modules[4].file.cpu_flag.as_deref(), Some("svm"));
        assert_eq!(modules[5].bytes, b"kvm-intel.ko");
    }

    #[test]
    fn modules_of_another_release_are_refused() {
        let root = tree(&["kvm.ko"], "kernel/kvm.ko:\n");
        let error = collect(&root.path().join("lib/modules/7.3.4"), "7.4.0").unwrap_err().to_string();
        assert!(error.ends_with("are modules of 7.3.4, the kernel is 7.4.0"), "{error}");
        let error = collect(root.path(), "7.4.0").unwrap_err().to_string();
        assert!(error.contains("has no modules of 7.4.0"), "{error}");
        let error = collect(Path::new("/nonexistent"), "7.4.0").unwrap_err().to_string();
        assert!(error.contains("is not a directory"), "{error}");
    }

    #[test]
    fn modules_are_found_where_packages_put_them() {
        let root = tree(&["kvm.ko"], "kernel/kvm.ko:\n");
        let modules = root.path().join("lib/modules/7.3.4");
        assert_eq!(beside(&root.path().join("boot/vmlinuz-7.3.4"), "7.3.4"), Some(modules.clone()));
        assert_eq!(beside(&modules.join("vmlinuz"), "7.3.4"), Some(modules.clone()));
        assert_eq!(beside(&root.path().join("bzImage"), "7.3.4"), None);
        assert_eq!(beside(&root.path().join("boot/vmlinuz-7.4.0"), "7.4.0"), None);
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        assert_eq!(module_name("kernel/arch/x86/kvm/kvm-amd.ko.zst"), "kvm_amd");
        assert_eq!(module_name("virtio_console.ko"), "virtio_console");
    }
}
