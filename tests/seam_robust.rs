//! Whatever a script says, running it ends in a pass, a mismatch or one line of complaint: never in a panic.

use gmemtest::script::seam::{Failure, parse, run};
use proptest::prelude::*;

/// Words of the language, sensible and not, put together at random.
const WORDS: [&str; 64] = [
    "test",
    "setup",
    "page",
    "range",
    "gigapage",
    "shared",
    "td",
    "vcpu",
    "let",
    "call",
    "hold",
    "release",
    "guest",
    "enter",
    "exit",
    "interrupt",
    "lock",
    "unlock",
    "fault",
    "switch",
    "expect-invariants",
    "invariants",
    "rdmd",
    "sept",
    "look",
    "host",
    "advance",
    "repeat",
    "S1",
    "S2",
    "V",
    "p",
    "on",
    "off",
    "accept",
    "read",
    "write",
    "sept-tree",
    "exclusive",
    "shared",
    "3",
    "TDH.MEM.PAGE.AUG",
    "TDH.VP.ENTER",
    "TDH.MEM.TRACK",
    "->",
    "ok",
    "exit",
    "#VE",
    "0",
    "-1",
    ";",
    "rcx=0",
    "rdx=tdr",
    "r8=p",
    "gpa=0x0",
    "level=1",
    "by=lp1",
    "lp=lp9",
    "value=p",
    "save x=rcx",
    "rcx=(1",
    "C0000B0D|1",
    "=",
    "|",
];

/// Statements with a hole for a value.
const TEMPLATES: [&str; 52] = [
    "call TDH.MEM.PAGE.AUG rcx=@ rdx=tdr r8=q",
    "call TDH.MEM.PAGE.AUG rcx=0 rdx=@ r8=q",
    "call TDH.MEM.PAGE.AUG rcx=0 rdx=tdr r8=@",
    "call TDH.MEM.SEPT.ADD rcx=@ rdx=tdr|1 r8=q",
    "call TDH.MEM.SEPT.ADD version=@ rcx=0x40000000|2 rdx=tdr r8=q r9=@",
    "call TDH.MEM.RANGE.BLOCK rcx=@ rdx=tdr",
    "call TDH.MEM.RANGE.UNBLOCK rcx=@ rdx=tdr",
    "call TDH.MEM.PAGE.REMOVE rcx=@ rdx=tdr",
    "call TDH.MEM.PAGE.DEMOTE rcx=@ rdx=tdr r8=@",
    "call TDH.MEM.PAGE.PROMOTE rcx=@ rdx=tdr",
    "call TDH.MEM.PAGE.RELOCATE rcx=@ rdx=tdr r8=@",
    "call TDH.MEM.SEPT.REMOVE rcx=@ rdx=tdr",
    "call TDH.MEM.SEPT.RD rcx=@ rdx=tdr",
    "call TDH.MEM.RD rcx=@ rdx=tdr",
    "call TDH.MEM.TRACK rcx=@",
    "call TDH.MR.EXTEND rcx=@ rdx=tdr",
    "call TDH.MNG.CREATE rcx=@ rdx=@",
    "call TDH.MNG.INIT rcx=tdr rdx=@",
    "call TDH.MNG.RD rcx=tdr rdx=@",
    "call TDH.VP.RD rcx=V rdx=@",
    "call TDH.VP.ENTER rcx=@",
    "call TDH.VP.FLUSH rcx=@",
    "call TDH.VP.CREATE rcx=@ rdx=tdr",
    "call TDH.PHYMEM.PAGE.RDMD rcx=@",
    "call TDH.PHYMEM.PAGE.RECLAIM rcx=@",
    "call TDH.PHYMEM.PAGE.WBINVD rcx=@",
    "call TDH.PHYMEM.CACHE.WB rcx=@",
    "call TDH.PHYMEM.PAMT.ADD rcx=@ rdx=@ r8=@",
    "call TDH.PHYMEM.PAMT.REMOVE rcx=@",
    "call TDH.SYS.CONFIG rcx=@ rdx=@ r8=@",
    "call TDH.SYS.TDMR.INIT rcx=@",
    "call rax=@ rcx=tdr",
    "guest V read gpa=@",
    "guest V write gpa=@ value=@",
    "guest V accept gpa=@ level=0",
    "guest V accept gpa=0x200000 level=@",
    "guest V attr.rd gpa=@",
    "guest V attr.wr gpa=@ level=1 attr=@",
    "guest V release gpa=@ level=0",
    "guest V vmcall rcx=@ r10=@",
    "guest V tdcall 2 rcx=@ rdx=@",
    "guest @ step",
    "sept gpa=@ level=@",
    "rdmd @ level=@",
    "look line @",
    "look hkid @",
    "host write q offset=@ value=@",
    "host movdir64b q offset=@",
    "host read @ ; host zero @ ; host pattern @ ; host flush @",
    "lock pamt page=@ level=@ by=lp1",
    "lock sept-entry gpa=@ level=@ by=lp1",
    "interrupt after=@ ; fault leaf=TDH.MEM.TRACK nth=@ status=@ ; advance 18000000000s ; advance 18000000000s",
];

const VALUES: [&str; 22] = [
    "0",
    "1",
    "2",
    "4",
    "7",
    "8",
    "0x1000",
    "0x200000",
    "0x200000|1",
    "1<<46",
    "1<<47",
    "1<<51",
    "1<<52",
    "-1",
    "-8",
    "-4K",
    "tdr",
    "V",
    "q",
    "outside",
    "reserved",
    "hkid",
];

fn filled() -> impl Strategy<Value = String> {
    let values = prop::collection::vec(prop::sample::select(VALUES.to_vec()), 4);
    (prop::sample::select(TEMPLATES.to_vec()), values).prop_map(|(template, values)| {
        let mut values = values.into_iter().cycle();
        template.split('@').enumerate().fold(String::new(), |mut line, (index, part)| {
            if index > 0 {
                line.push_str(values.next().unwrap_or("0"));
            }
            line.push_str(part);
            line
        })
    })
}

fn salad() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(WORDS.to_vec()), 0..8).prop_map(|words| words.join(" "))
}

/// One line, and never a panic.
fn judged(text: &str) {
    if let Err(Failure::Script(error)) = parse("x.seam", text).map_err(Failure::Script).and_then(|script| run(&script))
    {
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn statements_with_any_value_never_panic(lines in prop::collection::vec(filled(), 1..24), fixture in prop::sample::select(vec!["S2", "S1 newer=on", "S2 dpamt=on newer=on", "built", "none"])) {
        // One at a time, so that a complaint about one does not keep the others from running.
        for line in &lines {
            judged(&format!("setup {fixture}\n{line}\n"));
        }
        let good: Vec<&String> = lines.iter().filter(|line| parse("x", &format!("setup {fixture}\n{line}")).is_ok()).collect();
        judged(&good.iter().fold(format!("setup {fixture}\n"), |text, line| text + line + "\n"));
    }

    #[test]
    fn word_salad_never_panics(lines in prop::collection::vec(salad(), 0..8)) {
        judged(&lines.join("\n"));
        judged(&format!("setup S2\npage p\n{}", lines.join("\n")));
    }

    #[test]
    fn any_text_never_panics(text in "\\PC{0,200}") {
        judged(&text);
        judged(&format!("setup S2\ncall TDH.MEM.TRACK rcx={text} -> {text}"));
    }
}

#[test]
fn endless_lines_are_refused() {
    for text in [
        format!("setup S2\nlet x={}1{}", "(".repeat(50_000), ")".repeat(50_000)),
        format!("setup S2\nlet x={}1", "-".repeat(50_000)),
        format!("setup S2\nlet x=1{}", "+1".repeat(50_000)),
        format!("setup S2\n{}call 42", "repeat 1 ".repeat(20_000)),
        format!("setup S2\ncall 42 -> {}0", "!".repeat(50_000)),
    ] {
        let error = parse("x.seam", &text).expect_err("it is too long").to_string();
        assert!(error.starts_with("x.seam:2: "), "{error}");
        assert!(error.len() < 300, "{error}");
    }
}
