//! What the init is told to do, in a file of the initramfs.

use serde::{Deserialize, Serialize};

use super::accel::Accel;

/// Path of the file in the guest; its presence is what makes this program, as PID 1, the rig's init.
pub const TASK_PATH: &str = "/rig/task.json";
/// Directory of the modules in the guest.
pub const MODULE_DIR: &str = "/rig/modules";

/// What the init does once the machine is set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Duty {
    /// Runs this program with these arguments.
    Run(Vec<String>),
    /// Reads commands from the console.
    Shell,
}

/// The init's task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// What to do.
    pub duty: Duty,
    /// What the machine runs on.
    pub accel: Accel,
    /// File names below [`MODULE_DIR`], in the order in which they are loaded.
    pub modules: Vec<ModuleFile>,
}

/// One module of the initramfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFile {
    /// The module's name, with underscores.
    pub name: String,
    /// The CPU flag of /proc/cpuinfo without which it is of no use: `svm` for kvm_amd.
    pub cpu_flag: Option<String>,
}
