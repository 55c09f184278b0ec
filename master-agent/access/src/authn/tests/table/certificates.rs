//! Client certificates.

use rcgen::{DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, SerialNumber, date_time_ymd};

use super::{Rows, TOKENS, X509, X509_CAS, X509_CRL};
use crate::authn::{
    FailureReason,
    tests::{
        Request,
        world::{self, World},
    },
};

pub(super) fn rows(rows: &mut Rows, world: &World) {
    let ca = &world.ca;
    let named = |change: &dyn Fn(&mut rcgen::DistinguishedName)| {
        Request::certificates(world.leaf("alice", |params| change(&mut params.distinguished_name)))
    };
    let alice = Request::certificates(world.leaf("alice", |_| {}));
    let plain = Ok("alice [system:authenticated] by x509");
    rows.row("certificate", X509, alice.clone(), plain.clone());
    rows.row(
        "certificate with organizations",
        X509,
        named(&|name| {
            name.push(DnType::OrganizationName, "system:masters");
            name.push(DnType::CustomDnType(vec![2, 5, 4, 10]), "dev");
        }),
        Ok("alice [system:masters,dev,system:authenticated] by x509"),
    );
    let node = world.leaf("system:node:n1", |params| {
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    });
    rows.row(
        "kubelet's certificate",
        X509,
        Request::certificates(node),
        Ok("system:node:n1 [system:nodes,system:authenticated] by x509"),
    );
    let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
    rows.row(
        "certificate with a UID",
        X509,
        named(&|name| name.push(uid.clone(), "uid-1")),
        Ok("alice uid=uid-1 [system:authenticated] by x509"),
    );
    rows.row(
        "certificate with a common name of another encoding",
        X509,
        named(&|name| {
            name.push(DnType::CommonName, DnValue::BmpString("alice".try_into().unwrap()));
        }),
        Err(FailureReason::SubjectAttribute),
    );
    rows.row("empty CN", X509, Request::certificates(world.leaf("", |_| {})), Err(FailureReason::CommonName));
    rows.row(
        "no CN",
        X509,
        named(&|name| {
            name.remove(DnType::CommonName);
            name.push(DnType::OrganizationName, "dev");
        }),
        Err(FailureReason::CommonName),
    );
    rows.row(
        "two CNs",
        X509,
        named(&|name| name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "bob")),
        Err(FailureReason::CommonName),
    );
    rows.row(
        "CN with a newline",
        X509,
        Request::certificates(world.leaf("alice\nx-remote-group: system:masters", |_| {})),
        Err(FailureReason::ControlCharacters),
    );
    rows.row("certificate's last second", X509, alice.clone(), plain.clone()).at = 30_297_599;
    rows.row("certificate expired", X509, alice.clone(), Err(FailureReason::CertificateExpired)).at =
        366 * 86_400;
    rows.row("certificate not yet valid", X509, alice.clone(), Err(FailureReason::CertificateNotYetValid))
        .at = -15 * 86_400;
    let usage = |usages: Vec<ExtendedKeyUsagePurpose>| {
        Request::certificates(world.leaf("alice", |params| params.extended_key_usages = usages))
    };
    rows.row(
        "certificate without client usage",
        X509,
        usage(vec![ExtendedKeyUsagePurpose::ServerAuth]),
        Err(FailureReason::CertificateUsage),
    );
    rows.row("certificate without any usage", X509, usage(vec![]), Err(FailureReason::CertificateUsage));
    rows.row(
        "certificate with any usage is none for clients",
        X509,
        usage(vec![ExtendedKeyUsagePurpose::Any]),
        Err(FailureReason::CertificateUsage),
    );
    rows.row(
        "certificate with server and client usage",
        X509,
        usage(vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]),
        plain.clone(),
    );
    let serial = |serial: u64| {
        Request::certificates(
            world.leaf("alice", |params| params.serial_number = Some(SerialNumber::from(serial))),
        )
    };
    rows.row("certificate revoked", X509_CRL, serial(66), Err(FailureReason::CertificateRevoked));
    rows.row("certificate not revoked", X509_CRL, serial(67), plain.clone());
    rows.row("revoked without a CRL", X509, serial(66), plain.clone());
    let foreign = Request::certificates(vec![world::leaf(&world.other_ca, "alice", |_| {})]);
    rows.row("certificate of another CA", X509, foreign.clone(), Err(FailureReason::CertificateIssuer));
    rows.row("certificate of the other CA of a bundle", X509_CAS, foreign.clone(), plain.clone());
    let same_name = world::authority("ca");
    rows.row(
        "certificate of a CA with the same name",
        X509,
        Request::certificates(vec![world::leaf(&same_name, "alice", |_| {})]),
        Err(FailureReason::CertificateIssuer),
    );
    let middle = world::intermediate(ca, "middle", |_| {});
    let under = world::leaf(&middle, "alice", |_| {});
    let chained = Request::certificates(vec![under.clone(), middle.der().clone()]);
    rows.row("certificate chained through an intermediate", X509, chained.clone(), plain.clone());
    rows.row(
        "chained, but no CRL of the intermediate",
        X509_CRL,
        chained,
        Err(FailureReason::RevocationUnknown),
    );
    rows.row(
        "intermediate missing",
        X509,
        Request::certificates(vec![under.clone()]),
        Err(FailureReason::CertificateIssuer),
    );
    let second = world::intermediate(&middle, "second", |_| {});
    let deep = world::leaf(&second, "alice", |_| {});
    rows.row(
        "two intermediates in the wrong order",
        X509,
        Request::certificates(vec![deep, middle.der().clone(), second.der().clone()]),
        plain.clone(),
    );
    let no_ca = world::intermediate(ca, "no ca", |params| params.is_ca = IsCa::NoCa);
    let forged = world::leaf(&no_ca, "admin", |_| {});
    rows.row(
        "chained through a certificate that is no CA",
        X509,
        Request::certificates(vec![forged, no_ca.der().clone()]),
        Err(FailureReason::Certificate("EndEntityUsedAsCa".into())),
    );
    let old = world::intermediate(ca, "old", |params| params.not_after = date_time_ymd(2027, 1, 2));
    let under_old = world::leaf(&old, "alice", |_| {});
    rows.row(
        "chained through an expired intermediate",
        X509,
        Request::certificates(vec![under_old, old.der().clone()]),
        Err(FailureReason::CertificateExpired),
    );
    let padded = [vec![under], vec![middle.der().clone(); 2]].concat();
    rows.row(
        "two intermediates of one subject",
        X509,
        Request::certificates(padded),
        Err(FailureReason::Certificate(
            "the chain has several intermediate certificates of one subject".into(),
        )),
    );
    let junk = Request::certificates(vec![b"junk".to_vec().into()]);
    rows.row("junk for a certificate", X509, junk, Err(FailureReason::Certificate("it is not X.509".into())));
    rows.row("no certificate", X509, Request::default(), Err(FailureReason::NoCredential));
    rows.row("certificate where none is asked for", TOKENS, alice, Err(FailureReason::Unrecognized));
}
