//! The `gmemtest` command.

use std::process::ExitCode;

use gmemtest::harness::Suite;

/// The selftests, each of which is a binary of its own too: its `main` is of no use here.
macro_rules! selftests {
    ($($path:literal $name:ident,)*) => {
        $(
            #[path = $path]
            #[expect(dead_code, reason = "main is for the stand-alone binary")]
            mod $name;
        )*

        /// Every suite, in the order in which they are run.
        pub(crate) const SUITES: &[&Suite] = &[$(&$name::SUITE,)*];
    };
}

selftests! {
    "../selftests/gmem_create.rs" gmem_create,
    "../selftests/gmem_file.rs" gmem_file,
    "../selftests/gmem_fd.rs" gmem_fd,
    "../selftests/fallocate.rs" fallocate,
    "../selftests/gmem_mmap.rs" gmem_mmap,
    "../selftests/gmem_madvise.rs" gmem_madvise,
    "../selftests/gmem_vma.rs" gmem_vma,
    "../selftests/gmem_pages.rs" gmem_pages,
    "../selftests/gmem_numa.rs" gmem_numa,
    "../selftests/gmem_hwpoison.rs" gmem_hwpoison,
    "../selftests/binding.rs" binding,
    "../selftests/binding_lifetime.rs" binding_lifetime,
    "../selftests/guest_access.rs" guest_access,
    "../selftests/guest_exits.rs" guest_exits,
    "../selftests/memslots.rs" memslots,
    "../selftests/memslots_running.rs" memslots_running,
    "../selftests/vm_types.rs" vm_types,
    "../selftests/prefault.rs" prefault,
    "../selftests/attributes.rs" attributes,
    "../selftests/memory_fault.rs" memory_fault,
    "../selftests/conversion.rs" conversion,
    "../selftests/gmem_zap.rs" gmem_zap,
    "../selftests/huge_mappings.rs" huge_mappings,
    "../selftests/gmem_memory.rs" gmem_memory,
    "../selftests/inplace_arguments.rs" inplace_arguments,
    "../selftests/inplace_conversion.rs" inplace_conversion,
    "../selftests/huge_pages.rs" huge_pages,
    "../selftests/references.rs" references,
    "../selftests/truncation.rs" truncation,
    "../selftests/conversion_matrix.rs" conversion_matrix,
    "../selftests/races.rs" races,
    "../selftests/tdx_vm.rs" tdx_vm,
    "../selftests/tdx_vcpu.rs" tdx_vcpu,
    "../selftests/tdx_memory.rs" tdx_memory,
    "../selftests/tdx_measure.rs" tdx_measure,
    "../selftests/tdx_lifecycle.rs" tdx_lifecycle,
    "../selftests/tdx_refused.rs" tdx_refused,
    "../selftests/tdx_calls.rs" tdx_calls,
    "../selftests/tdx_guest.rs" tdx_guest,
    "../selftests/tdx_stale.rs" tdx_stale,
    "../selftests/tdx_unmap.rs" tdx_unmap,
    "../selftests/unmap_failure.rs" unmap_failure,
    "../selftests/unmap_failure_reuse.rs" unmap_failure_reuse,
    "../selftests/unmap_failure_after.rs" unmap_failure_after,
}

fn main() -> ExitCode {
    gmemtest::cli::main(SUITES)
}
