//! The syntax of a Corefile, as CoreDNS' parser (github.com/coredns/caddy, `caddyfile`) reads it, with the place of each
//! word in the text.
//!
//! Words are separated by blanks. One that begins with `"` goes to the next `"`, over lines too, with `\"` inside. `#`
//! begins a comment. `{` and `}` are words of their own. A statement is a line, or a line that ends in `{` and all to
//! its `}`. Environment variables (`{$NAME}`) are not replaced, and imports are not followed.
//!
//! Stricter than CoreDNS, where that parser accepts what nobody means: a quote or a brace that is not closed, `#` within
//! a word, words behind `}`, a server block without braces.

use std::borrow::Cow;

use super::CorefileError;

/// Blocks within blocks. CoreDNS' plugins have two.
const MAX_DEPTH: usize = 16;

/// A word and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CaddyToken<'t> {
    /// Without its quotes.
    pub(super) text: Cow<'t, str>,
    /// Offset of its first byte, in quotes that of the quote.
    pub(super) start: usize,
    /// Offset behind it.
    pub(super) end: usize,
    /// The line of its first byte, from 1.
    pub(super) line: usize,
    last_line: usize,
    quoted: bool,
}

/// A comment: from its `#` to before the line feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Comment {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) line: usize,
}

/// A plugin with its arguments, or a property of a plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Statement<'t> {
    /// At least one: the name.
    pub(super) words: Vec<CaddyToken<'t>>,
    pub(super) block: Option<Block<'t>>,
}

/// What is between braces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block<'t> {
    pub(super) statements: Vec<Statement<'t>>,
    pub(super) close: CaddyToken<'t>,
}

/// A server block, or a snippet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServerBlock<'t> {
    /// Zones with ports, without the commas between them; of a snippet its name in parentheses.
    pub(super) keys: Vec<CaddyToken<'t>>,
    pub(super) body: Block<'t>,
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caddyfile<'t> {
    pub(super) text: &'t str,
    pub(super) servers: Vec<ServerBlock<'t>>,
    pub(super) snippets: Vec<ServerBlock<'t>>,
    pub(super) comments: Vec<Comment>,
    /// Whether something is imported between the server blocks.
    pub(super) imports: bool,
}

impl<'t> Caddyfile<'t> {
    /// # Errors
    /// When the text does not follow the syntax, with the line.
    pub(super) fn parse(text: &'t str) -> Result<Self, CorefileError> {
        let (words, comments) = words(text)?;
        let mut file = Self { text, servers: Vec::new(), snippets: Vec::new(), comments, imports: false };
        let mut parser = Parser { words: &words, at: 0 };
        while let Some(first) = parser.peek() {
            if first.text == "import" && !first.quoted {
                let statement = parser.statement(0)?;
                if statement.words.len() != 2 || statement.block.is_some() {
                    return Err(CorefileError::at(first.line, "`import` takes one argument"));
                }
                file.imports = true;
                continue;
            }
            let block = parser.server_block()?;
            let snippet = block.keys.len() == 1 && block.keys[0].text.starts_with('(');
            if snippet { &mut file.snippets } else { &mut file.servers }.push(block);
        }
        Ok(file)
    }

    /// Offset of the line that `at` is in.
    pub(super) fn line_start(&self, at: usize) -> usize {
        self.text[..at].rfind('\n').map_or(0, |feed| feed + 1)
    }

    /// Offset behind the line that `at` is in, and its line feed.
    pub(super) fn line_end(&self, at: usize) -> usize {
        self.text[at..].find('\n').map_or(self.text.len(), |feed| at + feed + 1)
    }

    /// What is before `at` in its line, if that is only blanks: the indentation.
    pub(super) fn indentation(&self, at: usize) -> Option<&'t str> {
        let before = &self.text[self.line_start(at)..at];
        before.chars().all(char::is_whitespace).then_some(before)
    }
}

impl<'t> Statement<'t> {
    pub(super) fn name(&self) -> &CaddyToken<'t> {
        &self.words[0]
    }

    pub(super) fn is(&self, name: &str) -> bool {
        self.words[0].text == name
    }

    pub(super) fn arguments(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.words[1..].iter().map(|word| word.text.as_ref())
    }

    /// Offset behind it.
    pub(super) fn end(&self) -> usize {
        self.block.as_ref().map_or_else(|| self.last_word().end, |block| block.close.end)
    }

    pub(super) fn last_word(&self) -> &CaddyToken<'t> {
        self.words.last().unwrap_or(&self.words[0])
    }

    pub(super) fn properties(&self) -> &[Self] {
        self.block.as_ref().map_or(&[], |block| &block.statements)
    }
}

struct Parser<'w, 't> {
    words: &'w [CaddyToken<'t>],
    at: usize,
}

impl<'w, 't> Parser<'w, 't> {
    fn peek(&self) -> Option<&'w CaddyToken<'t>> {
        self.words.get(self.at)
    }

    /// The next word, if it is in the line in which `word` ends.
    fn peek_in_line(&self, word: &CaddyToken<'t>) -> Option<&'w CaddyToken<'t>> {
        self.peek().filter(|next| next.line == word.last_line)
    }

    fn server_block(&mut self) -> Result<ServerBlock<'t>, CorefileError> {
        let mut keys: Vec<CaddyToken<'t>> = Vec::new();
        let mut comma = true;
        while let Some(word) = self.peek() {
            // Keys go on in the next line only behind a comma, as for CoreDNS.
            if word.text == "{" || !comma && keys.last().is_some_and(|last| last.last_line < word.line) {
                break;
            }
            if word.text == "}" {
                return Err(CorefileError::at(word.line, "`}` without its `{`"));
            }
            // A brace at the end of a word is a part of the word: what follows would be read as more zones.
            if word.text.ends_with('{') {
                return Err(CorefileError::at(word.line, "no blank before `{`"));
            }
            comma = word.text.ends_with(',');
            let text = word.text.strip_suffix(',').unwrap_or(&word.text).to_owned();
            keys.push(CaddyToken { text: text.into(), ..word.clone() });
            self.at += 1;
        }
        let Some(open) = self.peek() else {
            let line = keys.last().map_or(1, |key| key.line);
            return Err(CorefileError::at(line, "a server block without `{`"));
        };
        if open.text != "{" || keys.is_empty() || comma {
            let reason = if open.text == "{" { "`{` without a zone before it" } else { "a server block without `{`" };
            return Err(CorefileError::at(keys.last().map_or(open.line, |key| key.line), reason));
        }
        Ok(ServerBlock { keys, body: self.block(1)? })
    }

    /// From `{` to `}`.
    fn block(&mut self, depth: usize) -> Result<Block<'t>, CorefileError> {
        let open = &self.words[self.at];
        // The parser calls itself: a file of braces must not overflow the stack.
        if depth > MAX_DEPTH {
            return Err(CorefileError::at(open.line, format!("more than {MAX_DEPTH} blocks within each other")));
        }
        self.at += 1;
        let mut statements = Vec::new();
        loop {
            match self.peek() {
                None => return Err(CorefileError::at(open.line, "`{` without its `}`")),
                Some(close) if close.text == "}" => {
                    self.at += 1;
                    // CoreDNS would read it as the beginning of another statement, which nobody means.
                    if let Some(behind) = self.peek_in_line(close) {
                        return Err(CorefileError::at(behind.line, "a word behind `}`"));
                    }
                    return Ok(Block { statements, close: close.clone() });
                }
                Some(_) => statements.push(self.statement(depth)?),
            }
        }
    }

    /// A line, with its block.
    fn statement(&mut self, depth: usize) -> Result<Statement<'t>, CorefileError> {
        let first = &self.words[self.at];
        if first.text == "{" {
            return Err(CorefileError::at(first.line, "`{` without a name before it"));
        }
        let mut words = vec![first.clone()];
        let mut last = first;
        self.at += 1;
        while let Some(word) = self.peek_in_line(last) {
            match word.text.as_ref() {
                "{" => return Ok(Statement { words, block: Some(self.block(depth + 1)?) }),
                "}" => return Err(CorefileError::at(word.line, "`}` behind other words")),
                _ => {}
            }
            words.push(word.clone());
            last = word;
            self.at += 1;
        }
        Ok(Statement { words, block: None })
    }
}

/// The words and the comments of a text.
fn words(text: &str) -> Result<(Vec<CaddyToken<'_>>, Vec<Comment>), CorefileError> {
    let (mut words, mut comments) = (Vec::new(), Vec::new());
    let mut line = 1;
    // A byte order mark, which some editors write.
    let mut at = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
    while let Some(c) = text[at..].chars().next() {
        match c {
            '\n' => {
                line += 1;
                at += 1;
            }
            c if c.is_whitespace() => at += c.len_utf8(),
            '#' => {
                let end = text[at..].find('\n').map_or(text.len(), |feed| at + feed);
                comments.push(Comment { start: at, end, line });
                at = end;
            }
            '"' => {
                let word = quoted(text, at, line)?;
                (at, line) = (word.end, word.last_line);
                words.push(word);
            }
            _ => {
                let end = text[at..].find(char::is_whitespace).map_or(text.len(), |blank| at + blank);
                let word = &text[at..end];
                if word.contains('#') {
                    return Err(CorefileError::at(line, format!("`#` within the word `{word}`")));
                }
                words.push(CaddyToken { text: word.into(), start: at, end, line, last_line: line, quoted: false });
                at = end;
            }
        }
    }
    Ok((words, comments))
}

/// The word in quotes that begins at `start`.
fn quoted(text: &str, start: usize, line: usize) -> Result<CaddyToken<'_>, CorefileError> {
    let (mut content, mut last_line, mut escaped) = (String::new(), line, false);
    for (at, c) in text[start + 1..].char_indices() {
        match c {
            '\\' if !escaped => {
                escaped = true;
                continue;
            }
            '"' if !escaped => {
                let end = start + 1 + at + 1;
                return Ok(CaddyToken { text: content.into(), start, end, line, last_line, quoted: true });
            }
            '\n' => last_line += 1,
            _ => {}
        }
        // Only a quote can be escaped.
        if escaped && c != '"' {
            content.push('\\');
        }
        content.push(c);
        escaped = false;
    }
    Err(CorefileError::at(line, "a quote that is not closed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> (Option<usize>, String) {
        let err = Caddyfile::parse(text).expect_err(text);
        (err.line, err.reason)
    }

    #[test]
    fn blocks_keys_and_properties_are_found() {
        let text = "\u{feff}# a comment\n(common) {\n    errors\n}\n.:53, cluster.local:53,\n    {$ZONE} {\n    import common\n    \
            template IN A \"a b \\\"c\\\" \\d\n}\" {\n        answer \"{ # not a comment }\"\n    }\n    health { }\n}\nimport custom/*.server\n\
            dns://other:1053\n{\n}\n";
        let file = Caddyfile::parse(text).expect("it is valid");
        let keys = |block: &ServerBlock<'_>| block.keys.iter().map(|key| key.text.to_string()).collect::<Vec<_>>();
        assert_eq!(
            file.servers.iter().map(keys).collect::<Vec<_>>(),
            [vec![".:53", "cluster.local:53", "{$ZONE}"], vec!["dns://other:1053"]]
        );
        assert_eq!((file.snippets.len(), file.comments.len(), file.imports), (1, 1, true));
        let statements = &file.servers[0].body.statements;
        let names: Vec<&str> = statements.iter().map(|statement| statement.name().text.as_ref()).collect();
        assert_eq!(names, ["import", "template", "health"]);
        assert_eq!(statements[1].arguments().collect::<Vec<_>>(), ["IN", "A", "a b \"c\" \\d\n}"]);
        assert_eq!(statements[1].properties()[0].arguments().next(), Some("{ # not a comment }"));
        assert_eq!((statements[1].name().line, statements[1].properties()[0].name().line), (8, 10));
        assert_eq!(&text[statements[2].name().start..statements[2].end()], "health { }");
    }

    #[test]
    fn invalid_text_is_refused_with_the_line() {
        for (text, line, part) in [
            (".:53 {\n    errors\n", 1, "without its `}`"),
            (".:53 {\n    kubernetes a {\n}\n", 1, "without its `}`"),
            (".:53 {\n}\n}\n", 3, "without its `{`"),
            (".:53 {\n    errors }\n", 2, "behind other words"),
            (".:53 {\n} other {\n}\n", 2, "a word behind `}`"),
            (".:53{\n    errors\n}\n", 1, "no blank before `{`"),
            (".:53\nerrors\n", 1, "without `{`"),
            (".:53", 1, "without `{`"),
            (".:53,\n{\n}\n", 1, "without a zone"),
            ("{\n}\n", 1, "without a zone"),
            (".:53 {\n    log\n    {\n    }\n}\n", 3, "without a name"),
            (".:53 {\n    log \"a\n}\n", 2, "not closed"),
            (".:53 {\n    log a#b\n}\n", 2, "within the word"),
            ("import a b\n", 1, "one argument"),
        ] {
            let (found, reason) = refused(text);
            assert!(found == Some(line) && reason.contains(part), "{text:?}: {found:?} {reason}");
        }
        assert!(refused(&format!(".:53 {{\n{}", "a {\n".repeat(100_000))).1.contains("within each other"));
    }

    #[test]
    fn lines_end_with_or_without_a_carriage_return() {
        let file = Caddyfile::parse(".:53 {\r\n    errors\r\n}\r\n").expect("it is valid");
        assert_eq!(file.servers[0].body.statements[0].name().text, "errors");
        assert_eq!(file.servers[0].body.close.line, 3);
    }
}
