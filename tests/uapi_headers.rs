//! Every number, size and offset of `gmemtest::uapi`, compared with the kernel's own headers by a C compiler.
//!
//! The headers are those in GMEMTEST_UAPI_HEADERS (a directory such as `DIR/usr/include`, see
//! `scripts/fetch-uapi-headers`), else those that the compiler finds. What they are too old to have is printed and left
//! out; with GMEMTEST_STRICT=1 that, and a missing compiler, is a failure.

use gmemtest::uapi::bindings as b;
use gmemtest::uapi::{kvm, kvm_para, kvm_x86, magic};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::{Command, Stdio};

/// One value: the C expression, the macro without which the header is too old for it, and what Rust says.
struct Item {
    expression: &'static str,
    since: &'static str,
    value: u64,
}

/// Items of one kind: macros of a module, enumerators of a module, or a structure with its fields.
macro_rules! items {
    (macros $module:ident { $($name:ident)* }) => {
        vec![$(Item { expression: stringify!($name), since: stringify!($name), value: $module::$name as u64 }),*]
    };
    (enums $module:ident since $since:literal { $($name:ident)* }) => {
        vec![$(Item { expression: stringify!($name), since: $since, value: $module::$name as u64 }),*]
    };
    (layout $rust:ty = $c:literal since $since:literal { $($field:ident)* }) => {
        vec![
            Item { expression: concat!("sizeof(", $c, ")"), since: $since, value: size_of::<$rust>() as u64 },
            $(Item {
                expression: concat!("offsetof(", $c, ", ", stringify!($field), ")"),
                since: $since,
                value: offset_of!($rust, $field) as u64,
            }),*
        ]
    };
}

fn numbers() -> Vec<Item> {
    [
        items!(macros kvm {
            KVM_CHECK_EXTENSION KVM_CREATE_VM KVM_RUN KVM_SET_USER_MEMORY_REGION KVM_SET_USER_MEMORY_REGION2
            KVM_MEMORY_ENCRYPT_OP KVM_GET_STATS_FD KVM_SET_MEMORY_ATTRIBUTES KVM_CREATE_GUEST_MEMFD KVM_PRE_FAULT_MEMORY
            KVM_CAP_NR_MEMSLOTS KVM_CAP_MAX_VCPUS KVM_CAP_READONLY_MEM KVM_CAP_MULTI_ADDRESS_SPACE KVM_CAP_SPLIT_IRQCHIP
            KVM_CAP_EXIT_HYPERCALL KVM_CAP_BINARY_STATS_FD KVM_CAP_DISABLE_QUIRKS2 KVM_CAP_USER_MEMORY2
            KVM_CAP_MEMORY_FAULT_INFO KVM_CAP_MEMORY_ATTRIBUTES KVM_CAP_GUEST_MEMFD KVM_CAP_VM_TYPES
            KVM_CAP_PRE_FAULT_MEMORY KVM_CAP_GUEST_MEMFD_FLAGS
            KVM_MEM_LOG_DIRTY_PAGES KVM_MEM_READONLY KVM_MEM_GUEST_MEMFD
            GUEST_MEMFD_FLAG_MMAP GUEST_MEMFD_FLAG_INIT_SHARED KVM_MEMORY_ATTRIBUTE_PRIVATE KVM_MEMORY_EXIT_FLAG_PRIVATE
            KVM_EXIT_UNKNOWN KVM_EXIT_IO KVM_EXIT_HYPERCALL KVM_EXIT_HLT KVM_EXIT_MMIO KVM_EXIT_SHUTDOWN
            KVM_EXIT_FAIL_ENTRY KVM_EXIT_INTERNAL_ERROR KVM_EXIT_SYSTEM_EVENT KVM_EXIT_MEMORY_FAULT KVM_EXIT_TDX
            KVM_EXIT_IO_OUT KVM_SYSTEM_EVENT_TDX_FATAL KVM_INTERNAL_ERROR_EMULATION
        }),
        items!(macros kvm_para {
            KVM_HC_MAP_GPA_RANGE KVM_MAP_GPA_RANGE_PAGE_SZ_4K KVM_MAP_GPA_RANGE_PAGE_SZ_2M KVM_MAP_GPA_RANGE_PAGE_SZ_1G
            KVM_MAP_GPA_RANGE_ENCRYPTED KVM_MAP_GPA_RANGE_DECRYPTED KVM_EPERM KVM_ENOSYS KVM_EXIT_HYPERCALL_LONG_MODE
        }),
        items!(macros kvm_x86 {
            KVM_X86_DEFAULT_VM KVM_X86_SW_PROTECTED_VM KVM_X86_SEV_VM KVM_X86_SEV_ES_VM KVM_X86_SNP_VM KVM_X86_TDX_VM
            KVM_X86_QUIRK_SLOT_ZAP_ALL KVM_TDX_MEASURE_MEMORY_REGION
        }),
        items!(enums kvm_x86 since "KVM_EXIT_TDX" {
            KVM_TDX_CAPABILITIES KVM_TDX_INIT_VM KVM_TDX_INIT_VCPU KVM_TDX_INIT_MEM_REGION KVM_TDX_FINALIZE_VM
            KVM_TDX_GET_CPUID
        }),
        items!(macros magic { GUEST_MEMFD_MAGIC }),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn layouts() -> Vec<Item> {
    let structures = [
        items!(layout b::kvm_userspace_memory_region = "struct kvm_userspace_memory_region" since "KVM_RUN" {
            slot flags guest_phys_addr memory_size userspace_addr
        }),
        items!(layout b::kvm_userspace_memory_region2 = "struct kvm_userspace_memory_region2" since "KVM_CAP_USER_MEMORY2" {
            slot flags guest_phys_addr memory_size userspace_addr guest_memfd_offset guest_memfd pad1 pad2
        }),
        items!(layout b::kvm_create_guest_memfd = "struct kvm_create_guest_memfd" since "KVM_CAP_GUEST_MEMFD" {
            size flags reserved
        }),
        items!(layout b::kvm_memory_attributes = "struct kvm_memory_attributes" since "KVM_CAP_MEMORY_ATTRIBUTES" {
            address size attributes flags
        }),
        items!(layout b::kvm_enable_cap = "struct kvm_enable_cap" since "KVM_RUN" { cap flags args pad }),
        items!(layout b::kvm_dirty_log = "struct kvm_dirty_log" since "KVM_RUN" { slot }),
        items!(layout kvm::KvmPreFaultMemory = "struct kvm_pre_fault_memory" since "KVM_CAP_PRE_FAULT_MEMORY" {
            gpa size flags padding
        }),
        items!(layout kvm_x86::KvmTdxCmd = "struct kvm_tdx_cmd" since "KVM_EXIT_TDX" { id flags data hw_error }),
        items!(layout kvm_x86::KvmTdxCapabilities = "struct kvm_tdx_capabilities" since "KVM_EXIT_TDX" {
            supported_attrs supported_xfam kernel_tdvmcallinfo_1_r11 user_tdvmcallinfo_1_r11 kernel_tdvmcallinfo_1_r12
            user_tdvmcallinfo_1_r12 reserved cpuid
        }),
        items!(layout kvm_x86::KvmTdxInitVm = "struct kvm_tdx_init_vm" since "KVM_EXIT_TDX" {
            attributes xfam mrconfigid mrowner mrownerconfig reserved cpuid
        }),
        items!(layout kvm_x86::KvmTdxInitMemRegion = "struct kvm_tdx_init_mem_region" since "KVM_EXIT_TDX" {
            source_addr gpa nr_pages
        }),
        items!(layout kvm_x86::KvmCpuid2Head = "struct kvm_cpuid2" since "KVM_RUN" { nent padding }),
        items!(layout b::kvm_run = "struct kvm_run" since "KVM_RUN" {
            request_interrupt_window immediate_exit exit_reason flags cr8 apic_base kvm_valid_regs kvm_dirty_regs s
        }),
    ];
    let union = kvm::KVM_RUN_EXIT_OFFSET as u64;
    let leaf = union + offset_of!(kvm::KvmRunTdx, leaf) as u64;
    let exits = [
        ("offsetof(struct kvm_run, hw)", "KVM_RUN", union),
        ("offsetof(struct kvm_run, memory_fault.flags)", "KVM_EXIT_MEMORY_FAULT", union),
        ("offsetof(struct kvm_run, memory_fault.gpa)", "KVM_EXIT_MEMORY_FAULT", union + 8),
        ("offsetof(struct kvm_run, memory_fault.size)", "KVM_EXIT_MEMORY_FAULT", union + 16),
        ("offsetof(struct kvm_run, tdx.flags)", "KVM_EXIT_TDX", union),
        ("offsetof(struct kvm_run, tdx.nr)", "KVM_EXIT_TDX", union + offset_of!(kvm::KvmRunTdx, nr) as u64),
        ("offsetof(struct kvm_run, tdx.unknown.ret)", "KVM_EXIT_TDX", leaf),
        (
            "offsetof(struct kvm_run, tdx.unknown.data)",
            "KVM_EXIT_TDX",
            leaf + offset_of!(kvm::KvmRunTdxUnknown, data) as u64,
        ),
        (
            "offsetof(struct kvm_run, tdx.get_quote.gpa)",
            "KVM_EXIT_TDX",
            leaf + offset_of!(kvm::KvmRunTdxGetQuote, gpa) as u64,
        ),
        (
            "offsetof(struct kvm_run, tdx.get_quote.size)",
            "KVM_EXIT_TDX",
            leaf + offset_of!(kvm::KvmRunTdxGetQuote, size) as u64,
        ),
        (
            "offsetof(struct kvm_run, tdx.get_tdvmcall_info.leaf)",
            "KVM_EXIT_TDX",
            leaf + offset_of!(kvm::KvmRunTdxGetTdvmcallInfo, leaf) as u64,
        ),
        (
            "offsetof(struct kvm_run, tdx.get_tdvmcall_info.r14)",
            "KVM_EXIT_TDX",
            leaf + offset_of!(kvm::KvmRunTdxGetTdvmcallInfo, r14) as u64,
        ),
        (
            "offsetof(struct kvm_run, tdx.setup_event_notify.vector)",
            "KVM_EXIT_TDX",
            leaf + offset_of!(kvm::KvmRunTdxSetupEventNotify, vector) as u64,
        ),
    ]
    .map(|(expression, since, value)| Item { expression, since, value });
    structures.into_iter().flatten().chain(exits).collect()
}

/// A C program that prints each item that its headers have as `number value`.
fn program(items: &[Item]) -> String {
    let mut text = String::from(
        "#include <errno.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n\
         #include <linux/magic.h>\nint main(void)\n{\n",
    );
    for (number, item) in items.iter().enumerate() {
        let Item { expression, since, .. } = item;
        writeln!(text, "#ifdef {since}\n\tprintf(\"{number} %llu\\n\", (unsigned long long)({expression}));\n#endif")
            .expect("writing to a string");
    }
    text + "\treturn 0;\n}\n"
}

/// What the headers say, by item number; `None` without a C compiler.
fn ask_the_compiler(items: &[Item]) -> Option<BTreeMap<usize, u64>> {
    let directory = tempfile::tempdir().expect("a directory for the C program");
    let source = directory.path().join("uapi.c");
    let program_path = directory.path().join("uapi");
    std::fs::write(&source, program(items)).expect("the C program can be written");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let mut command = Command::new(&compiler);
    if let Ok(headers) = std::env::var("GMEMTEST_UAPI_HEADERS") {
        let headers = Path::new(&headers);
        assert!(headers.join("linux/kvm.h").exists(), "GMEMTEST_UAPI_HEADERS={} has no linux/kvm.h", headers.display());
        command.arg("-I").arg(headers.join("x86_64-linux-gnu")).arg("-I").arg(headers);
    }
    let compiled = match command.arg("-o").arg(&program_path).arg(&source).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => {
            println!("no C compiler ({compiler}: {error})");
            return None;
        }
    };
    assert!(compiled.status.success(), "{compiler}: {}", String::from_utf8_lossy(&compiled.stderr));
    let printed = Command::new(&program_path).output().expect("the C program runs").stdout;
    let lines = String::from_utf8(printed).expect("numbers");
    let parse = |line: &str| {
        let (number, value) = line.split_once(' ')?;
        Some((number.parse().ok()?, value.parse().ok()?))
    };
    Some(lines.lines().map(|line| parse(line).unwrap_or_else(|| panic!("bad line '{line}'"))).collect())
}

#[test]
fn numbers_sizes_and_offsets_are_the_kernels() {
    let strict = std::env::var("GMEMTEST_STRICT").is_ok_and(|value| value == "1");
    let items: Vec<Item> = numbers().into_iter().chain(layouts()).collect();
    let Some(found) = ask_the_compiler(&items) else {
        assert!(!strict, "GMEMTEST_STRICT=1 needs a C compiler");
        return;
    };
    let mut older = Vec::new();
    let mut wrong = Vec::new();
    for (number, item) in items.iter().enumerate() {
        match found.get(&number) {
            None => older.push(item.expression),
            Some(&value) if value == item.value => {}
            Some(value) => wrong.push(format!("{}: headers {value:#x}, here {:#x}", item.expression, item.value)),
        }
    }
    println!("{} of {} items compared", found.len(), items.len());
    if !older.is_empty() {
        println!("the headers are older than: {}", older.join(" "));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!strict || older.is_empty(), "GMEMTEST_STRICT=1 needs headers that have {}", older.join(" "));
}
