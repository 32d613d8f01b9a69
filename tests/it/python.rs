//! A Python client whose code is generated from the .proto files alone creates a topic, appends and reads.
//!
//! The first run installs the gRPC tools of Python in a folder of the build. If Python or these tools are not
//! available, the test prints a message and passes, except on CI (`CI=true`), where it fails.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{broker::BrokerInstance, skipped::report_skipped};

/// Runs a command. Returns its standard output, or an error with all of its output if it fails.
fn step(what: &str, command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{what}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{what}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr)))
    }
}

/// Returns the path of a Python that can generate and use gRPC code. Installs its gRPC tools if they are missing.
fn python() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let python = folder.join("bin/python");
    let ready = || step("import grpc_tools", Command::new(&python).args(["-c", "import grpc_tools.protoc, grpc"]));
    if ready().is_err() {
        step("python3 -m venv", Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "grpcio-tools"];
        step("pip install grpcio-tools", Command::new(&python).args(install))?;
        ready()?;
    }
    Ok(python)
}

/// Generates Python code from the .proto files of the client interface into the new folder `into`.
fn generate(python: &Path, into: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::create_dir_all(into).expect("a folder");
    let mut command = Command::new(python);
    command.args(["-m", "grpc_tools.protoc", "--proto_path=proto"]).current_dir(root);
    command.arg(format!("--python_out={}", into.display())).arg(format!("--grpc_python_out={}", into.display()));
    command.args(["types", "log", "admin"].map(|name| format!("proto/strandline/v1/{name}.proto")));
    step("grpc_tools.protoc", &mut command).expect("the interface compiles for Python");
}

#[test]
fn generated_python_client_creates_appends_and_reads() {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "required on CI: {reason}");
            report_skipped("the Python program", &format!("no Python with grpcio-tools here: {reason}"));
            return;
        }
    };
    let mut instance = BrokerInstance::new();
    let generated = instance.path().join("generated");
    generate(&python, &generated);
    let _broker = instance.start();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/roundtrip.py");
    let output = step(
        "roundtrip.py",
        Command::new(&python).arg(program).arg(instance.grpc().to_string()).env("PYTHONPATH", &generated),
    );
    let output = output.unwrap_or_else(|reason| panic!("{reason}\n{}", instance.log()));
    assert!(output.contains("3 records written and read"), "{output}");
}

#[test]
fn python_program_imports_only_the_generated_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/roundtrip.py");
    let text = fs::read_to_string(path).expect("the program");
    let imports: Vec<&str> =
        text.lines().filter(|line| line.starts_with("import ") || line.starts_with("from ")).collect();
    assert_eq!(
        imports,
        [
            "import sys",
            "import grpc",
            "from strandline.v1 import admin_pb2, admin_pb2_grpc, log_pb2, log_pb2_grpc, types_pb2"
        ]
    );
}
