//! Users and TLS of a real etcd.

use etcd_client::{Client, Permission, PermissionType};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::*;
use crate::cluster::{
    embedded::EmbeddedStore,
    monotonic::MonotonicStore,
    session::{RegistrationRequest, SessionState},
};

const SECRET: &str = "correct horse";

/// A certificate authority. It returns certificates and keys as PEM.
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
        std::fs::write(&path, bytes).expect("written");
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
    let store = with(&ours, Some(ours.sign())).await.expect("valid options");
    etcd.wait_until_ready(&store).await;
    let revision = put(&store, "n", "1").await.expect("etcd responds");
    let mut watch = store.watch("n", revision).await.expect("the watch starts");
    assert_eq!(values_up_to(&mut watch, "1").await, ["1"]);

    let wrong = with(&other, Some(ours.sign())).await.expect("valid options");
    let error = put(&wrong, "n", "2").await.expect_err("another authority");
    assert!(!error.outcome_unknown() && error.to_string().contains("certificate"), "{error}");
    let anonymous = with(&ours, None).await.expect("valid options");
    let error = anonymous.get("n").await.expect_err("etcd requires a certificate");
    assert!(error.retryable(), "{error}");
    let other_client = with(&ours, Some(other.sign())).await.expect("valid options");
    other_client.get("n").await.expect_err("etcd trusts another authority");
    let system = EtcdStore::open(etcd.options()).await;
    // On a machine without system authorities, opening the store fails.
    if let Ok(system) = system {
        system.get("n").await.expect_err("the system does not trust the authority");
    }
    assert_eq!(value(&store, "n").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn malformed_certificate_or_host_is_rejected_at_once() {
    let ca = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec();
    let identity = EtcdIdentity { certificate: ca.clone(), key: b"-----BEGIN PRIVATE KEY-----\n".to_vec() };
    let tls = EtcdTls { ca: None, identity: Some(identity) };
    let options = EtcdOptions { tls: Some(tls), ..EtcdOptions::new(["https://127.0.0.1:1"]) };
    let error = EtcdStore::open(options).await.expect_err("no private key");
    assert!(error.to_string().contains("TLS settings for etcd"), "{error}");
    let error = EtcdStore::open(EtcdOptions::new(["http://a{b:1"])).await.expect_err("invalid host");
    assert!(error.to_string().contains("\"http://a{b:1\" is no etcd endpoint"), "{error}");
}

/// Options of a client that logs in as root.
fn root_login() -> ConnectOptions {
    ConnectOptions::new().with_user("root", SECRET)
}

fn user(name: &str, password: &str) -> Option<EtcdLogin> {
    Some(EtcdLogin { user: name.to_owned(), password: password.to_owned() })
}

/// Creates users: root, and a broker with access to the keys below `prefix`.
async fn enable_users(client: &mut Client, prefix: &str) {
    client.user_add("root", SECRET, None).await.expect("etcd responds");
    client.user_grant_role("root", "root").await.expect("etcd responds");
    client.role_add("broker").await.expect("etcd responds");
    let permission = Permission::new(PermissionType::Readwrite, prefix).with_prefix();
    client.role_grant_permission("broker", permission).await.expect("etcd responds");
    client.user_add("broker", SECRET, None).await.expect("etcd responds");
    client.user_grant_role("broker", "broker").await.expect("etcd responds");
    client.auth_enable().await.expect("etcd responds");
}

#[tokio::test]
async fn login_is_renewed_and_its_failure_is_explained() {
    let etcd = Etcd::start(1).await;
    let with = |login: Option<EtcdLogin>| EtcdStore::open(EtcdOptions { login, ..etcd.options() });
    let store = with(user("broker", SECRET)).await.expect("valid options");
    put(&store, "/ours/n", "before").await.expect("etcd has no users yet");
    let mut root = client(etcd.endpoint(0), ConnectOptions::new()).await;
    enable_users(&mut root, "/ours/").await;

    let revision = put(&store, "/ours/n", "1").await.expect("the store logs in");
    let mut watch = store.watch("/ours/", revision).await.expect("the watch starts");
    assert_eq!(values_up_to(&mut watch, "1").await, ["1"]);
    let lease = store.grant(Duration::from_secs(30)).await.expect("etcd responds");
    // Every change of the users invalidates all tokens.
    root.update_user(Some(("root".to_owned(), SECRET.to_owned()))).await.expect("etcd responds");
    root.user_add("another", SECRET, None).await.expect("etcd responds");
    put(&store, "/ours/n", "2").await.expect("the token is renewed");
    store.keep_alive(lease).await.expect("etcd responds");
    store.list("/ours/").await.expect("etcd responds");
    assert_eq!(values_up_to(&mut watch, "2").await, ["2"]);

    let wrong = with(user("broker", "battery staple")).await.expect("valid options");
    let error = put(&wrong, "/ours/n", "3").await.expect_err("the password is wrong");
    assert!(matches!(error, MetaStoreError::Refused { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("logging in as \"broker\"") && text.contains("authentication failed"), "{text}");
    assert!(!text.contains("battery"), "{text}");
    let anonymous = with(None).await.expect("valid options");
    let error = put(&anonymous, "/ours/n", "3").await.expect_err("etcd requires a user");
    assert!(error.to_string().contains("check the etcd user"), "{error}");
    let error = put(&store, "/theirs/n", "3").await.expect_err("no permission for the key");
    assert!(!error.outcome_unknown() && error.to_string().contains("permission denied"), "{error}");
    assert_eq!(value(&store, "/ours/n").await.as_deref(), Some("2"));
}

/// A session whose user may only access the keys of its cluster detects a restored etcd without other requests.
/// Regressions:
///
/// - The session read the key `/strandline/`. etcd rejected each read.
/// - etcd delays a request with a token until it has applied the Raft entry of the login that issued the token. A
///   restored etcd never applies it, but responds to keepalives. The connection with this token was never replaced,
///   because the session cancelled its reads before the request timeout, and because keepalives counted as responses.
#[tokio::test]
async fn session_of_limited_user_detects_restored_etcd() {
    let mut etcd = Etcd::start(1).await;
    let keys = Keys::new("ours").expect("valid");
    let mut root = client(etcd.endpoint(0), ConnectOptions::new()).await;
    enable_users(&mut root, keys.prefix()).await;
    let options = EtcdOptions { login: user("broker", SECRET), ..etcd.options() };
    let direct = EtcdStore::open(options).await.expect("valid options");
    let store = MonotonicStore::new(Arc::new(direct.clone()));
    let tasks = Tasks::new();
    // The cache reads another store, because a list of the restored etcd would detect the restore too.
    let metadata = MetadataCache::start(Arc::new(EmbeddedStore::in_memory()), keys.clone(), &tasks);
    let registration = RegistrationRequest {
        store: Arc::new(store.clone()),
        keys: keys.clone(),
        id: BrokerId(1),
        value: BrokerValue::running_at("b:1".to_owned()),
        // Long enough that the lease does not end during the restarts of etcd.
        session_timeout: Duration::from_secs(15),
    };
    let session = registration.register(None, &metadata, &tasks).await.expect("registered");
    etcd.kill_all();
    etcd.back_up("registered");
    etcd.run_all();
    etcd.wait_until_ready(&direct).await;
    let admin = EtcdStore::open(EtcdOptions { login: user("root", SECRET), ..etcd.options() });
    let admin = admin.await.expect("valid options");
    for n in 0..20 {
        put_with_retries(&admin, "/theirs/n", &n.to_string()).await;
    }
    // Invalidates the session's token. The next one is issued after more Raft entries than the restored etcd applies.
    let mut root = client(etcd.endpoint(0), root_login()).await;
    root.user_change_password("broker", SECRET).await.expect("etcd responds");
    put_with_retries(&direct, &keys.generation(), "newer").await;
    store.get(&keys.generation()).await.expect("etcd responds");
    etcd.kill_all();
    etcd.restore("registered");
    etcd.run_all();
    etcd.wait_until_ready(&admin).await;
    let SessionState::Registered { lease, .. } = *session.state().borrow() else { panic!("the lease has not ended") };
    let detected = async {
        while store.regression().is_none() {
            direct.keep_alive(lease).await.expect("etcd responds to keepalives");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(TEST_TIMEOUT, detected).await.expect("the session detects the restore");
    session.leave().await;
    tasks.stop().await;
}
