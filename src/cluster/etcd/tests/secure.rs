//! Users and TLS of a real etcd.

use etcd_client::{Client, Permission, PermissionType};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::*;

const SECRET: &str = "correct horse";

/// A certificate authority with the certificates that it signs, as PEM.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate"))
    }

    fn certificate(&self) -> Vec<u8> {
        self.0.pem().into_bytes()
    }

    fn sign(&self) -> EtcdIdentity {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        EtcdIdentity { certificate: certificate.pem().into_bytes(), key: key.serialize_pem().into_bytes() }
    }
}

#[tokio::test]
async fn tls_needs_the_right_authority_and_the_clients_certificate() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = ours.sign();
    let folder = tempfile::tempdir().expect("a directory");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("it is written");
        path.to_str().expect("text").to_owned()
    };
    let flags = [
        "--client-cert-auth".to_owned(),
        format!("--cert-file={}", file("server.pem", &server.certificate)),
        format!("--key-file={}", file("server.key", &server.key)),
        format!("--trusted-ca-file={}", file("ca.pem", &ours.certificate())),
    ];
    let etcd = Etcd::begin(1, "https", &flags);
    let with = |ca: &Authority, identity: Option<EtcdIdentity>| {
        let tls = EtcdTls { ca: Some(ca.certificate()), identity };
        EtcdStore::open(EtcdOptions { tls: Some(tls), ..etcd.options() })
    };
    let store = with(&ours, Some(ours.sign())).await.expect("good options");
    etcd.answers(&store).await;
    let revision = put(&store, "n", "1").await.expect("etcd answers");
    let mut watch = store.watch("n", revision).await.expect("it begins");
    assert_eq!(values_up_to(&mut watch, "1").await, ["1"]);

    let wrong = with(&other, Some(ours.sign())).await.expect("good options");
    let error = put(&wrong, "n", "2").await.expect_err("it is not the authority that we trust");
    assert!(!error.outcome_unknown() && error.to_string().contains("certificate"), "{error}");
    let nobody = with(&ours, None).await.expect("good options");
    let error = nobody.get("n").await.expect_err("etcd wants a certificate");
    assert!(error.retryable(), "{error}");
    let stranger = with(&ours, Some(other.sign())).await.expect("good options");
    stranger.get("n").await.expect_err("etcd trusts another authority");
    let system = EtcdStore::open(etcd.options()).await;
    // On a machine without system authorities, opening the store fails.
    if let Ok(system) = system {
        system.get("n").await.expect_err("the system does not know the authority");
    }
    assert_eq!(value(&store, "n").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn malformed_certificate_or_host_is_rejected_at_once() {
    let ca = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec();
    let identity = EtcdIdentity { certificate: ca.clone(), key: b"-----BEGIN PRIVATE KEY-----\n".to_vec() };
    let tls = EtcdTls { ca: None, identity: Some(identity) };
    let options = EtcdOptions { tls: Some(tls), ..EtcdOptions::new(["https://127.0.0.1:1"]) };
    let error = EtcdStore::open(options).await.expect_err("no key is in it");
    assert!(error.to_string().contains("TLS settings for etcd"), "{error}");
    let error = EtcdStore::open(EtcdOptions::new(["http://a{b:1"])).await.expect_err("no host has such a name");
    assert!(error.to_string().contains("\"http://a{b:1\" is no etcd endpoint"), "{error}");
}

fn user(name: &str, password: &str) -> Option<EtcdLogin> {
    Some(EtcdLogin { user: name.to_owned(), password: password.to_owned() })
}

/// Creates users: root, and a broker with access to the keys below `/ours/`.
async fn switch_users_on(client: &mut Client) {
    client.user_add("root", SECRET, None).await.expect("etcd answers");
    client.user_grant_role("root", "root").await.expect("etcd answers");
    client.role_add("broker").await.expect("etcd answers");
    let permission = Permission::new(PermissionType::Readwrite, "/ours/").with_prefix();
    client.role_grant_permission("broker", permission).await.expect("etcd answers");
    client.user_add("broker", SECRET, None).await.expect("etcd answers");
    client.user_grant_role("broker", "broker").await.expect("etcd answers");
    client.auth_enable().await.expect("etcd answers");
}

#[tokio::test]
async fn login_is_renewed_and_its_failure_is_explained() {
    let etcd = Etcd::start(1).await;
    let with = |login: Option<EtcdLogin>| EtcdStore::open(EtcdOptions { login, ..etcd.options() });
    let store = with(user("broker", SECRET)).await.expect("good options");
    put(&store, "/ours/n", "before").await.expect("etcd has no users yet, and asks for none");
    let mut root = client(etcd.endpoint(0), ConnectOptions::new()).await;
    switch_users_on(&mut root).await;

    let revision = put(&store, "/ours/n", "1").await.expect("it logs in when it must");
    let mut watch = store.watch("/ours/", revision).await.expect("it begins");
    assert_eq!(values_up_to(&mut watch, "1").await, ["1"]);
    let lease = store.grant(Duration::from_secs(30)).await.expect("etcd answers");
    // Every change of the users invalidates all tokens.
    root.update_user(Some(("root".to_owned(), SECRET.to_owned()))).await.expect("etcd answers");
    root.user_add("another", SECRET, None).await.expect("etcd answers");
    put(&store, "/ours/n", "2").await.expect("the token is renewed");
    store.keep_alive(lease).await.expect("etcd answers");
    store.list("/ours/").await.expect("etcd answers");
    assert_eq!(values_up_to(&mut watch, "2").await, ["2"]);

    let wrong = with(user("broker", "battery staple")).await.expect("good options");
    let error = put(&wrong, "/ours/n", "3").await.expect_err("the password is wrong");
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    let said = error.to_string();
    assert!(said.contains("logging in as \"broker\"") && said.contains("authentication failed"), "{said}");
    assert!(!said.contains("battery"), "{said}");
    let nobody = with(None).await.expect("good options");
    let error = put(&nobody, "/ours/n", "3").await.expect_err("etcd wants a user");
    assert!(error.to_string().contains("check the user"), "{error}");
    let error = put(&store, "/theirs/n", "3").await.expect_err("not below what the user may use");
    assert!(!error.outcome_unknown() && error.to_string().contains("permission denied"), "{error}");
    assert_eq!(value(&store, "/ours/n").await.as_deref(), Some("2"));
}
