//! Layers, error messages, the printed file and the documentation.

use std::{net::SocketAddr, path::Path, time::Duration};

use super::{settings::DefaultValue, value::ValueKind, *};
use crate::{model::BrokerId, telemetry::LogFormat};

fn load(text: &str) -> Result<LoadedConfig, ConfigErrors> {
    ConfigSources::new().file(Path::new("s.toml"), text).load()
}

fn error(text: &str) -> String {
    load(text).expect_err(text).to_string()
}

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn keys_of_file_are_read() {
    let text = r#"
cluster = "blue"
[broker]
id = 7
rack = "zone-a"
data_dir = "/var/lib/s"
[grpc]
listen = "0.0.0.0:1000"
advertise = "b7.example:1000"
[http]
listen = "127.0.0.1:1001"
[object_store]
url = "s3://bucket/prefix"
endpoint = "http://127.0.0.1:9000"
region = "eu-west-1"
path_style = true
[topic_defaults]
"segment.bytes" = 1048576
retention.ms = "-1"
"remote.storage.enable" = false
[log]
journal_bytes = "1GiB"
[tier]
garbage_grace = "90m"
[telemetry]
format = "json"
"#;
    let config = load(text).expect("valid").config;
    assert_eq!(
        (config.cluster.as_str(), config.broker.id, config.broker.rack.as_deref()),
        ("blue", BrokerId(7), Some("zone-a"))
    );
    assert_eq!(config.grpc.advertise.as_deref(), Some("b7.example:1000"));
    assert_eq!(config.object_store.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
    assert_eq!(config.object_store.path_style, Some(true));
    assert_eq!(config.topic_defaults["segment.bytes"], "1048576");
    assert_eq!(config.topic_defaults["retention.ms"], "-1");
    assert_eq!(config.topic_defaults["remote.storage.enable"], "false");
    assert_eq!((config.log.journal_bytes, config.tier.garbage_grace), (1 << 30, Duration::from_secs(5400)));
    assert_eq!(config.telemetry.format, LogFormat::Json);
}

#[test]
fn flag_overrides_environment_file_and_default() {
    let sources = ConfigSources::new()
        .with_default("broker.data_dir", "/dev-data")
        .file(Path::new("s.toml"), "cluster = \"file\"\n[broker]\nid = 2\nrack = \"file\"")
        .environment(variables(&[
            ("STRANDLINE_CLUSTER", "environment"),
            ("STRANDLINE_BROKER_ID", "3"),
            ("STRANDLINE_BROKER_RACK", ""),
            ("STRANDLINE_TOPIC_DEFAULTS", "segment.bytes=20000, retention.ms=5"),
            ("HOME", "/root"),
        ]))
        .flag("broker.id", "4");
    let settings = sources.load().expect("valid");
    let config = &settings.config;
    assert_eq!((config.broker.id, config.cluster.as_str()), (BrokerId(4), "environment"));
    assert_eq!(config.broker.rack.as_deref(), Some("file"), "an empty variable counts as not set");
    assert_eq!(config.broker.data_dir, Path::new("/dev-data"));
    assert_eq!(config.topic_defaults.len(), 2);
    let printed = settings.print();
    for (line, source) in [
        ("id = 4", "# flag"),
        ("cluster = \"environment\"", "# env STRANDLINE_CLUSTER"),
        ("rack = \"file\"", "# file s.toml:4:1"),
        ("\"segment.bytes\" = \"20000\"", "# env STRANDLINE_TOPIC_DEFAULTS"),
        ("listen = \"127.0.0.1:9460\"", "# default"),
    ] {
        let found = printed.lines().any(|found| found.starts_with(line) && found.ends_with(source));
        assert!(found, "{line} {source}\n{printed}");
    }
}

#[test]
fn unknown_key_error_names_source_and_similar_key() {
    for (text, expected) in [
        (
            "[grpc]\nlisten = \"127.0.0.1:1\"\n  advertize = \"a:1\"",
            "s.toml:3:3: there is no setting \"grpc.advertize\"; did you mean \"grpc.advertise\"?",
        ),
        ("[grcp]\n", "s.toml:1:2: there is no setting \"[grcp]\"; did you mean \"[grpc]\"?"),
        ("data_dir = \"x\"", "s.toml:1:1: there is no setting \"data_dir\"; did you mean \"broker.data_dir\"?"),
        (
            "[topic_defaults]\n\"segment.byte\" = 5",
            "s.toml:2:1: there is no setting \"topic_defaults.segment.byte\"; did you mean \"segment.bytes\"?",
        ),
        ("[http]\nqqqqqqqq = 1", "s.toml:2:1: there is no setting \"http.qqqqqqqq\""),
        ("ünï = 1", "s.toml:1:1: "),
    ] {
        assert!(error(text).contains(expected), "{}\n{expected}", error(text));
    }
    let environment = ConfigSources::new().environment(variables(&[("STRANDLINE_GRPC_LISTN", "127.0.0.1:1")]));
    let message = environment.load().expect_err("unknown").to_string();
    assert!(
        message.contains("STRANDLINE_GRPC_LISTN") && message.contains("did you mean \"STRANDLINE_GRPC_LISTEN\"?"),
        "{message}"
    );
    let flag = ConfigSources::new().flag("grpc.listn", "x").load().expect_err("unknown").to_string();
    assert!(flag.contains("command line") && flag.contains("grpc.listen"), "{flag}");
}

/// Regression: `STRANDLINE_BROKR_ID=1 strandline config print` reported no error and ignored the variable.
#[test]
fn unknown_variable_with_prefix_is_rejected() {
    for (name, near) in [
        ("STRANDLINE_BROKR_ID", Some("STRANDLINE_BROKER_ID")),
        ("STRANDLINE_CLUSTR", Some("STRANDLINE_CLUSTER")),
        ("STRANDLINE_BOOTSTRAPS", Some("STRANDLINE_BOOTSTRAP")),
        ("STRANDLINE_TOPICS_DEFAULT", Some("STRANDLINE_TOPIC_DEFAULTS")),
        ("STRANDLINE_GRPC_PORT", None),
        ("STRANDLINE_QQQ", None),
    ] {
        let message =
            ConfigSources::new().environment(variables(&[(name, "9460")])).load().expect_err(name).to_string();
        assert!(message.starts_with(&format!("environment variable {name}: there is no setting")), "{message}");
        if let Some(near) = near {
            assert!(message.ends_with(&format!("did you mean {near:?}?")), "{message}");
        }
    }
}

/// Regression: errors name topic keys as `topic_defaults.segment.bytes`, but `--set` rejected that form.
#[test]
fn flag_sets_single_topic_default() {
    let sources = ConfigSources::new()
        .flag("topic_defaults", "segment.bytes=20000,retention.ms=5")
        .flag("topic_defaults.segment.bytes", "30000");
    let config = sources.load().expect("valid").config;
    assert_eq!((config.topic_defaults["segment.bytes"].as_str(), config.topic_defaults.len()), ("30000", 2));
    for (key, value, parts) in [
        ("topic_defaults.segment.bytes", "5", ["topic_defaults.segment.bytes", "16384"]),
        ("topic_defaults.segment.byte", "20000", ["topic_defaults.segment.byte", "did you mean \"segment.bytes\"?"]),
    ] {
        let message = ConfigSources::new().flag(key, value).load().expect_err(key).to_string();
        assert!(message.starts_with("command line") && parts.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn variables_of_clients_and_kubernetes_are_ignored() {
    let foreign = variables(&[
        ("STRANDLINE_BOOTSTRAP", "a:1"),
        ("STRANDLINE_RACK", "zone-a"),
        ("STRANDLINE_GRPC_SERVICE_HOST", "10.0.0.1"),
        ("STRANDLINE_GRPC_SERVICE_PORT_GRPC", "9460"),
        ("STRANDLINE_GRPC_PORT", "tcp://10.0.0.1:9460"),
        ("STRANDLINE_GRPC_PORT_9460_TCP_ADDR", "10.0.0.1"),
    ]);
    ConfigSources::new().environment(foreign).load().expect("Kubernetes variables are ignored");
}

#[test]
fn invalid_value_error_names_source_and_allowed_values() {
    for (text, parts) in [
        ("[grpc]\nlisten = \"localhost\"", ["s.toml:2:1", "grpc.listen", "\"localhost\"", "an IP address and a port"]),
        ("[grpc]\nlisten = 5", ["s.toml:2:1", "grpc.listen", "\"5\"", "an IP address and a port"]),
        ("[broker]\nid = -1", ["s.toml:2:1", "broker.id", "\"-1\"", "from 0 to 2147483647"]),
        ("[broker]\nid = \"1\"", ["s.toml:2:1", "broker.id", "\"1\"", "a whole number"]),
        ("[log]\njournal_bytes = \"1MB\"", ["s.toml:2:1", "log.journal_bytes", "\"1MB\"", "from 16MiB to 1TiB"]),
        ("[tier]\ncheck_interval = 5", ["s.toml:2:1", "tier.check_interval", "\"5\"", "a time with its unit"]),
        ("[object_store]\npath_style = \"yes\"", ["s.toml:2:1", "object_store.path_style", "\"yes\"", "true or false"]),
        (
            "[object_store]\nurl = \"file://data\"",
            ["s.toml:2:1", "object_store.url", "\"file://data\"", "absolute path"],
        ),
        ("[object_store]\nurl = \"ftp://x\"", ["s.toml:2:1", "object_store.url", "\"ftp://x\"", "s3://"]),
        ("[object_store]\nurl = \"abfss://x\"", ["s.toml:2:1", "object_store.url", "\"abfss://x\"", "abfs://"]),
        ("[object_store]\nurl = \"s3://\"", ["s.toml:2:1", "object_store.url", "\"s3://\"", "a bucket's name"]),
        (
            "[topic_defaults]\n\"segment.bytes\" = 12",
            ["s.toml:2:1", "topic_defaults.segment.bytes", "\"12\"", "from 16384"],
        ),
        ("[telemetry]\nformat = \"xml\"", ["s.toml:2:1", "telemetry.format", "\"xml\"", "text or json"]),
        ("[telemetry]\nlevel = \"loud\"", ["s.toml:2:1", "telemetry.level", "\"loud\"", "use error, warn"]),
        ("cluster = \"a/b\"", ["s.toml:1:1", "cluster", "\"a/b\"", "1 to 100"]),
        ("broker = 5", ["s.toml:1:1", "broker", "", ""]),
    ] {
        let message = error(text);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}\n{parts:?}");
    }
}

#[test]
fn conflicting_values_are_rejected() {
    for (text, part) in [
        (
            "[grpc]\nlisten = \"127.0.0.1:5\"\n[http]\nlisten = \"127.0.0.1:5\"",
            "s.toml:4:1: grpc.listen 127.0.0.1:5 and http.listen 127.0.0.1:5 are the same port",
        ),
        ("[grpc]\nlisten = \"127.0.0.1:9461\"", "s.toml:2:1: "),
        (
            "[grpc]\nlisten = \"127.0.0.1:9470\"\n[metadata]\netcd = [\"http://a:1\"]",
            "s.toml:2:1: grpc.listen 127.0.0.1:9470 and peer.listen 127.0.0.1:9470 are the same port",
        ),
        (
            "[peer]\nlisten = \"0.0.0.0:9461\"\n[metadata]\netcd = [\"http://a:1\"]",
            "s.toml:2:1: http.listen 127.0.0.1:9461 and peer.listen 0.0.0.0:9461 are the same port",
        ),
        ("[peer]\nadvertise = \"0.0.0.0:9470\"", "s.toml:2:1: peer.advertise 0.0.0.0:9470"),
        (
            "[grpc]\nadvertise = \"b:1\"\n[peer]\nlisten = \"127.0.0.1:5\"\n[metadata]\netcd = [\"http://a:1\"]",
            "s.toml:4:1: peer.listen 127.0.0.1:5 is loopback, but brokers would connect to b:5: set peer.advertise",
        ),
        (
            "[grpc]\nlisten = \"127.0.0.1:1\"\nadvertise = \"10.0.0.1:1\"\n[metadata]\netcd = [\"http://a:1\"]",
            "s.toml:2:1: peer.listen 127.0.0.1:9470 is loopback, but brokers would connect to 10.0.0.1:9470: set \
             peer.advertise",
        ),
        (
            "[grpc]\nlisten = \"[fd00::1]:1\"\n[peer]\nlisten = \"0.0.0.0:5\"\n[metadata]\netcd = [\"http://a:1\"]",
            "s.toml:4:1: peer.listen 0.0.0.0:5 is IPv4, but brokers would connect to [fd00::1]:5: set peer.advertise",
        ),
        (
            "[grpc]\nadvertise = \"10.0.0.1:1\"\n[peer]\nlisten = \"[fd00::1]:5\"\n[metadata]\netcd = [\"http://a:1\"]",
            "s.toml:4:1: peer.listen [fd00::1]:5 is IPv6, but brokers would connect to 10.0.0.1:5: set peer.advertise",
        ),
        ("[grpc]\nlisten = \"0.0.0.0:9460\"", "set grpc.advertise"),
        ("[grpc]\nlisten = \"0.0.0.0:9460\"\nadvertise = \"0.0.0.0:9460\"", "name a host"),
        (
            "[metadata]\netcd = [\"http://a:1\", \"http://a:1\"]",
            "s.toml:2:1: metadata.etcd: the etcd endpoint http://a:1 is named twice",
        ),
        ("[metadata]\netcd = [\"http://a\"]", "it has no port"),
        ("[metadata]\netcd = [\"http://u:secret@a:1\"]", "metadata.etcd_user and metadata.etcd_password_file"),
        ("[metadata]\netcd_ca = \"ca.pem\"", "s.toml:2:1: metadata.etcd_ca is set and metadata.etcd is not"),
        ("[metadata]\netcd = [\"https://a:1\"]\netcd_cert = \"c\"", "metadata.etcd_cert requires metadata.etcd_key"),
        ("[metadata]\netcd = [\"http://a:1\"]\netcd_password_file = \"p\"", "requires metadata.etcd_user"),
        ("[metadata]\nrequest_timeout = \"99ms\"", "use a time with its unit from 100ms to 10s"),
        ("[metadata]\nsession_timeout = \"1s\"", "from 2s to 60s"),
        ("[object_store]\nurl = \"file:///x\"\nendpoint = \"http://a\"", "is for s3:// URLs only"),
    ] {
        assert!(error(text).contains(part), "{}\n{part}", error(text));
    }
    load("[grpc]\nlisten = \"127.0.0.1:0\"\n[http]\nlisten = \"127.0.0.1:0\"")
        .expect("port 0 selects a free port for each");
    for text in [
        "[grpc]\nadvertise = \"localhost:1\"\n",
        "[grpc]\nadvertise = \"b:1\"\n[peer]\nadvertise = \"b:9470\"\n",
        "[grpc]\nadvertise = \"b:1\"\n[peer]\nlisten = \"127.0.0.1:0\"\n",
        "[grpc]\nadvertise = \"10.0.0.1:1\"\n[peer]\nlisten = \"[::]:5\"\n",
    ] {
        load(&format!("{text}[metadata]\netcd = [\"http://a:1\"]")).expect(text);
    }
    load("[topic_defaults]\n\"retention.ms\" = -1\n\"local.retention.ms\" = -1").expect("both are raised");
}

#[test]
fn etcd_password_is_read_from_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let password = dir.path().join("password");
    let text = format!(
        "[metadata]\netcd = [\"http://a:1\", \"http://b:2\"]\netcd_user = \"strandline\"\netcd_password_file = {:?}\n\
         request_timeout = \"500ms\"",
        password.display().to_string()
    );
    let config = load(&text).expect("valid").config;
    let message = config.etcd().expect_err("there is no such file").to_string();
    assert!(message.contains("metadata.etcd_password_file") && message.contains("password"), "{message}");
    std::fs::write(&password, "").expect("written");
    assert!(config.etcd().expect_err("empty").to_string().contains("the file is empty"));
    std::fs::write(&password, "a secret\n").expect("written");
    let options = config.etcd().expect("readable").expect("etcd is named");
    assert_eq!((options.endpoints.len(), options.request_timeout), (2, Duration::from_millis(500)));
    assert_eq!(options.login.expect("named").password, "a secret", "the line end is removed");
    assert!(options.tls.is_none());
    assert!(load("").expect("valid").config.etcd().expect("nothing to read").is_none());
}

#[test]
fn zero_means_never_or_unlimited() {
    let config =
        load("[controller]\nreplace_after = \"0s\"\n[replication]\ncatchup_bytes_per_second = 1048576").expect("valid");
    assert_eq!(config.config.controller.replace_after, None);
    assert_eq!(config.config.replication.catchup_bytes_per_second, Some(1 << 20));
    let config = load("").expect("valid").config;
    assert_eq!(config.controller.replace_after, Some(Duration::from_secs(1800)));
    assert_eq!((config.replication.catchup_bytes_per_second, config.replication.default_factor), (None, 1));
}

#[test]
fn all_errors_are_returned_together() {
    let message = error("[broker]\nid = \"x\"\nrak = \"y\"\n[grpc]\nlisten = \"z\"");
    assert_eq!(message.lines().count(), 3, "{message}");
}

#[test]
fn invalid_toml_error_names_line_and_column() {
    let message = error("cluster = \"a\"\n[broker\nid = 1");
    assert!(message.starts_with("s.toml:2:"), "{message}");
    for text in ["\u{0}", "a = ", "= 1", "[a]\n[a]", "x = 99999999999999999999", "[[broker]]\nid=1", "\"\" = 1", "é"] {
        assert!(load(text).is_err(), "{text:?}");
    }
    let missing = ConfigSources::new().read_file(Path::new("/nonexistent/s.toml")).expect_err("missing").to_string();
    assert!(missing.contains("/nonexistent/s.toml"), "{missing}");
}

#[test]
fn printed_configuration_loads_to_same_values() {
    let text = "[broker]\nrack = \"a\\\"b\\\\c # d\"\n[object_store]\nurl = \"memory:///\"\n[cache]\ndisk_bytes = 0\n";
    let first = load(text).expect("valid");
    let second = load(&first.print()).expect("what was printed is valid");
    let mut config = first.config.clone();
    // The printed file contains every topic default, set or not.
    config.topic_defaults = second.config.topic_defaults.clone();
    assert_eq!(second.config, config);
    assert_eq!(second.config.topic_defaults.len(), crate::model::TOPIC_CONFIG_KEYS.len());
}

/// Regression: the environment accepts the number `007` and TOML does not, so the printed file was invalid.
#[test]
fn number_is_printed_as_valid_toml() {
    let from = |spelling| ConfigSources::new().environment(variables(&[("STRANDLINE_BROKER_ID", spelling)])).load();
    for spelling in ["007", "7"] {
        let printed = from(spelling).expect(spelling).print();
        assert!(printed.contains("\nid = 7 "), "{spelling}: {printed}");
        assert_eq!(load(&printed).expect(spelling).config.broker.id, BrokerId(7));
    }
    // Regression: the check accepted a number with a sign, and the conversion to a number panicked.
    let refused = from("+7").expect_err("a sign").to_string();
    assert!(refused.contains("STRANDLINE_BROKER_ID") && refused.contains("\"+7\""), "{refused}");
}

#[test]
fn passwords_are_masked_in_errors() {
    let message = error("[object_store]\nurl = \"s3://key:secret@bucket/p\"");
    assert!(message.contains("no user or password") && !message.contains("secret"), "{message}");
    let message = error(
        "[metadata]\netcd = [\"http://root:secret@a:1\", \"nonsense\"]\n[object_store]\nurl = \"ftp://u:secret@x\"",
    );
    assert!(!message.contains("secret"), "{message}");
}

#[test]
fn every_setting_declaration_is_valid() {
    for setting in settings::all() {
        let count = settings::all().filter(|other| other.variable() == setting.variable()).count();
        assert_eq!(count, 1, "{}", setting.key);
        assert!(setting.doc.ends_with('.'), "{}", setting.key);
        match setting.default {
            DefaultValue::Fixed(default) => assert!(setting.kind.accepts(default), "{}", setting.key),
            DefaultValue::Unset => assert!(setting.doc.contains("Unset: "), "{}", setting.key),
            _ => {}
        }
    }
}

/// Loading panics if the type of a field cannot represent a bound.
#[test]
fn every_bound_fits_type_of_field() {
    for setting in settings::all() {
        let bounds = match &setting.kind {
            ValueKind::Number(range) | ValueKind::Bytes(range) => [range.start(), range.end()].map(u64::to_string),
            ValueKind::Time(range) => [range.start(), range.end()].map(|ms| format!("{ms}ms")),
            _ => continue,
        };
        for bound in bounds {
            assert!(setting.kind.accepts(&bound), "{} = {bound}", setting.key);
            let loaded = ConfigSources::new().flag(setting.key, bound).flag("limits.memory_bytes", "1024TiB").load();
            loaded.expect(setting.key);
        }
    }
}

#[test]
fn peer_address_defaults_to_host_for_clients() {
    for (text, bound, advertised) in [
        ("", "127.0.0.1:9470", "127.0.0.1:9470"),
        ("[grpc]\nlisten = \"10.0.0.1:1\"", "10.0.0.1:9470", "10.0.0.1:9470"),
        ("[grpc]\nlisten = \"0.0.0.0:1\"\nadvertise = \"b7.example:2\"", "0.0.0.0:9470", "b7.example:9470"),
        ("[grpc]\nadvertise = \"[::1]:2\"\n[peer]\nlisten = \"[::]:5\"", "[::]:5", "[::1]:5"),
        ("[grpc]\nlisten = \"10.0.0.1:1\"\n[peer]\nlisten = \"0.0.0.0:5\"", "0.0.0.0:5", "10.0.0.1:5"),
        ("[peer]\nlisten = \"10.0.0.2:5\"", "10.0.0.2:5", "10.0.0.2:5"),
        ("[grpc]\nlisten = \"[fe80::1%2]:1\"", "[fe80::1%2]:9470", "[fe80::1%2]:9470"),
        ("[grpc]\nlisten = \"[fe80::1%2]:1\"\n[peer]\nlisten = \"[::]:5\"", "[::]:5", "[fe80::1%2]:5"),
        ("[grpc]\nadvertise = \"b:2\"\n[peer]\nlisten = \"127.0.0.1:0\"", "127.0.0.1:4242", "127.0.0.1:4242"),
        ("[peer]\nadvertise = \"p:6\"", "127.0.0.1:9470", "p:6"),
        ("[peer]\nadvertise = \"p:0\"", "127.0.0.1:9470", "p:9470"),
    ] {
        let config = load(text).expect("valid").config;
        let bound: SocketAddr = bound.parse().expect("valid");
        assert!(config.peer.listen.port() == 0 || config.peer.listen == bound, "{text}: {}", config.peer.listen);
        assert_eq!(config.peer.advertised(bound, &config.grpc), advertised, "{text}");
    }
}

#[test]
fn data_directory_is_created_and_verified() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = ConfigSources::new().load().expect("the defaults are valid").config;
    config.broker.data_dir = dir.path().join("a/b");
    config.prepare_data_dir().expect("made");
    assert_eq!(
        std::fs::read_dir(dir.path().join("a/b")).expect("the directory exists").count(),
        0,
        "the probe file is removed"
    );
    std::fs::write(dir.path().join("file"), "").expect("writes");
    config.broker.data_dir = dir.path().join("file/b");
    let message = config.prepare_data_dir().expect_err("a file is in the way").to_string();
    assert!(message.contains("file/b") && message.contains("broker.data_dir"), "{message}");
}

#[test]
fn documentation_matches_settings() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    if std::env::var_os("STRANDLINE_WRITE_DOCS").is_some() {
        std::fs::write(path, docs()).expect("docs/ can be written");
    }
    let checked_in = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        checked_in == docs(),
        "docs/configuration.md differs from src/config/settings.rs: generate it with `make write-docs`"
    );
}

#[test]
fn memory_shares_follow_total() {
    let shares = |text: &str| {
        let config = load(text).expect("valid").config;
        let mib = [
            config.limits.produce_memory_bytes,
            config.limits.request_memory_bytes,
            config.limits.response_memory_bytes,
            config.limits.decompression_memory_bytes,
            config.log.tail_cache_bytes,
            config.cache.memory_bytes,
        ];
        mib.map(|bytes| bytes >> 20)
    };
    assert_eq!(shares("[limits]\nmemory_bytes = \"512MiB\""), [128, 96, 128, 64, 64, 32]);
    assert_eq!(
        shares("[limits]\nmemory_bytes = \"1TiB\""),
        [256, 3 << 16, 1 << 18, 512, 128, 128],
        "more memory has no effect"
    );
    let lowered = "[limits]\nmemory_bytes = \"512MiB\"\nproduce_memory_bytes = \"1MiB\"";
    assert_eq!(shares(lowered), [1, 96, 128, 64, 64, 32], "the other shares are unchanged");
    let raised =
        "[limits]\nmemory_bytes = \"512MiB\"\nproduce_memory_bytes = \"387MiB\"\n[cache]\nmemory_bytes = \"4MiB\"";
    assert_eq!(shares(raised), [387, 33, 44, 22, 22, 4], "the other parts share the remaining memory");
    let message = error("[limits]\nmemory_bytes = \"512MiB\"\nproduce_memory_bytes = \"512MiB\"");
    for word in ["s.toml:3:1", "leave 0 of limits.memory_bytes", "512MiB", "log.tail_cache_bytes", "less than 1MiB"] {
        assert!(message.contains(word), "{word}: {message}");
    }
    assert!(load("").expect("valid").config.limits.memory_bytes >= 512 << 20);
}

#[test]
fn max_replicas_follows_memory_unless_set() {
    let bound = |text: &str| load(text).expect("valid").config.broker.max_replicas;
    assert_eq!(bound("[limits]\nmemory_bytes = \"2GiB\""), 131_072);
    assert_eq!(bound("[limits]\nmemory_bytes = \"64MiB\""), 4096, "the minimum");
    assert_eq!(bound("[limits]\nmemory_bytes = \"1024TiB\""), 10_000_000);
    assert_eq!(bound("[broker]\nmax_replicas = 7\n[limits]\nmemory_bytes = \"2GiB\""), 7);
    assert!(load("").expect("valid").print().contains("\nmax_replicas = "));
}

#[test]
fn memory_shares_above_total_are_rejected() {
    let message = error(
        "[log]\ntail_cache_bytes = \"300MiB\"\n[cache]\nmemory_bytes = \"300MiB\"\n[limits]\nmemory_bytes = \"512MiB\"",
    );
    for word in
        ["s.toml:2:1", "600MiB", "512MiB", "log.tail_cache_bytes 300MiB", "cache.memory_bytes", "limits.memory_bytes"]
    {
        assert!(message.contains(word), "{word}: {message}");
    }
}
