//! MRTD against a SHA-384 that shares nothing with the module, over the buffers of TDX module spec 10.3.

use gmemtest::sim::tdx_module::Leaf;
use gmemtest::sim::tdx_module::fixture::{Fixture, HOST_MEMORY, TdSpec};
use proptest::prelude::*;

/// First 64 bits of the fractional parts of the square roots of the 9th to the 16th prime (FIPS 180-4, 5.3.4).
const INITIAL: [u64; 8] = [
    0xcbbb_9d5d_c105_9ed8,
    0x629a_292a_367c_d507,
    0x9159_015a_3070_dd17,
    0x152f_ecd8_f70e_5939,
    0x6733_2667_ffc0_0b31,
    0x8eb4_4a87_6858_1511,
    0xdb0c_2e0d_64f9_8fa7,
    0x47b5_481d_befa_4fa4,
];

/// First 64 bits of the fractional parts of the cube roots of the first 80 primes (FIPS 180-4, 4.2.3).
const ROUND: [u64; 80] = [
    0x428a_2f98_d728_ae22,
    0x7137_4491_23ef_65cd,
    0xb5c0_fbcf_ec4d_3b2f,
    0xe9b5_dba5_8189_dbbc,
    0x3956_c25b_f348_b538,
    0x59f1_11f1_b605_d019,
    0x923f_82a4_af19_4f9b,
    0xab1c_5ed5_da6d_8118,
    0xd807_aa98_a303_0242,
    0x1283_5b01_4570_6fbe,
    0x2431_85be_4ee4_b28c,
    0x550c_7dc3_d5ff_b4e2,
    0x72be_5d74_f27b_896f,
    0x80de_b1fe_3b16_96b1,
    0x9bdc_06a7_25c7_1235,
    0xc19b_f174_cf69_2694,
    0xe49b_69c1_9ef1_4ad2,
    0xefbe_4786_384f_25e3,
    0x0fc1_9dc6_8b8c_d5b5,
    0x240c_a1cc_77ac_9c65,
    0x2de9_2c6f_592b_0275,
    0x4a74_84aa_6ea6_e483,
    0x5cb0_a9dc_bd41_fbd4,
    0x76f9_88da_8311_53b5,
    0x983e_5152_ee66_dfab,
    0xa831_c66d_2db4_3210,
    0xb003_27c8_98fb_213f,
    0xbf59_7fc7_beef_0ee4,
    0xc6e0_0bf3_3da8_8fc2,
    0xd5a7_9147_930a_a725,
    0x06ca_6351_e003_826f,
    0x1429_2967_0a0e_6e70,
    0x27b7_0a85_46d2_2ffc,
    0x2e1b_2138_5c26_c926,
    0x4d2c_6dfc_5ac4_2aed,
    0x5338_0d13_9d95_b3df,
    0x650a_7354_8baf_63de,
    0x766a_0abb_3c77_b2a8,
    0x81c2_c92e_47ed_aee6,
    0x9272_2c85_1482_353b,
    0xa2bf_e8a1_4cf1_0364,
    0xa81a_664b_bc42_3001,
    0xc24b_8b70_d0f8_9791,
    0xc76c_51a3_0654_be30,
    0xd192_e819_d6ef_5218,
    0xd699_0624_5565_a910,
    0xf40e_3585_5771_202a,
    0x106a_a070_32bb_d1b8,
    0x19a4_c116_b8d2_d0c8,
    0x1e37_6c08_5141_ab53,
    0x2748_774c_df8e_eb99,
    0x34b0_bcb5_e19b_48a8,
    0x391c_0cb3_c5c9_5a63,
    0x4ed8_aa4a_e341_8acb,
    0x5b9c_ca4f_7763_e373,
    0x682e_6ff3_d6b2_b8a3,
    0x748f_82ee_5def_b2fc,
    0x78a5_636f_4317_2f60,
    0x84c8_7814_a1f0_ab72,
    0x8cc7_0208_1a64_39ec,
    0x90be_fffa_2363_1e28,
    0xa450_6ceb_de82_bde9,
    0xbef9_a3f7_b2c6_7915,
    0xc671_78f2_e372_532b,
    0xca27_3ece_ea26_619c,
    0xd186_b8c7_21c0_c207,
    0xeada_7dd6_cde0_eb1e,
    0xf57d_4f7f_ee6e_d178,
    0x06f0_67aa_7217_6fba,
    0x0a63_7dc5_a2c8_98a6,
    0x113f_9804_bef9_0dae,
    0x1b71_0b35_131c_471b,
    0x28db_77f5_2304_7d84,
    0x32ca_ab7b_40c7_2493,
    0x3c9e_be0a_15c9_bebc,
    0x431d_67c4_9c10_0d4c,
    0x4cc5_d4be_cb3e_42b6,
    0x597f_299c_fc65_7e2a,
    0x5fcb_6fab_3ad6_faec,
    0x6c44_198c_4a47_5817,
];

/// SHA-384 of FIPS 180-4, written for reading.
fn sha384(message: &[u8]) -> [u8; 48] {
    let mut padded = message.to_vec();
    padded.push(0x80);
    while padded.len() % 128 != 112 {
        padded.push(0);
    }
    padded.extend((message.len() as u128 * 8).to_be_bytes());

    let mut state = INITIAL;
    for block in padded.chunks_exact(128) {
        let mut w = [0u64; 80];
        for (word, bytes) in w.iter_mut().zip(block.chunks_exact(8)) {
            *word = u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
        }
        for t in 16..80 {
            let s0 = w[t - 15].rotate_right(1) ^ w[t - 15].rotate_right(8) ^ w[t - 15] >> 7;
            let s1 = w[t - 2].rotate_right(19) ^ w[t - 2].rotate_right(61) ^ w[t - 2] >> 6;
            w[t] = w[t - 16].wrapping_add(s0).wrapping_add(w[t - 7]).wrapping_add(s1);
        }
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
        for t in 0..80 {
            let s1 = e.rotate_right(14) ^ e.rotate_right(18) ^ e.rotate_right(41);
            let choice = (e & f) ^ (!e & g);
            let t1 = h.wrapping_add(s1).wrapping_add(choice).wrapping_add(ROUND[t]).wrapping_add(w[t]);
            let s0 = a.rotate_right(28) ^ a.rotate_right(34) ^ a.rotate_right(39);
            let majority = (a & b) ^ (a & c) ^ (b & c);
            let t2 = s0.wrapping_add(majority);
            (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
        }
        for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *word = word.wrapping_add(add);
        }
    }
    let mut digest = [0; 48];
    for (bytes, word) in digest.chunks_exact_mut(8).zip(state) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    digest
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The 128 bytes hashed for a call: its name, zeros, the address at byte 16, zeros.
fn block(name: &str, gpa: u64) -> [u8; 128] {
    let mut block = [0; 128];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[16..24].copy_from_slice(&gpa.to_le_bytes());
    block
}

#[test]
fn the_digest_is_that_of_the_standard() {
    // FIPS 180-4's own example, and one of two blocks.
    assert_eq!(
        hex(&sha384(b"abc")),
        "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7"
    );
    assert_eq!(
        hex(&sha384(
            b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu"
        )),
        "09330c33f71147e83d192fc782cd1b4753111b173b3b05d22fa08086e3b0f712fcc7c71a557e2db966c3e9fa91746039"
    );
}

/// The vectors of TDX module spec 10.3, without the module: the buffers are what the specification says.
#[test]
fn the_vectors_of_the_specification_are_digests_of_the_documented_buffers() {
    let extend = |content: &dyn Fn(usize) -> u8, gpa: u64| {
        let mut message = block("MEM.PAGE.ADD", gpa).to_vec();
        for chunk in 0..16 {
            message.extend(block("MR.EXTEND", gpa + chunk * 256));
            message.extend((0..256).map(|at| content(chunk as usize * 256 + at)));
        }
        message
    };
    let add = |gpas: &[u64]| gpas.iter().flat_map(|gpa| block("MEM.PAGE.ADD", *gpa)).collect::<Vec<u8>>();
    let cases = [
        (add(&[]), "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"),
        (add(&[0]), "8f3e9a8aca6784eab874f7aa4dda5d49104a88047f1f86695ef2a88f5691a90e34aac48ce45ffa1f5a23c7d62980d570"),
        (
            add(&[0x1000]),
            "fcdabf6fdf38b87d2e3a89b1ab68c242abb261dffa70ef6f1dc2220c2752d2729cdf1be92afc2e0e4297f04e2b629552",
        ),
        (
            add(&[0, 0x1000]),
            "d88b05f52648c041e7f0321f3905ec848a2d2654cf8c2158f67bc25ecd8a1a999f5f65f5350db0f732b59cfc66d6da3b",
        ),
        (
            add(&[0x1000, 0]),
            "ccd5746e64f677a4135861ab4ea44fff8f1976b9a78eee76351e1339c6878ffb14e378c43d523aea8ea2f961bb4a4643",
        ),
        (
            extend(&|_| 0, 0),
            "236f0efa607ff8843f1855d7ef80dc3dda8fb455787a186b8787212951eab0096e3193bb26f817c2b63c21f5e10f9938",
        ),
        (
            extend(&|at| at as u8, 0xFFFF_F000),
            "cd9d793217c8e5918ad18eca449ba10dcfc5faafc19ceeae46b925d054f3b68f85127312438aeba5bc187d9dc73a20fa",
        ),
    ];
    for (message, digest) in cases {
        assert_eq!(hex(&sha384(&message)), digest);
    }
}

/// A step of a measurement.
#[derive(Clone, Debug)]
enum Step {
    /// PAGE.ADD of this page number, filled from this seed.
    Add(u64, u64),
    /// MR.EXTEND of this 256-byte chunk of this page number.
    Extend(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..6u64, any::<u64>()).prop_map(|(page, seed)| Step::Add(page, seed)),
        (0..6u64, 0..16u64).prop_map(|(page, chunk)| Step::Extend(page, chunk)),
    ]
}

/// Word `index` of a page filled from `seed`.
fn word(seed: u64, index: u64) -> u64 {
    (seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xD134_2543_DE82_EF95).rotate_left(17)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is added and extended in whatever order, MRTD is the digest of the documented buffers of the calls that succeeded.
    #[test]
    fn mrtd_is_the_digest_of_what_was_added_and_extended(steps in prop::collection::vec(step(), 0..24)) {
        const SOURCE: u64 = HOST_MEMORY;
        let mut f = Fixture::s1_with(Default::default(), TdSpec::default());
        let tdr = f.tdr;
        f.add_tables(tdr, 0, 1);
        f.build_vcpu(tdr);
        let mut content: [Option<u64>; 6] = [None; 6];
        let mut message = Vec::new();
        for step in steps {
            match step {
                Step::Add(number, seed) => {
                    for index in 0..512 {
                        f.module.host_write(SOURCE + 8 * index, word(seed, index));
                    }
                    let page = f.page();
                    let gpa = number * 4096;
                    let status = f.status(Leaf::MemPageAdd, &[("rcx", gpa), ("rdx", tdr), ("r8", page), ("r9", SOURCE)]);
                    prop_assert_eq!(status.is_zero(), content[number as usize].is_none());
                    if status.is_zero() {
                        content[number as usize] = Some(seed);
                        message.extend(block("MEM.PAGE.ADD", gpa));
                    }
                }
                Step::Extend(number, chunk) => {
                    let gpa = number * 4096 + chunk * 256;
                    let status = f.status(Leaf::MrExtend, &[("rcx", gpa), ("rdx", tdr)]);
                    prop_assert_eq!(status.is_zero(), content[number as usize].is_some());
                    if let Some(seed) = content[number as usize] {
                        message.extend(block("MR.EXTEND", gpa));
                        message.extend((0..32).flat_map(|at| word(seed, chunk * 32 + at).to_le_bytes()));
                    }
                }
            }
        }
        f.must(Leaf::MrFinalize, &[("rcx", tdr)]);
        let mrtd = f.module.td(tdr).expect("it exists").mrtd;
        prop_assert_eq!(hex(&mrtd), hex(&sha384(&message)));
    }
}
