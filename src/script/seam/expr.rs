//! Values: numbers, names, and arithmetic on them with the precedence of C.

use std::collections::BTreeMap;

use super::error::Complaint;

/// The names a script may use, and what they stand for.
pub(crate) type Names = BTreeMap<String, u64>;

/// A value as written, to be evaluated when its statement runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// A number.
    Number(u64),
    /// A name: a page, a TD, a vCPU, something saved.
    Name(String),
    /// `-x` or `~x`.
    Unary(Unary, Box<Expr>),
    /// `x op y`, wrapping at 64 bits.
    Binary(Binary, Box<Expr>, Box<Expr>),
}

/// An operator with one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    /// Two's complement negation: `-1` is NULL_PA.
    Minus,
    /// Bitwise complement.
    Not,
}

/// An operator with two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Binary {
    Or,
    Xor,
    And,
    ShiftLeft,
    ShiftRight,
    Add,
    Subtract,
    Multiply,
}

const LEVELS: [&[(&str, Binary)]; 6] = [
    &[("|", Binary::Or)],
    &[("^", Binary::Xor)],
    &[("&", Binary::And)],
    &[("<<", Binary::ShiftLeft), (">>", Binary::ShiftRight)],
    &[("+", Binary::Add), ("-", Binary::Subtract)],
    &[("*", Binary::Multiply)],
];

impl Expr {
    /// Reads `0x1000`, `4K`, `p`, `p+0x1000`, `gpa|1`, `-1`, `1|(2<<6)<<32`.
    pub(crate) fn parse(text: &str) -> Result<Expr, Complaint> {
        let mut parser = Parser { text, at: 0 };
        let expr = parser.binary(0)?;
        parser.gap();
        match parser.rest() {
            "" => Ok(expr),
            _ => Err(parser.wrong()),
        }
    }

    /// The value, with `names` in scope.
    pub(crate) fn value(&self, names: &Names) -> Result<u64, Complaint> {
        Ok(match self {
            Expr::Number(number) => *number,
            Expr::Name(name) => match names.get(name) {
                Some(value) => *value,
                None => return Err(unknown_name(name)),
            },
            Expr::Unary(Unary::Minus, x) => x.value(names)?.wrapping_neg(),
            Expr::Unary(Unary::Not, x) => !x.value(names)?,
            Expr::Binary(op, x, y) => {
                let (x, y) = (x.value(names)?, y.value(names)?);
                match op {
                    Binary::Or => x | y,
                    Binary::Xor => x ^ y,
                    Binary::And => x & y,
                    Binary::ShiftLeft => x.checked_shl(y as u32).unwrap_or(0),
                    Binary::ShiftRight => x.checked_shr(y as u32).unwrap_or(0),
                    Binary::Add => x.wrapping_add(y),
                    Binary::Subtract => x.wrapping_sub(y),
                    Binary::Multiply => x.wrapping_mul(y),
                }
            }
        })
    }

    /// Calls `f` with every name in the value.
    pub(crate) fn each_name(&self, f: &mut dyn FnMut(&str)) {
        match self {
            Expr::Number(_) => {}
            Expr::Name(name) => f(name),
            Expr::Unary(_, x) => x.each_name(f),
            Expr::Binary(_, x, y) => {
                x.each_name(f);
                y.each_name(f);
            }
        }
    }
}

/// The complaint about a name nothing has made.
pub(crate) fn unknown_name(name: &str) -> Complaint {
    Complaint::new(
        format!("`{name}` is used before it is made"),
        format!(
            "put a line such as `page {name}` or `let {name}=0x1000` before this one, or `setup S2` for the names of a fixture"
        ),
    )
}

/// A number: decimal, `0x` hexadecimal, underscores, and a K, M, G or T suffix.
pub(crate) fn number(text: &str) -> Option<u64> {
    let text = text.replace('_', "");
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        (at, 'T' | 't') => (&text[..at], 40),
        _ => (text.as_str(), 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Whether `text` may name something: a letter or `_`, then letters, digits, `_` and `.`.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn gap(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn wrong(&self) -> Complaint {
        Complaint::new(
            format!("`{}` is not a value", self.text),
            "write a number such as 4096, 0x1000 or 4K, a name, or names and numbers joined by + - | & << *",
        )
    }

    fn binary(&mut self, level: usize) -> Result<Expr, Complaint> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.binary(level + 1)?;
        loop {
            self.gap();
            let rest = self.rest();
            let Some(&(sign, op)) = operators.iter().find(|(sign, _)| rest.starts_with(sign)) else { return Ok(left) };
            self.at += sign.len();
            let right = self.binary(level + 1)?;
            left = Expr::Binary(op, Box::new(left), Box::new(right));
        }
    }

    fn unary(&mut self) -> Result<Expr, Complaint> {
        self.gap();
        let op = match self.rest().chars().next() {
            Some('-') => Unary::Minus,
            Some('~') => Unary::Not,
            _ => return self.atom(),
        };
        self.at += 1;
        Ok(Expr::Unary(op, Box::new(self.unary()?)))
    }

    fn atom(&mut self) -> Result<Expr, Complaint> {
        if self.rest().starts_with('(') {
            self.at += 1;
            let inner = self.binary(0)?;
            self.gap();
            if !self.rest().starts_with(')') {
                return Err(self.wrong());
            }
            self.at += 1;
            return Ok(inner);
        }
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(rest.len());
        let word = &rest[..end];
        let expr = match number(word) {
            Some(number) => Expr::Number(number),
            None if word.eq_ignore_ascii_case("NULL_PA") => Expr::Number(u64::MAX),
            None if is_name(word) => Expr::Name(word.to_string()),
            None => return Err(self.wrong()),
        };
        self.at += end;
        Ok(expr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> u64 {
        let names = Names::from([("p".to_string(), 0x4000_0000), ("B.tdr".to_string(), 0x5000)]);
        Expr::parse(text).unwrap().value(&names).unwrap()
    }

    #[test]
    fn numbers_names_and_arithmetic() {
        assert_eq!(value("0"), 0);
        assert_eq!(value("0x0000_4088_0000_0001"), 0x4088_0000_0001);
        assert_eq!(value("1 | (0 | 1<<3 | 2<<6 | 1<<14) << 32"), 0x4088_0000_0001);
        assert_eq!(value("4K"), 4096);
        assert_eq!(value("2M"), 1 << 21);
        assert_eq!(value("-1"), u64::MAX);
        assert_eq!(value("NULL_PA"), u64::MAX);
        assert_eq!(value("p+0x1000"), 0x4000_1000);
        assert_eq!(value("p|0x1"), 0x4000_0001);
        assert_eq!(value("p+3*0x1000|1"), 0x4000_3001);
        assert_eq!(value("B.tdr-0x1000"), 0x4000);
    }

    #[test]
    fn what_is_no_value_is_refused() {
        for text in ["", "0xZZ", "12q", "p+", "(p", "p)", "18446744073709551616", "99999999999G"] {
            assert!(Expr::parse(text).is_err(), "{text}");
        }
        assert!(Expr::parse("nobody").unwrap().value(&Names::new()).unwrap_err().what.contains("`nobody`"));
    }
}
