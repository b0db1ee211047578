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
        const SUITES: &[&Suite] = &[$(&$name::SUITE,)*];
    };
}

selftests! {
    "../selftests/gmem_create.rs" gmem_create,
}

fn main() -> ExitCode {
    gmemtest::cli::main(SUITES)
}
