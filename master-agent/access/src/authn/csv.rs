//! A parser for the CSV format of token files. Each line is a record. A field in quotes may contain commas, and `""` in
//! it stands for a quote.

/// Returns the fields of each line that is not empty, with the number of the line. An error names the line and contains
/// nothing of its text.
pub(super) fn records(text: &str) -> Result<Vec<(usize, Vec<String>)>, String> {
    let mut records = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        if !text.is_empty() {
            records.push((line, fields(text).map_err(|error| format!("line {line}: {error}"))?));
        }
    }
    Ok(records)
}

fn fields(line: &str) -> Result<Vec<String>, &'static str> {
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => unquote(quoted)?,
            None => {
                let (field, after) = rest.split_at(rest.find(',').unwrap_or(rest.len()));
                if field.contains('"') {
                    return Err("a quote within a field that does not begin with one");
                }
                (field.to_owned(), after)
            }
        };
        fields.push(field);
        if after.is_empty() {
            return Ok(fields);
        }
        rest = after.strip_prefix(',').ok_or("a quoted field goes on after its closing quote")?;
    }
}

/// Reads a field after its opening quote. Returns the field and the text after the closing quote.
fn unquote(text: &str) -> Result<(String, &str), &'static str> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        let (part, after) = rest.split_once('"').ok_or("a quote is not closed")?;
        field.push_str(part);
        match after.strip_prefix('"') {
            Some(after) => {
                field.push('"');
                rest = after;
            }
            None => return Ok((field, after)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_and_without_quotes_are_read() {
        let one = |text| records(text).unwrap().remove(0).1;
        assert_eq!(one("a,b,c"), ["a", "b", "c"]);
        assert_eq!(one("a,b,c,\"g1,g2\""), ["a", "b", "c", "g1,g2"]);
        assert_eq!(one("\"a \"\"b\"\"\",,"), ["a \"b\"", "", ""]);
        assert_eq!(records("a\r\n\n\nb\n").unwrap(), [(1, vec!["a".into()]), (4, vec!["b".into()])]);
        for (text, error) in [
            ("x\na\"b", "line 2: a quote within a field that does not begin with one"),
            ("\"a", "line 1: a quote is not closed"),
            ("\"a\"b,c", "line 1: a quoted field goes on after its closing quote"),
        ] {
            assert_eq!(records(text).unwrap_err(), error);
        }
    }
}
