//! Writes `deploy/reference` from the code: the fields of the configuration files with their JSON Schemas, the commands of
//! both agents, and their metrics.

use std::fmt::Write;

use clap::{Arg, Command, CommandFactory};
use proto_config::{Field, FieldKind, Shape};
use serde_json::{Map, Value, json};

use crate::metrics::golden;

/// A configuration file: its name, what it is, and its fields.
pub struct ConfigurationFile {
    pub name: &'static str,
    pub about: &'static str,
    pub fields: Vec<Field>,
}

/// The configuration files of both agents.
pub fn configuration_files() -> Vec<ConfigurationFile> {
    vec![
        ConfigurationFile {
            name: "master-agent",
            about: "The configuration of master-agent.",
            fields: master_agent::config::Config::describe(),
        },
        ConfigurationFile {
            name: "node-agent",
            about: "The configuration of node-agent.",
            fields: node_agent::config::Config::describe(),
        },
        ConfigurationFile {
            name: "inventory",
            about: "The static inventory, which the field inventory of master-agent.yaml names.",
            fields: master_agent::routing::inventory::Inventory::describe(),
        },
    ]
}

/// All files of the reference, each with its name and its text.
pub fn reference() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for file in configuration_files() {
        files.push((format!("{}.md", file.name), fields_page(&file)));
        files.push((format!("{}.schema.json", file.name), format!("{:#}\n", schema(&file))));
    }
    files.push(("commands.md".to_owned(), commands_page()));
    files.push(("metrics.md".to_owned(), metrics_page()));
    files
}

const GENERATED: &str =
    "<!-- Generated from the code by `UPDATE=1 cargo test -p tests --test reference`. Do not edit. -->\n";

fn fields_page(file: &ConfigurationFile) -> String {
    let ConfigurationFile { name, about, fields } = file;
    let mut page = format!("{GENERATED}\n# {name}.yaml\n\n{about}\n\n");
    page += "Durations have a unit: `250ms`, `15s`, `24h`. Relative paths are relative to the directory of the file.\n";
    let is_table = |field: &&Field| !matches!(field.kind, FieldKind::Value(_));
    let single: Vec<&Field> = fields.iter().filter(|field| !is_table(field)).collect();
    if !single.is_empty() {
        page += "\n## General\n\n";
        table(&mut page, single.into_iter().map(|field| (field.name.clone(), field)));
    }
    for field in fields.iter().filter(is_table) {
        let mut rows = Vec::new();
        flatten(field, &field.name, &mut rows);
        write!(page, "\n## {}\n\n", field.name).unwrap();
        table(&mut page, rows.into_iter());
    }
    page
}

/// The field and all fields in it, each with its path.
fn flatten<'f>(field: &'f Field, path: &str, rows: &mut Vec<(String, &'f Field)>) {
    if field.name != "[]" {
        rows.push((path.to_owned(), field));
    }
    for inner in &field.fields {
        let path = if inner.name == "[]" { format!("{path}[]") } else { format!("{path}.{}", inner.name) };
        flatten(inner, &path, rows);
    }
}

fn table<'f>(page: &mut String, rows: impl Iterator<Item = (String, &'f Field)>) {
    page.push_str("| field | type | default | meaning |\n| --- | --- | --- | --- |\n");
    for (path, field) in rows {
        let (kind, default) = (kind(field), default(field));
        writeln!(page, "| `{path}` | {kind} | {default} | {} |", cell(field.about)).unwrap();
    }
}

/// A text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn kind(field: &Field) -> String {
    let kind = match field.kind {
        FieldKind::Value(shape) => shape_name(shape),
        FieldKind::Section => "section".to_owned(),
        FieldKind::Choice => "section with exactly one field".to_owned(),
        FieldKind::List => match field.fields.first().map(|element| element.kind) {
            Some(FieldKind::Value(shape)) => format!("list: {}", shape_name(shape)),
            Some(FieldKind::Section | FieldKind::Choice) => "list of sections".to_owned(),
            Some(FieldKind::List) | None => "list".to_owned(),
        },
    };
    match &field.range {
        Some((least, greatest)) => format!("{kind}, `{least}` to `{greatest}`"),
        None => kind,
    }
}

fn shape_name(shape: Shape) -> String {
    match shape {
        Shape::Boolean => "`true` or `false`".to_owned(),
        Shape::Integer => "whole number".to_owned(),
        Shape::Number => "number".to_owned(),
        Shape::Port => "port".to_owned(),
        Shape::Ports => "port, range or list".to_owned(),
        Shape::Words(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" or "),
        Shape::Text { name, .. } => name.to_owned(),
    }
}

fn default(field: &Field) -> String {
    match (&field.default, field.kind) {
        _ if field.required => "required".to_owned(),
        (Some(_), FieldKind::Section) => "that of its fields".to_owned(),
        (Some(default), _) => format!("`{default}`"),
        (None, FieldKind::List) => "`[]`".to_owned(),
        // The meaning says what holds then.
        (None, _) if field.about.contains("By default") => String::new(),
        (None, _) => "none".to_owned(),
    }
}

/// The JSON Schema of a configuration file.
pub fn schema(file: &ConfigurationFile) -> Value {
    let mut schema = section_schema(&file.fields);
    schema.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    schema.insert("title".to_owned(), json!(format!("{}.yaml", file.name)));
    schema.insert("description".to_owned(), json!(file.about));
    Value::Object(schema)
}

fn section_schema(fields: &[Field]) -> Map<String, Value> {
    let properties: Map<String, Value> =
        fields.iter().map(|field| (field.name.clone(), field_schema(field))).collect();
    let required: Vec<&str> =
        fields.iter().filter(|field| field.required).map(|field| field.name.as_str()).collect();
    let mut schema = Map::new();
    schema.insert("type".to_owned(), json!("object"));
    schema.insert("additionalProperties".to_owned(), json!(false));
    schema.insert("properties".to_owned(), Value::Object(properties));
    if !required.is_empty() {
        schema.insert("required".to_owned(), json!(required));
    }
    schema
}

fn field_schema(field: &Field) -> Value {
    let mut schema = match field.kind {
        FieldKind::Value(shape) => value_schema(field, shape),
        FieldKind::Section => section_schema(&field.fields),
        FieldKind::Choice => {
            let mut schema = section_schema(&field.fields);
            schema.insert("minProperties".to_owned(), json!(1));
            schema.insert("maxProperties".to_owned(), json!(1));
            schema
        }
        FieldKind::List => {
            let mut schema = Map::new();
            schema.insert("type".to_owned(), json!("array"));
            if let Some(element) = field.fields.first() {
                schema.insert("items".to_owned(), field_schema(element));
            }
            schema
        }
    };
    let description = match &field.range {
        Some((least, greatest)) => format!("{} From {least} to {greatest}.", field.about),
        None => field.about.to_owned(),
    };
    if !description.is_empty() {
        schema.insert("description".to_owned(), json!(description.trim()));
    }
    Value::Object(schema)
}

fn value_schema(field: &Field, shape: Shape) -> Map<String, Value> {
    let mut schema = match shape {
        Shape::Boolean => json!({"type": "boolean"}),
        Shape::Integer => json!({"type": "integer"}),
        Shape::Number => json!({"type": "number"}),
        Shape::Port => json!({"type": "integer", "minimum": 0, "maximum": 65535}),
        Shape::Ports => ports_schema(),
        Shape::Words(words) => json!({"enum": words}),
        Shape::Text { pattern: Some(pattern), .. } => json!({"type": "string", "pattern": pattern}),
        // A text such as a user's number needs no quotes.
        Shape::Text { pattern: None, .. } => json!({"type": ["string", "number", "boolean"]}),
    };
    let typed = |text: &str| match shape {
        Shape::Boolean | Shape::Integer | Shape::Number | Shape::Port => {
            serde_json::from_str(text).unwrap_or_else(|_| json!(text))
        }
        Shape::Ports | Shape::Words(_) | Shape::Text { .. } => json!(text),
    };
    if let Some(default) = &field.default {
        schema["default"] = typed(default);
    }
    if let (Shape::Integer, Some((least, greatest))) = (shape, &field.range) {
        schema["minimum"] = typed(least);
        schema["maximum"] = typed(greatest);
    }
    match schema {
        Value::Object(schema) => schema,
        other => unreachable!("{other}"),
    }
}

fn ports_schema() -> Value {
    let port = json!({"type": "integer", "minimum": 1, "maximum": 65535});
    let range = json!({"type": "string", "pattern": "^[0-9]{1,5}( *- *[0-9]{1,5})?$"});
    let list = json!({"type": "array", "items": {"anyOf": [port, range]}, "minItems": 1});
    json!({"anyOf": [port, range, list]})
}

fn commands_page() -> String {
    let mut page = format!("{GENERATED}\n# Commands\n\nEvery command also has `--help` and `--version`.\n");
    for agent in [master_agent::cli::Cli::command(), node_agent::cli::Cli::command()] {
        let name = agent.get_name().to_owned();
        write_command(&mut page, &agent, &name, 2);
    }
    page
}

fn write_command(page: &mut String, command: &Command, name: &str, level: usize) {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    write!(page, "\n{} {name}\n\n{about}.\n", "#".repeat(level)).unwrap();
    let arguments: Vec<&Arg> = command.get_arguments().filter(|argument| !argument.is_hide_set()).collect();
    if !arguments.is_empty() {
        page.push_str("\n| argument | default | meaning |\n| --- | --- | --- |\n");
    }
    for argument in arguments {
        writeln!(page, "{}", argument_row(argument)).unwrap();
    }
    for inner in command.get_subcommands() {
        write_command(page, inner, &format!("{name} {}", inner.get_name()), 3);
    }
}

fn argument_row(argument: &Arg) -> String {
    let mut names = Vec::new();
    names.extend(argument.get_short().map(|short| format!("-{short}")));
    names.extend(argument.get_long().map(|long| format!("--{long}")));
    let value = match argument.get_value_names() {
        Some(values) => values.iter().map(|value| value.to_string()).collect::<Vec<_>>().join(" "),
        None => argument.get_id().as_str().to_uppercase(),
    };
    if argument.is_positional() {
        names.push(value);
    } else if argument.get_action().takes_values()
        && let Some(last) = names.last_mut()
    {
        *last = format!("{last} {value}");
    }
    let names = names.into_iter().map(|name| format!("`{}`", cell(&name))).collect::<Vec<_>>().join(", ");
    let defaults = argument.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy()));
    let default = match defaults.collect::<Vec<_>>().join(", ") {
        // A flag has the value false.
        _ if !argument.get_action().takes_values() => String::new(),
        none if none.is_empty() && argument.is_required_set() => "required".to_owned(),
        shown => shown,
    };
    let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
    format!("| {names} | {default} | {}. |", cell(&help))
}

fn metrics_page() -> String {
    let mut page = format!(
        "{GENERATED}\n# Metrics\n\nThe end-to-end tests compare these with what the agents serve. \
         [Scrape metrics](../guide/metrics.md) says what the labels have.\n"
    );
    for (title, name) in [
        ("master-agent", "master-agent"),
        ("master-agent, under the names of other programs", "compatibility"),
        ("node-agent", "node-agent"),
    ] {
        write!(page, "\n## {title}\n\n| name | type | labels | meaning |\n| --- | --- | --- | --- |\n")
            .unwrap();
        for (name, metric) in golden(name) {
            let labels =
                metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
            writeln!(page, "| `{name}` | {} | {labels} | {} |", metric.kind, cell(&metric.help)).unwrap();
        }
    }
    page
}
