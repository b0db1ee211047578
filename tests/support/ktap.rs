//! A parser of KTAP version 1 that takes nothing which Documentation/dev-tools/ktap.rst does not ask for: no line without
//! a meaning, no plan that does not hold, no parent that contradicts its children.

/// A result with the results below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Result {
    /// `ok`.
    pub ok: bool,
    /// The description.
    pub name: String,
    /// `SKIP`, `XFAIL`, `TIMEOUT`, `ERROR`.
    pub directive: Option<String>,
    /// What stands behind the directive.
    pub data: String,
    /// Diagnostic lines before it, without their `# `.
    pub diagnostics: Vec<String>,
    /// Nested results.
    pub children: Vec<Result>,
}

/// A whole document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The plan of the outermost level.
    pub plan: Option<usize>,
    /// Diagnostic lines that belong to no result.
    pub diagnostics: Vec<String>,
    /// The results of the outermost level.
    pub results: Vec<Result>,
}

impl Document {
    /// Every result without children, under its path.
    pub fn leaves(&self) -> Vec<(String, &Result)> {
        fn gather<'a>(path: &str, results: &'a [Result], into: &mut Vec<(String, &'a Result)>) {
            for result in results {
                let path = if path.is_empty() { result.name.clone() } else { format!("{path}/{}", result.name) };
                if result.children.is_empty() {
                    into.push((path, result));
                } else {
                    gather(&path, &result.children, into);
                }
            }
        }
        let mut leaves = Vec::new();
        gather("", &self.results, &mut leaves);
        leaves
    }
}

/// Parses `text`, or says what is wrong with which line.
pub fn parse(text: &str) -> std::result::Result<Document, String> {
    if !text.ends_with('\n') {
        return Err("the last line has no end".to_owned());
    }
    let lines: Vec<&str> = text.lines().collect();
    let mut parser = Parser { lines, at: 0 };
    let block = parser.block(0)?;
    if parser.at != parser.lines.len() {
        return Err(parser.wrong("a line after the end"));
    }
    Ok(Document { plan: block.plan, diagnostics: block.trailing, results: block.results })
}

struct Block {
    plan: Option<usize>,
    subtest: Option<String>,
    results: Vec<Result>,
    trailing: Vec<String>,
}

struct Parser<'a> {
    lines: Vec<&'a str>,
    at: usize,
}

impl Parser<'_> {
    fn wrong(&self, what: &str) -> String {
        format!("line {}: {what}: {:?}", self.at + 1, self.lines.get(self.at).unwrap_or(&"<end>"))
    }

    /// The next line at this depth, without its indentation; `None` when the block is over.
    fn line(&self, depth: usize) -> Option<&str> {
        self.lines.get(self.at)?.strip_prefix(" ".repeat(2 * depth).as_str())
    }

    fn block(&mut self, depth: usize) -> std::result::Result<Block, String> {
        if self.line(depth) != Some("KTAP version 1") {
            return Err(self.wrong("expected a version line"));
        }
        self.at += 1;
        let mut block = Block { plan: None, subtest: None, results: Vec::new(), trailing: Vec::new() };
        if let Some(name) = self.line(depth).and_then(|line| line.strip_prefix("# Subtest: ")) {
            block.subtest = Some(name.to_owned());
            self.at += 1;
        }
        if let Some(count) = self.line(depth).and_then(|line| line.strip_prefix("1..")) {
            block.plan = Some(count.parse().map_err(|_| self.wrong("a plan that is no number"))?);
            self.at += 1;
        }
        let mut diagnostics = Vec::new();
        let mut nested: Option<Block> = None;
        while let Some(line) = self.line(depth) {
            if let Some(text) = line.strip_prefix("# ") {
                if nested.is_some() {
                    return Err(self.wrong("a diagnostic between a block and its result"));
                }
                diagnostics.push(text.to_owned());
                self.at += 1;
            } else if line.starts_with("  ") {
                if nested.is_some() {
                    return Err(self.wrong("a second block without a result of the first"));
                }
                nested = Some(self.block(depth + 1)?);
            } else {
                let mut result = self.result(line, block.results.len() + 1)?;
                result.diagnostics = std::mem::take(&mut diagnostics);
                if let Some(nested) = nested.take() {
                    self.check_parent(&mut result, nested)?;
                }
                if block.results.iter().any(|other| other.name == result.name) {
                    return Err(self.wrong("a name that another result of this block has"));
                }
                block.results.push(result);
                self.at += 1;
            }
        }
        if nested.is_some() {
            return Err(self.wrong("a block without a result line"));
        }
        if block.plan.is_some_and(|plan| plan != block.results.len()) {
            return Err(self.wrong(&format!("{} results, planned {:?}", block.results.len(), block.plan)));
        }
        block.trailing = diagnostics;
        Ok(block)
    }

    fn result(&self, line: &str, expected: usize) -> std::result::Result<Result, String> {
        let (ok, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(self.wrong("a line without a meaning")),
        };
        let (number, rest) = rest.split_once(' ').ok_or_else(|| self.wrong("a result without a name"))?;
        if number.parse() != Ok(expected) {
            return Err(self.wrong(&format!("expected number {expected}")));
        }
        let (name, directive) = rest.split_once(" # ").map_or((rest, None), |(name, after)| (name, Some(after)));
        if name.is_empty() || name.contains('#') || name.contains(char::is_control) || name.contains(' ') {
            return Err(self.wrong("a name that a result line cannot carry"));
        }
        let (directive, data) = match directive.map(|text| text.split_once(' ').unwrap_or((text, ""))) {
            None => (None, String::new()),
            Some((word, data)) => (Some(word.to_owned()), data.to_owned()),
        };
        match (directive.as_deref(), ok) {
            (None, _) | (Some("SKIP" | "XFAIL"), true) | (Some("TIMEOUT" | "ERROR"), false) => {}
            _ => return Err(self.wrong("a directive that does not go with its status")),
        }
        if data.contains('#') {
            return Err(self.wrong("diagnostic data that starts another directive"));
        }
        Ok(Result { ok, name: name.to_owned(), directive, data, diagnostics: Vec::new(), children: Vec::new() })
    }

    fn check_parent(&self, parent: &mut Result, block: Block) -> std::result::Result<(), String> {
        if block.subtest.as_ref() != Some(&parent.name) {
            return Err(self.wrong(&format!("the block before it is called {:?}", block.subtest)));
        }
        if block.plan.is_none() {
            return Err(self.wrong("the block before it has no plan"));
        }
        let failed = block.results.iter().any(|child| !child.ok);
        let skipped = block.results.iter().all(|child| child.directive.as_deref() == Some("SKIP"));
        if parent.ok == failed {
            return Err(self.wrong("it contradicts its children"));
        }
        if (parent.directive.as_deref() == Some("SKIP")) != skipped {
            return Err(self.wrong("it is SKIP when, and only when, all of its children are"));
        }
        if !block.trailing.is_empty() {
            return Err(self.wrong("the block before it ends with diagnostics that belong to no result"));
        }
        parent.children = block.results;
        Ok(())
    }
}
