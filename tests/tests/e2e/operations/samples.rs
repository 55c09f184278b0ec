//! The sample configuration is valid, and shows every field that the agents know.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde_json::{Value, json};
use tests::{cluster::binary, openssh, process::TempDir};

/// A field that no section has, and that resembles none.
const UNKNOWN: &str = "zzz";

/// A directory with the sample configuration and every file that it names.
fn samples() -> TempDir {
    let dir = TempDir::new("samples").unwrap();
    let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config");
    for name in ["master-agent.yaml", "node-agent.yaml", "inventory.yaml"] {
        std::fs::copy(Path::new(samples).join(name), dir.path().join(name)).unwrap();
    }
    let pki = tests::pki::Authority::new("sample").unwrap();
    pki.server(dir.path(), "tls", &["localhost"]).unwrap();
    pki.client(dir.path(), "kubelet-client").unwrap();
    pki.client(dir.path(), "front-proxy-client").unwrap();
    pki.client(dir.path(), "client").unwrap();
    pki.client(dir.path(), "collector-client").unwrap();
    for ca in [
        "client-ca",
        "kubelet-ca",
        "target-ca",
        "apiserver-ca",
        "webhook-ca",
        "oidc-ca",
        "front-end-ca",
        "collector-ca",
    ]
    .map(|ca| format!("{ca}.crt"))
    {
        std::fs::write(dir.path().join(ca), pki.pem()).unwrap();
    }
    std::fs::write(dir.path().join("kubeconfig"), "").unwrap();
    openssh::keygen(&dir.path().join("id_ed25519")).unwrap();
    for secret in ["tokens.csv", "bootstrap-tokens.csv", "collector-headers", "socks5-users"] {
        proto_config::secret_file::write_new(&dir.path().join(secret), b"").unwrap();
    }
    for file in ["service-account.pub", "rbac.yaml", "token"] {
        std::fs::write(dir.path().join(file), "").unwrap();
    }
    dir
}

/// The output of `check-config`, and its errors.
fn check_config(agent: &str, dir: &TempDir) -> (String, String) {
    let config = dir.path().join(format!("{agent}.yaml"));
    let output =
        Command::new(binary(agent)).arg("--config").arg(&config).arg("check-config").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr))
}

#[test]
fn the_sample_files_load() {
    let dir = samples();
    for agent in ["master-agent", "node-agent"] {
        let (said, errors) = check_config(agent, &dir);
        assert_eq!(said, format!("{}: ok\n", dir.path().join(format!("{agent}.yaml")).display()), "{errors}");
    }
}

/// JSON pointers of all objects in a document.
fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.push(at.to_owned());
            fields.iter().for_each(|(name, value)| objects(value, &format!("{at}/{name}"), found));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| objects(value, &format!("{at}/{i}"), found));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Whether a text has a field of this name, in a comment or not.
fn shows(text: &str, field: &str) -> bool {
    text.match_indices(&format!("{field}:")).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && !['_', '-'].contains(&c))
    })
}

/// Asks the agents themselves: each section that has a field too many is answered with the fields that it knows.
#[test]
fn the_samples_show_every_field_that_the_agents_know() {
    let dir = samples();
    for (agent, name, least) in [
        ("master-agent", "master-agent.yaml", 150),
        ("master-agent", "inventory.yaml", 8),
        ("node-agent", "node-agent.yaml", 30),
    ] {
        let file = dir.path().join(name);
        let sample = std::fs::read_to_string(&file).unwrap();
        // The host keys of the cluster's nodes are described as those of the inventory.
        let shown = sample.clone() + &std::fs::read_to_string(dir.path().join("inventory.yaml")).unwrap();
        let document: Value = serde_saphyr::from_str(&sample).unwrap();
        let mut places = Vec::new();
        objects(&document, "", &mut places);
        let mut known = BTreeMap::new();
        for place in &places {
            let mut document = document.clone();
            document.pointer_mut(place).unwrap()[UNKNOWN] = json!(1);
            // JSON is YAML, too.
            std::fs::write(&file, document.to_string()).unwrap();
            let (_, errors) = check_config(agent, &dir);
            // An object of one field that says its kind has no further ones.
            let said = errors
                .lines()
                .find_map(|line| line.split_once(&format!("{UNKNOWN}: unknown field; known here: ")));
            if let Some((_, fields)) = said {
                known.insert(place, fields.split(", ").map(str::to_owned).collect::<Vec<_>>());
            }
        }
        std::fs::write(&file, &sample).unwrap();
        let count: usize = known.values().map(Vec::len).sum();
        println!("{name}: {count} fields in {} sections of {} objects", known.len(), places.len());
        assert!(count >= least, "{name}: only {count} fields are known: {known:?}");
        let missing: Vec<_> = known
            .iter()
            .flat_map(|(place, fields)| fields.iter().map(move |field| (place, field)))
            .filter(|(_, field)| !shows(&shown, field))
            .collect();
        assert!(missing.is_empty(), "{name} does not show {missing:?}");
    }
}
