//! From text to statements: comments, separators, words.

use super::error::Complaint;

/// One statement: its words, and what stands after `->`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawStatement {
    pub words: Vec<Word>,
    pub expectation: Option<String>,
    pub text: String,
}

/// A word on the left of `->`: bare, or a name and a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Bare(String),
    Pair(String, String),
}

/// Guest exceptions as architecture manuals write them; their `#` begins no comment.
const EXCEPTIONS: [&str; 5] = ["#VE", "#DF", "#PF", "#MC", "#GP"];

fn without_comment(line: &str) -> &str {
    let mut before = ' ';
    for (at, c) in line.char_indices() {
        if c == '#' && before.is_whitespace() {
            let rest = &line[at..];
            let exception = EXCEPTIONS.iter().any(|name| {
                rest.get(..3).is_some_and(|head| head.eq_ignore_ascii_case(name))
                    && !rest[3..].starts_with(|c: char| c.is_alphanumeric())
            });
            if !exception {
                return &line[..at];
            }
        }
        before = c;
    }
    line
}

/// Closes the gaps around operators, so that `gpa | 1` and `rcx = 0` are one word each.
fn close_gaps(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.replace('\u{2212}', "-").chars().collect::<Vec<_>>();
    chars.retain(|c| *c != '\r');
    let glues = |at: usize| match chars.get(at) {
        Some('=' | '|' | '+' | '&' | '^' | '*') => true,
        Some('<') => chars.get(at + 1) == Some(&'<') || (at > 0 && chars[at - 1] == '<'),
        Some('>') => chars.get(at + 1) == Some(&'>') || (at > 0 && chars[at - 1] == '>'),
        Some('!') => chars.get(at + 1) == Some(&'='),
        _ => false,
    };
    let mut at = 0;
    while at < chars.len() {
        if chars[at].is_whitespace() {
            let next = (at..chars.len()).find(|&i| !chars[i].is_whitespace());
            let glued = (at > 0 && glues(at - 1)) || next.is_some_and(&glues);
            if !glued {
                out.push(' ');
            }
            at = next.unwrap_or(chars.len());
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out.trim().to_string()
}

fn words(text: &str) -> Result<Vec<Word>, Complaint> {
    close_gaps(text)
        .split_whitespace()
        .map(|word| match word.split_once('=') {
            None => Ok(Word::Bare(word.to_string())),
            Some(("", value)) => {
                Err(Complaint::new(format!("`={value}` has no name"), "write NAME=VALUE, for example rcx=0x0"))
            }
            Some((name, "")) => {
                Err(Complaint::new(format!("`{name}=` has no value"), format!("write {name}=VALUE, or leave it out")))
            }
            Some((name, value)) => Ok(Word::Pair(name.to_string(), value.to_string())),
        })
        .collect()
}

/// Longest line, in bytes. The parser recurses into what it reads, so a line must have an end.
const LONGEST_LINE: usize = 1000;

/// The statements of one line, which are separated by `;`.
pub(crate) fn statements(line: &str) -> Result<Vec<RawStatement>, Complaint> {
    if line.len() > LONGEST_LINE {
        return Err(Complaint::new(
            format!("the line has {} bytes", line.len()),
            format!("write at most {LONGEST_LINE}, and the rest on further lines"),
        ));
    }
    let mut statements = Vec::new();
    for piece in without_comment(line).split(';') {
        let text = piece.trim();
        if text.is_empty() {
            continue;
        }
        let (left, right) = match text.split_once("->") {
            Some((left, right)) => (left, Some(close_gaps(right))),
            None => (text, None),
        };
        if right.as_deref() == Some("") {
            return Err(Complaint::new(
                "`->` has no expectation",
                "write a status such as 0 or TDX_OPERAND_BUSY|RCX after it, or leave it out",
            ));
        }
        let words = words(left)?;
        if words.is_empty() {
            return Err(Complaint::new(
                "`->` has no statement before it",
                "write the statement whose result is expected",
            ));
        }
        statements.push(RawStatement { words, expectation: right, text: text.to_string() });
    }
    Ok(statements)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: &str) -> Word {
        Word::Pair(name.to_string(), value.to_string())
    }

    #[test]
    fn comments_end_a_line_but_exceptions_do_not() {
        assert_eq!(statements("  # nothing").unwrap(), []);
        let found = statements("guest V read gpa=0 -> #VE, reason=48 # and so on").unwrap();
        assert_eq!(found[0].expectation.as_deref(), Some("#VE, reason=48"));
    }

    #[test]
    fn several_statements_stand_on_one_line() {
        let found = statements("enter V ; exit V ; interrupt on").unwrap();
        assert_eq!(found.len(), 3);
        assert_eq!(found[2].words, [Word::Bare("interrupt".into()), Word::Bare("on".into())]);
    }

    #[test]
    fn gaps_around_operators_close() {
        let found = statements("call 6 rcx = 0x0 | 1 rdx=tdr + 0x1000 -> C0000B0D | 1, rdx != 3").unwrap();
        assert_eq!(
            found[0].words,
            [Word::Bare("call".into()), Word::Bare("6".into()), pair("rcx", "0x0|1"), pair("rdx", "tdr+0x1000")]
        );
        assert_eq!(found[0].expectation.as_deref(), Some("C0000B0D|1, rdx!=3"));
    }

    #[test]
    fn missing_values_are_named() {
        assert!(statements("call 6 rcx=").unwrap_err().what.contains("`rcx=` has no value"));
        assert!(statements("call 6 rcx=0 ->").unwrap_err().what.contains("`->` has no expectation"));
        assert!(statements("-> 0").is_err());
    }
}
