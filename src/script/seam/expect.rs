//! What stands after `->`: an outcome, then fields to compare and fields to save.

use super::error::Complaint;
use super::expr::{Expr, is_name};
use crate::sim::tdx_module::{Code, Operand, Reg};

/// An expectation.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Expectation {
    /// As written, for messages.
    pub text: String,
    /// The outcome itself; `None` when only fields are compared.
    pub head: Option<Head>,
    /// Fields of the outcome, by name.
    pub checks: Vec<Check>,
    /// Fields to keep under a name.
    pub saves: Vec<Save>,
}

/// The outcome expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// It succeeded: status zero, or whatever value.
    Ok,
    /// Anything but what follows.
    Not(Box<Head>),
    /// A status with one of bits 63:61 set.
    Error,
    /// Held half-way.
    Held,
    /// A status other than zero.
    Nonzero,
    /// The vCPU left the guest, for this reason if one is given.
    Exit(Option<Expr>),
    /// An exception in the guest or a machine check in the host.
    Exception(Exception),
    /// A status, a value, or the name of a state, whichever the statement gives.
    Value(Value),
}

/// An exception a memory access ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Exception {
    Virtualization,
    DoubleFault,
    PageFault,
    MachineCheck,
    GeneralProtection,
}

impl Exception {
    const NAMES: [(&'static str, Exception); 5] = [
        ("#VE", Exception::Virtualization),
        ("#DF", Exception::DoubleFault),
        ("#PF", Exception::PageFault),
        ("#MC", Exception::MachineCheck),
        ("#GP", Exception::GeneralProtection),
    ];

    /// `#VE` and the like.
    pub fn name(self) -> &'static str {
        Exception::NAMES.iter().find(|(_, exception)| *exception == self).map_or("", |(name, _)| name)
    }

    fn from_name(text: &str) -> Option<Exception> {
        let text = text.strip_prefix('#').unwrap_or(text);
        Exception::NAMES.iter().find(|(name, _)| name[1..].eq_ignore_ascii_case(text)).map(|(_, exception)| *exception)
    }
}

/// A value in each of the readings it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// As written.
    pub text: String,
    /// Read as a completion status.
    pub status: Option<StatusPattern>,
    /// Read as a number.
    pub number: Option<Expr>,
}

/// A completion status, whole or its upper half.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatusPattern {
    /// Bits 63:32 only; the details may be anything.
    Upper(u32),
    /// Bits 63:32 and bits 31:0.
    Both(u32, Expr),
    /// All 64 bits.
    Full(u64),
}

/// A field compared with a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name of the field, lower case: a register, or what the statement's page in the manual lists.
    pub field: String,
    /// Whether the field must equal the value or differ from it.
    pub relation: Relation,
    /// The value.
    pub value: Value,
}

/// How a field relates to the expected value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Relation {
    Equal,
    Different,
}

/// A field kept for later statements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Save {
    /// The name it gets.
    pub name: String,
    /// The field, lower case.
    pub field: String,
}

/// Names of fields that may stand before their value without `=`.
const FIELDS: [&str; 16] = [
    "type",
    "owner",
    "size",
    "bepoch",
    "state",
    "raw",
    "hpa",
    "entry",
    "info",
    "level",
    "eeq",
    "qualification",
    "counter",
    "epoch",
    "req",
    "leaf",
];

impl Expectation {
    /// Reads the text after `->`, gaps around operators closed.
    pub(crate) fn parse(text: &str) -> Result<Expectation, Complaint> {
        let mut expectation = Expectation { text: text.to_string(), ..Expectation::default() };
        for item in text.split(',') {
            let words: Vec<&str> = item.split_whitespace().collect();
            if words.is_empty() {
                return Err(Complaint::new(
                    format!("an expectation is missing beside a comma in `{text}`"),
                    "write STATUS, reg=value, reg=value",
                ));
            }
            expectation.item(&words)?;
        }
        Ok(expectation)
    }

    fn item(&mut self, words: &[&str]) -> Result<(), Complaint> {
        let mut at = 0;
        while at < words.len() {
            at += self.word(&words[at..])?;
        }
        Ok(())
    }

    /// Reads one part of an item and says how many words it took.
    fn word(&mut self, words: &[&str]) -> Result<usize, Complaint> {
        let word = words[0];
        let next = words.get(1).copied();
        if let Some((field, value)) = word.split_once("!=") {
            self.check(field, Relation::Different, value)?;
            return Ok(1);
        }
        if let Some((field, value)) = word.split_once('=') {
            match field.to_ascii_lowercase().as_str() {
                "exit" => self.head(Head::Exit(Some(reason(value)?)))?,
                "status" => self.head(Head::Value(Value::parse(value)?))?,
                _ => self.check(field, Relation::Equal, value.trim_start_matches('='))?,
            }
            return Ok(1);
        }
        match word.to_ascii_lowercase().as_str() {
            "and" | "with" => return Ok(1),
            "save" => {
                let Some((name, field)) = next.and_then(|next| next.split_once('=')) else {
                    return Err(Complaint::new(
                        "`save` needs a name and a field",
                        "write save NAME=FIELD, such as save old=rcx",
                    ));
                };
                if !is_name(name) || field.is_empty() {
                    return Err(Complaint::new(
                        format!("`{name}={field}` saves nothing"),
                        "write save NAME=FIELD, such as save old=rcx",
                    ));
                }
                self.saves.push(Save { name: name.to_string(), field: field.to_ascii_lowercase() });
                return Ok(2);
            }
            "exit" => {
                let named = next.filter(|next| !next.contains('=')).map(reason).transpose()?;
                let taken = 1 + usize::from(named.is_some());
                self.head(Head::Exit(named))?;
                return Ok(taken);
            }
            "status" => {
                let Some(next) = next else {
                    return Err(Complaint::new(
                        "`status` has no value",
                        "write status 0x8000020000000001 or only the value",
                    ));
                };
                self.head(Head::Value(Value::parse(next)?))?;
                return Ok(2);
            }
            lower if Reg::from_name(lower).is_some() || FIELDS.contains(&lower) => {
                let Some(next) = next else {
                    return Err(Complaint::new(
                        format!("`{word}` has no expected value"),
                        format!("write {word}=VALUE"),
                    ));
                };
                self.check(word, Relation::Equal, next)?;
                return Ok(2);
            }
            _ => {}
        }
        self.head(Head::parse(word)?)?;
        Ok(1)
    }

    fn head(&mut self, head: Head) -> Result<(), Complaint> {
        if self.head.is_some() {
            return Err(Complaint::new(
                format!("`{}` expects two outcomes", self.text),
                "write one status, then registers as reg=value",
            ));
        }
        self.head = Some(head);
        Ok(())
    }

    fn check(&mut self, field: &str, relation: Relation, value: &str) -> Result<(), Complaint> {
        if field.is_empty() || value.is_empty() {
            return Err(Complaint::new(
                format!("`{field}=` has no expected value"),
                "write reg=value, for example rcx=0x80000000000000F7",
            ));
        }
        let field = field.to_ascii_lowercase();
        let number = number_or_name(value)?;
        let value = Value { text: value.to_string(), status: None, number };
        self.checks.push(Check { field, relation, value });
        Ok(())
    }
}

fn number_or_name(text: &str) -> Result<Option<Expr>, Complaint> {
    match Expr::parse(text) {
        Ok(expr) => Ok(Some(expr)),
        // State names may contain a dash, MRTD is longer than a number.
        Err(_) if text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-' || c == '#') => Ok(None),
        Err(complaint) => Err(complaint),
    }
}

impl Head {
    fn parse(word: &str) -> Result<Head, Complaint> {
        if let Some(rest) = word.strip_prefix('!') {
            return Ok(Head::Not(Box::new(Head::parse(rest)?)));
        }
        if let Some(exception) = Exception::from_name(word) {
            return Ok(Head::Exception(exception));
        }
        Ok(match word.to_ascii_lowercase().as_str() {
            "ok" | "success" | "entered" | "running" => Head::Ok,
            "error" | "fail" => Head::Error,
            "nonzero" => Head::Nonzero,
            "held" => Head::Held,
            "busy" => Head::Value(Value::parse("TDX_OPERAND_BUSY")?),
            _ => Head::Value(Value::parse(word)?),
        })
    }
}

impl Value {
    fn parse(text: &str) -> Result<Value, Complaint> {
        let status = StatusPattern::parse(text)?;
        let number = if status.is_some() { Expr::parse(text).ok() } else { number_or_name(text)? };
        Ok(Value { text: text.to_string(), status, number })
    }
}

/// VMX exit reasons by name (TDX module spec 9.2).
const REASONS: [(&str, u64); 12] = [
    ("nmi", 0),
    ("exception", 0),
    ("interrupt", 1),
    ("external-interrupt", 1),
    ("triple-fault", 2),
    ("hlt", 12),
    ("mtf", 37),
    ("ept-violation", 48),
    ("ept-misconfig", 49),
    ("ept-misconfiguration", 49),
    ("tdcall", 77),
    ("vmcall", 77),
];

/// The number of the exit reason called `name`.
pub(crate) fn exit_reason(name: &str) -> Option<u64> {
    let name = name.to_ascii_lowercase().replace('_', "-");
    REASONS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

fn reason(text: &str) -> Result<Expr, Complaint> {
    match exit_reason(text) {
        Some(number) => Ok(Expr::Number(number)),
        None => Expr::parse(text),
    }
}

/// The upper half written as eight hexadecimal digits, as `C0000B0D` or `0xC0000B0D`.
fn upper_half(text: &str) -> Option<u32> {
    let plain = text.replace('_', "");
    let (digits, prefixed) = match plain.strip_prefix("0x").or_else(|| plain.strip_prefix("0X")) {
        Some(digits) => (digits, true),
        None => (plain.as_str(), false),
    };
    let upper = (digits.len() == 8).then(|| u32::from_str_radix(digits, 16).ok())??;
    (!prefixed || (upper != 0 && Code::from_upper(upper).is_some())).then_some(upper)
}

fn code(text: &str) -> Option<u32> {
    Code::ALL
        .iter()
        .find(|code| {
            let name = code.name();
            name.eq_ignore_ascii_case(text) || name.strip_prefix("TDX_").is_some_and(|n| n.eq_ignore_ascii_case(text))
        })
        .map(|code| *code as u32)
        .or_else(|| upper_half(text))
}

impl StatusPattern {
    /// Reads `0x8000020000000092`, `80000200|146`, `TDX_OPERAND_BUSY|SEPT_TREE`, `C0000B08`; `None` for what is no status.
    pub(crate) fn parse(text: &str) -> Result<Option<StatusPattern>, Complaint> {
        if let Some((left, right)) = text.split_once('|')
            && let Some(upper) = code(left)
        {
            let details = match Operand::from_name(right) {
                Some(operand) => Expr::Number(operand.0.into()),
                None => Expr::parse(right).map_err(|_| {
                    Complaint::new(
                        format!("`{right}` is neither an operand nor a number"),
                        "write an operand such as RCX, R8, SEPT_TREE, TD_EPOCH, or its number",
                    )
                })?,
            };
            return Ok(Some(StatusPattern::Both(upper, details)));
        }
        if let Some(upper) = code(text) {
            return Ok(Some(StatusPattern::Upper(upper)));
        }
        if text.starts_with("TDX_") {
            return Err(Complaint::new(
                format!("`{text}` is not a completion status of the TDX module"),
                "write a name such as TDX_EPT_ENTRY_STATE_INCORRECT|RCX, or the number",
            ));
        }
        let full = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        Ok(full.then(|| u64::from_str_radix(text, 16).ok()).flatten().map(StatusPattern::Full))
    }

    /// Calls `f` with every name in the pattern.
    pub(crate) fn each_name(&self, f: &mut dyn FnMut(&str)) {
        if let StatusPattern::Both(_, details) = self {
            details.each_name(f);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Head {
        Expectation::parse(text).unwrap().head.unwrap()
    }

    fn status(text: &str) -> Option<StatusPattern> {
        StatusPattern::parse(text).unwrap()
    }

    #[test]
    fn a_status_is_read_in_every_notation() {
        let both = Some(StatusPattern::Both(0xC000_0B0D, Expr::Number(1)));
        assert_eq!(status("C0000B0D|1"), both);
        assert_eq!(status("0xC0000B0D|1"), both);
        assert_eq!(status("TDX_EPT_ENTRY_STATE_INCORRECT|RCX"), both);
        assert_eq!(status("EPT_ENTRY_STATE_INCORRECT|RCX"), both);
        assert_eq!(status("80000200|0x92"), Some(StatusPattern::Both(0x8000_0200, Expr::Number(0x92))));
        assert_eq!(status("80000200|SEPT_TREE"), Some(StatusPattern::Both(0x8000_0200, Expr::Number(0x92))));
        assert_eq!(status("C0000505"), Some(StatusPattern::Upper(0xC000_0505)));
        assert_eq!(status("00000815"), Some(StatusPattern::Upper(0x815)));
        assert_eq!(status("C0000B0D00000001"), Some(StatusPattern::Full(0xC000_0B0D_0000_0001)));
        assert_eq!(status("0xC0000B0D00000001"), None);
        assert_eq!(status("p|0x1"), None);
        assert!(StatusPattern::parse("TDX_NO_SUCH_THING").is_err());
        assert!(StatusPattern::parse("C0000B0D|?").is_err());
    }

    #[test]
    fn fields_follow_with_or_without_commas() {
        let found = Expectation::parse("C0000B0D|1, rcx=7 RDX 0x8401, save old=rcx and r8!=p").unwrap();
        assert_eq!(found.checks.len(), 3);
        assert_eq!(found.checks[1].field, "rdx");
        assert_eq!(found.checks[2].relation, Relation::Different);
        assert_eq!(found.saves, [Save { name: "old".into(), field: "rcx".into() }]);
    }

    #[test]
    fn outcomes_other_than_a_status_have_words() {
        assert_eq!(head("exit 48, rdx=1"), Head::Exit(Some(Expr::Number(48))));
        assert_eq!(head("exit=ept-violation"), Head::Exit(Some(Expr::Number(48))));
        assert_eq!(head("exit"), Head::Exit(None));
        assert_eq!(head("#VE, reason=48"), Head::Exception(Exception::Virtualization));
        assert_eq!(head("df"), Head::Exception(Exception::DoubleFault));
        assert_eq!(head("!0"), Head::Not(Box::new(head("0"))));
        assert_eq!(head("ok"), Head::Ok);
    }

    #[test]
    fn a_missing_value_is_refused() {
        for text in ["0, rcx=", "0,", "0, rcx", "save", "0 0", "status"] {
            assert!(Expectation::parse(text).is_err(), "{text}");
        }
    }
}
