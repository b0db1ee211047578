//! MRTD against the vectors of TDX module spec 10.3, and against SHA-384 over the documented buffers.

use sha2::{Digest, Sha384};

use super::super::Leaf;
use super::super::fixture::{Fixture, HOST_MEMORY};

enum Step {
    Add(u64, Fill),
    Extend(u64),
}

#[derive(Clone, Copy)]
enum Fill {
    Zero,
    Counting,
}

fn mrtd(steps: &[Step]) -> [u8; 48] {
    let mut f = Fixture::s1();
    let tdr = f.tdr;
    f.add_tables(tdr, 0, 1);
    f.add_tables(tdr, 0xFFFF_F000, 1);
    f.build_vcpu(tdr);
    for step in steps {
        match *step {
            Step::Add(gpa, fill) => {
                for at in (0..4096u64).step_by(8) {
                    let word = match fill {
                        Fill::Zero => 0,
                        Fill::Counting => u64::from_le_bytes(std::array::from_fn(|i| (at as usize + i) as u8)),
                    };
                    f.module.host_write(HOST_MEMORY + at, word);
                }
                let page = f.page();
                f.must(Leaf::MemPageAdd, &[("rcx", gpa), ("rdx", tdr), ("r8", page), ("r9", HOST_MEMORY)]);
            }
            Step::Extend(gpa) => {
                f.must(Leaf::MrExtend, &[("rcx", gpa), ("rdx", tdr)]);
            }
        }
    }
    f.must(Leaf::MrFinalize, &[("rcx", tdr)]);
    super::check(&f);
    f.module.td(tdr).unwrap().mrtd
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn whole_page(gpa: u64, fill: Fill) -> Vec<Step> {
    let extends = (0..16).map(|chunk| Step::Extend(gpa + 256 * chunk));
    [Step::Add(gpa, fill)].into_iter().chain(extends).collect()
}

#[test]
fn mrtd_matches_the_vectors_of_the_specification() {
    use Step::Add;
    let zero = Fill::Zero;
    let cases: [(&[Step], &str); 7] = [
        (&[], "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"),
        (
            &[Add(0, zero)],
            "8f3e9a8aca6784eab874f7aa4dda5d49104a88047f1f86695ef2a88f5691a90e34aac48ce45ffa1f5a23c7d62980d570",
        ),
        (
            &[Add(0x1000, zero)],
            "fcdabf6fdf38b87d2e3a89b1ab68c242abb261dffa70ef6f1dc2220c2752d2729cdf1be92afc2e0e4297f04e2b629552",
        ),
        (
            &[Add(0, zero), Add(0x1000, zero)],
            "d88b05f52648c041e7f0321f3905ec848a2d2654cf8c2158f67bc25ecd8a1a999f5f65f5350db0f732b59cfc66d6da3b",
        ),
        (
            &[Add(0x1000, zero), Add(0, zero)],
            "ccd5746e64f677a4135861ab4ea44fff8f1976b9a78eee76351e1339c6878ffb14e378c43d523aea8ea2f961bb4a4643",
        ),
        (
            &whole_page(0, zero),
            "236f0efa607ff8843f1855d7ef80dc3dda8fb455787a186b8787212951eab0096e3193bb26f817c2b63c21f5e10f9938",
        ),
        (
            &whole_page(0xFFFF_F000, Fill::Counting),
            "cd9d793217c8e5918ad18eca449ba10dcfc5faafc19ceeae46b925d054f3b68f85127312438aeba5bc187d9dc73a20fa",
        ),
    ];
    for (steps, vector) in cases {
        assert_eq!(hex(&mrtd(steps)), vector);
    }
}

#[test]
fn mrtd_is_the_sha_384_of_the_documented_buffers() {
    let mut digest = Sha384::new();
    let mut block = |name: &[u8], gpa: u64, content: &[u8]| {
        let mut buffer = vec![0; 128];
        buffer[..name.len()].copy_from_slice(name);
        buffer[16..24].copy_from_slice(&gpa.to_le_bytes());
        buffer.extend_from_slice(content);
        digest.update(&buffer);
    };
    block(b"MEM.PAGE.ADD", 0x3000, &[]);
    block(b"MR.EXTEND", 0x3100, &(0..=255).collect::<Vec<u8>>());
    block(b"MEM.PAGE.ADD", 0x7000, &[]);
    let steps = [Step::Add(0x3000, Fill::Counting), Step::Extend(0x3100), Step::Add(0x7000, Fill::Zero)];
    assert_eq!(mrtd(&steps), <[u8; 48]>::from(digest.finalize()));
}
