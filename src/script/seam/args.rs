//! The words of one statement, taken one by one; what is left over is a mistake.

use super::ast::{Lp, Position};
use super::error::Complaint;
use super::expr::Expr;
use super::lex::Word;

pub(crate) struct Args {
    keyword: String,
    words: Vec<Word>,
}

impl Args {
    pub(crate) fn new(words: Vec<Word>) -> Result<Args, Complaint> {
        let mut words = words.into_iter();
        match words.next() {
            Some(Word::Bare(keyword)) => Ok(Args { keyword, words: words.collect() }),
            Some(Word::Pair(name, value)) => Err(Complaint::new(
                format!("`{name}={value}` is no statement"),
                format!("write let {name}={value}, or begin with a statement such as call, guest, enter"),
            )),
            None => Err(Complaint::new("an empty statement", "leave it out")),
        }
    }

    pub(crate) fn keyword(&self) -> String {
        self.keyword.to_ascii_lowercase()
    }

    /// The next word without `=`.
    pub(crate) fn bare(&mut self) -> Option<String> {
        let at = self.words.iter().position(|word| matches!(word, Word::Bare(_)))?;
        match self.words.remove(at) {
            Word::Bare(word) => Some(word),
            Word::Pair(..) => None,
        }
    }

    /// The next word without `=`, without taking it.
    pub(crate) fn peek_bare(&self) -> Option<&str> {
        self.words.iter().find_map(|word| match word {
            Word::Bare(word) => Some(word.as_str()),
            Word::Pair(..) => None,
        })
    }

    /// The next word without `=`, which must be there.
    pub(crate) fn needed(&mut self, what: &str, example: &str) -> Result<String, Complaint> {
        let keyword = self.keyword.clone();
        self.bare().ok_or_else(|| Complaint::new(format!("`{keyword}` needs {what}"), format!("write {example}")))
    }

    /// Takes the bare word `word` if it stands there.
    pub(crate) fn flag(&mut self, word: &str) -> bool {
        let found = self.words.iter().position(|w| matches!(w, Word::Bare(w) if w.eq_ignore_ascii_case(word)));
        found.is_some_and(|at| {
            self.words.remove(at);
            true
        })
    }

    /// The text of the first of the pairs `keys`.
    pub(crate) fn text(&mut self, keys: &[&str]) -> Option<String> {
        let at = self.words.iter().position(|word| match word {
            Word::Pair(key, _) => keys.iter().any(|known| known.eq_ignore_ascii_case(key)),
            Word::Bare(_) => false,
        })?;
        match self.words.remove(at) {
            Word::Pair(_, value) => Some(value),
            Word::Bare(_) => None,
        }
    }

    /// The value of the first of the pairs `keys`.
    pub(crate) fn expr(&mut self, keys: &[&str]) -> Result<Option<Expr>, Complaint> {
        self.text(keys).map(|text| Expr::parse(&text)).transpose()
    }

    /// The value of the pair, or of the next bare word, which must be there.
    pub(crate) fn needed_expr(&mut self, keys: &[&str], what: &str, example: &str) -> Result<Expr, Complaint> {
        match self.text(keys) {
            Some(text) => Expr::parse(&text),
            None => Expr::parse(&self.needed(what, example)?),
        }
    }

    /// The processor named by `lp=`, `by=`, `on=` or `cpu=`.
    pub(crate) fn lp(&mut self) -> Result<Option<Lp>, Complaint> {
        self.text(&["lp", "by", "on", "cpu"]).map(|text| lp(&text)).transpose()
    }

    /// `on` or `off`, which must be there.
    pub(crate) fn position(&mut self, example: &str) -> Result<Position, Complaint> {
        position(&self.needed("on or off", example)?, example)
    }

    /// Every pair that is left.
    pub(crate) fn pairs(&mut self) -> Vec<(String, String)> {
        let (pairs, rest) = std::mem::take(&mut self.words).into_iter().partition(|w| matches!(w, Word::Pair(..)));
        self.words = rest;
        let pairs: Vec<Word> = pairs;
        pairs
            .into_iter()
            .filter_map(|word| match word {
                Word::Pair(name, value) => Some((name, value)),
                Word::Bare(_) => None,
            })
            .collect()
    }

    /// Every word that is left, as it was written.
    pub(crate) fn rest(&mut self) -> Vec<Word> {
        std::mem::take(&mut self.words)
    }

    /// Complains about the first word that is left.
    pub(crate) fn finish(self, example: &str) -> Result<(), Complaint> {
        match self.words.into_iter().next() {
            None => Ok(()),
            Some(Word::Bare(word)) | Some(Word::Pair(word, _)) => {
                Err(Complaint::new(format!("`{}` does not know `{word}`", self.keyword), format!("write {example}")))
            }
        }
    }
}

/// `lp1` or `1`.
pub(crate) fn lp(text: &str) -> Result<Lp, Complaint> {
    let digits = text.strip_prefix("lp").or_else(|| text.strip_prefix("LP")).unwrap_or(text);
    digits
        .parse()
        .map(Lp)
        .map_err(|_| Complaint::new(format!("`{text}` is not a logical processor"), "write lp0, lp1, and so on"))
}

/// `on` or `off`.
pub(crate) fn position(text: &str, example: &str) -> Result<Position, Complaint> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "yes" | "true" | "1" => Ok(Position::On),
        "off" | "no" | "false" | "0" => Ok(Position::Off),
        _ => Err(Complaint::new(format!("`{text}` is neither on nor off"), format!("write {example}"))),
    }
}
