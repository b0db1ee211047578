//! Which claims a pattern means: [`Pattern`].

/// A pattern on claim names.
///
/// `*` stands for any run of characters, `::` included, and a pattern with a `*` has to match the whole name. A pattern
/// without one means the claim of that name, and everything below it: `binding` is a whole suite, `binding::errno` all
/// rows of a table. When nothing has that name, it means every claim whose name contains it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// The pattern as written by the user.
    pub fn new(text: impl Into<String>) -> Pattern {
        Pattern(text.into())
    }

    /// The text as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// For each of `names`, whether the pattern means it.
    pub fn select(&self, names: &[String]) -> Vec<bool> {
        if self.0.contains('*') {
            return names.iter().map(|name| matches_glob(&self.0, name)).collect();
        }
        let exact: Vec<bool> = names.iter().map(|name| self.is_or_holds(name)).collect();
        if exact.contains(&true) {
            return exact;
        }
        names.iter().map(|name| !self.0.is_empty() && name.contains(&self.0)).collect()
    }

    fn is_or_holds(&self, name: &str) -> bool {
        name.strip_prefix(self.0.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    }
}

/// Whether `text` is what `glob` says, `*` being any run of characters.
pub fn matches_glob(glob: &str, text: &str) -> bool {
    let mut pieces = glob.split('*');
    let Some(rest) = text.strip_prefix(pieces.next().unwrap_or_default()) else {
        return false;
    };
    let mut rest = rest;
    let mut pieces: Vec<&str> = pieces.collect();
    let Some(last) = pieces.pop() else {
        return rest.is_empty();
    };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["binding::errno::zero", "binding::errno::one", "binding::moves", "unbinding::late"];

    fn selected(pattern: &str) -> Vec<&'static str> {
        let names: Vec<String> = NAMES.iter().map(|name| name.to_string()).collect();
        let chosen = Pattern::new(pattern).select(&names);
        NAMES.into_iter().zip(chosen).filter(|(_, chosen)| *chosen).map(|(name, _)| name).collect()
    }

    #[test]
    fn a_name_means_itself_and_what_is_below_it() {
        assert_eq!(selected("binding"), ["binding::errno::zero", "binding::errno::one", "binding::moves"]);
        assert_eq!(selected("binding::errno"), ["binding::errno::zero", "binding::errno::one"]);
        assert_eq!(selected("binding::errno::one"), ["binding::errno::one"]);
    }

    #[test]
    fn a_part_of_a_name_means_what_contains_it() {
        assert_eq!(selected("late"), ["unbinding::late"]);
        assert_eq!(selected("indin"), NAMES);
        assert!(selected("nothing").is_empty());
        assert!(selected("").is_empty());
    }

    #[test]
    fn a_star_matches_any_run_of_characters_and_the_rest_is_anchored() {
        assert_eq!(selected("*errno*"), ["binding::errno::zero", "binding::errno::one"]);
        assert_eq!(selected("*::moves"), ["binding::moves"]);
        assert_eq!(selected("b*o"), ["binding::errno::zero"]);
        assert_eq!(selected("*"), NAMES);
        assert!(selected("errno*").is_empty());
        assert!(!matches_glob("a*a", "a"));
    }
}
