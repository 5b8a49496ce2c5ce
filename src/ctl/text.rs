//! A reply as text for people: objects as lines, lists of objects as tables.
//!
//! The invariant: no text contains a control character but newlines of its own.

use std::fmt::Write;

use serde_json::{Map, Value};

/// A text without anything that a terminal would act upon.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        // Directions of writing make a text look like another.
        let is_shown = !character.is_control()
            && !matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if is_shown {
            shown.push(character);
        } else {
            shown.extend(character.escape_default());
        }
    }
    shown
}

/// A reply as text.
pub(crate) fn render(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(object) => add_object(&mut text, object, 0),
        value => text = scalar(value),
    }
    let end = text.trim_end().len();
    text.truncate(end);
    text
}

/// A value that fits into a line.
fn scalar(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => printable(text),
        Value::Array(values) => {
            let texts: Vec<_> = values.iter().map(scalar).collect();
            if texts.is_empty() {
                "none".to_owned()
            } else {
                texts.join(" ")
            }
        }
        Value::Object(object) => {
            if object.is_empty() {
                return "none".to_owned();
            }
            let texts = object
                .iter()
                .map(|(name, value)| format!("{}={}", printable(name), scalar(value)));
            texts.collect::<Vec<_>>().join(" ")
        }
    }
}

/// Whether a value is shown below its name instead of beside it.
fn is_long(value: &Value) -> bool {
    match value {
        Value::Object(object) => !object.is_empty(),
        Value::Array(values) => values.iter().any(Value::is_object),
        _ => false,
    }
}

fn name_of(name: &str) -> String {
    printable(name).replace('_', " ")
}

fn add_object(text: &mut String, object: &Map<String, Value>, indent: usize) {
    let short = object.iter().filter(|(_, value)| !is_long(value));
    let width = short.map(|(name, _)| name_of(name).chars().count()).max();
    let width = width.unwrap_or(0);
    for (name, value) in object {
        let name = name_of(name);
        let margin = " ".repeat(indent);
        // Writing to a string doesn't fail.
        match value {
            Value::Object(inner) if is_long(value) => {
                let _ = writeln!(text, "{margin}{name}:");
                add_object(text, inner, indent + 2);
            }
            Value::Array(values) if is_long(value) => {
                let _ = writeln!(text, "{margin}{name}:");
                add_list(text, values, indent + 2);
            }
            value => {
                let _ = writeln!(text, "{margin}{name:width$}  {}", scalar(value));
            }
        }
    }
}

/// Adds a list of objects: as a table, unless one of them contains another list.
fn add_list(text: &mut String, values: &[Value], indent: usize) {
    let objects: Vec<_> = values.iter().filter_map(Value::as_object).collect();
    let is_table = !objects.iter().any(|object| object.values().any(is_long));
    if is_table {
        add_table(text, &objects, indent);
        return;
    }
    for object in objects {
        add_object(text, object, indent);
        text.push('\n');
    }
}

fn add_table(text: &mut String, objects: &[&Map<String, Value>], indent: usize) {
    let Some(first) = objects.first() else {
        return;
    };
    let names: Vec<_> = first.keys().collect();
    let header = names.iter().map(|name| name_of(name).to_uppercase());
    let mut rows = vec![header.collect::<Vec<_>>()];
    rows.extend(objects.iter().map(|object| {
        let cells = names.iter();
        let cell = |name: &&String| object.get(*name).map_or_else(String::new, scalar);
        cells.map(cell).collect()
    }));
    let is_number = |column: usize| {
        let values = objects
            .iter()
            .filter_map(|object| object.get(names[column]));
        values.into_iter().all(Value::is_number)
    };
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<_> = (0..names.len()).map(|at| width(at).unwrap_or(0)).collect();
    for row in &rows {
        let mut line = " ".repeat(indent);
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            // Writing to a string doesn't fail.
            let _ = match is_number(column) {
                true => write!(line, "{cell:>width$}  "),
                false => write!(line, "{cell:width$}  "),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_of_a_guest_reach_no_terminal() {
        let named = printable("a\u{1b}[2Jb\nc\u{9b}d\u{202e}e");
        assert_eq!(named, "a\\u{1b}[2Jb\\nc\\u{9b}d\\u{202e}e");
        let list = json!({ "inodes": [{ "path": "/\u{1b}]0;x\u{7}" }] });
        assert!(!render(&list).contains('\u{1b}'), "{}", render(&list));
    }

    #[test]
    fn objects_are_lines_and_lists_are_tables() {
        let reply = json!({
            "process": 7,
            "up_for": null,
            "log": { "level": "info" },
            "queues": [
                { "name": "a", "used": 1 },
                { "name": "long", "used": 10 },
            ],
        });
        let expected = "process  7\nup for   -\nlog:\n  level  info\nqueues:\n  NAME  USED\n  \
                        a        1\n  long    10";
        assert_eq!(render(&reply), expected);
    }
}
