//! A network of machines on one host: one network namespace per machine, joined by a bridge. Links between machines can
//! be cut in one direction.
//!
//! The network and the test that uses it run in an outer namespace, which ends with its process: [`run_inside`] runs
//! the test again there. The network requires root and the programs `ip`, `mount` and `unshare`. Without them the test
//! is skipped with a message.

use std::{net::Ipv4Addr, os::fd::AsFd as _, path::Path, process::Command};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use strandline::task;

use crate::skipped::report_skipped;

const INSIDE: &str = "STRANDLINE_TEST_INSIDE";

/// Returns true if this process has a network namespace of its own. Otherwise runs the test with this name in a new
/// process with such a namespace, panics if that test fails, and returns false. If the machine does not support this,
/// prints a message and returns false.
pub(crate) fn run_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Err(reason) = check_support() {
        report_skipped(test, &reason);
        return false;
    }
    let me = std::env::current_exe().expect("the test program has a path");
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--"])
        .arg(me)
        .args([test, "--exact", "--nocapture", "--include-ignored"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare starts");
    assert!(status.success(), "{test}, in a network of its own, exited with {status}");
    false
}

/// Checks that this machine supports network namespaces; the error is the reason why not.
fn check_support() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("network namespaces are the superuser's".to_owned());
    }
    let tried =
        Command::new("unshare").args(["--net", "--mount", "ip", "link", "add", "br0", "type", "bridge"]).output();
    match tried {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("no namespaces here: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("no unshare here: {error}")),
    }
}

/// The network, whose machines are namespaces. The test process has the address [`Network::HUB`].
pub(crate) struct Network(());

impl Network {
    /// Address of the test process, with its clients and the object store.
    pub(crate) const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);

    /// Creates the bridge. Requires a process for which [`run_inside`] returns true.
    pub(crate) fn make() -> Self {
        std::fs::create_dir_all("/run/netns").expect("the folder of namespaces is created");
        run("mount", &["-t", "tmpfs", "tmpfs", "/run/netns"]);
        ip("link set lo up");
        ip("link add br0 type bridge");
        ip(&format!("addr add {}/24 dev br0", Self::HUB));
        ip("link set br0 up");
        Self(())
    }

    /// Adds a machine. `number` is the last part of its address. Returns the address.
    pub(crate) fn add(&self, name: &str, number: u8) -> Ipv4Addr {
        let address = Ipv4Addr::new(10, 77, 0, number);
        ip(&format!("netns add {name}"));
        ip(&format!("link add v{number} type veth peer name eth0 netns {name}"));
        ip(&format!("link set v{number} master br0 up"));
        ip(&format!("-n {name} addr add {address}/24 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} link set lo up"));
        address
    }

    /// Drops all packets from the machine `from` to `to`. Packets in the other direction still arrive.
    pub(crate) fn cut(&self, from: &str, to: Ipv4Addr) {
        ip(&format!("-n {from} route replace blackhole {to}/32"));
    }

    /// Ends a [`Self::cut`]: packets from the machine `from` to `to` arrive again.
    pub(crate) fn mend(&self, from: &str, to: Ipv4Addr) {
        ip(&format!("-n {from} route del blackhole {to}/32"));
    }
}

/// Runs a function in the network namespace of a machine. Sockets that the function creates belong to that machine. The
/// function has a thread of its own, because a thread that has entered a namespace does not leave it.
pub(crate) fn within<T: Send + 'static>(machine: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = std::fs::File::open(format!("/run/netns/{machine}")).expect("the namespace exists");
    let thread = task::spawn_thread("machine", move || {
        let network = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), network).expect("the superuser may enter the namespace");
        act()
    });
    thread.join().expect("the thread did not panic")
}

fn ip(arguments: &str) {
    run("ip", &arguments.split(' ').collect::<Vec<_>>());
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(Path::new(program)).args(arguments).output().expect("the program is installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
