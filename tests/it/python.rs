//! A client in another language, made from the .proto files alone.
//!
//! Python is what most machines have. Its gRPC tools go into a folder of the build's own, once. Where there is no
//! Python, or no way to those tools, the test says so and passes, but never on CI (`CI=true`).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{broker::Home, skipped::skipped};

/// A step that must succeed; else what it printed.
fn step(what: &str, command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{what}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{what}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr)))
    }
}

/// A Python that can generate and speak gRPC.
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

/// The code that the .proto files give, in a folder that holds nothing else.
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
fn a_python_program_made_from_the_proto_files_creates_appends_and_reads() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "required on CI: {why}");
            skipped("the Python program", &format!("no Python with grpcio-tools here: {why}"));
            return;
        }
    };
    let mut home = Home::new();
    let generated = home.path().join("generated");
    generate(&python, &generated);
    let _broker = home.start();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/roundtrip.py");
    let said = step(
        "roundtrip.py",
        Command::new(&python).arg(program).arg(home.grpc().to_string()).env("PYTHONPATH", &generated),
    );
    let said = said.unwrap_or_else(|why| panic!("{why}\n{}", home.log()));
    assert!(said.contains("3 records written and read"), "{said}");
}

#[test]
fn the_python_program_is_told_nothing_but_the_generated_code() {
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
