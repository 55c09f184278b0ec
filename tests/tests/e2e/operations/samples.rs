//! The sample configuration is valid.

use std::{path::Path, process::Command};

use tests::{cluster::binary, openssh, process::TempDir};

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
    openssh::keygen(&dir.path().join("id_ed25519")).unwrap();
    for secret in ["tokens.csv", "bootstrap-tokens.csv", "collector-headers", "socks5-users", "kubeconfig"] {
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
