//! A network of machines in one machine: a namespace for each, joined by a bridge, with links that can be cut in one direction.
//!
//! All of it lies in a namespace of its own, and so do the tests that use it: [`inside`] runs the test again in there. It goes with the
//! process. It takes the superuser and the programs `ip` and `unshare`; where they are missing the test is skipped, and says so.

use std::{net::Ipv4Addr, os::fd::AsFd as _, path::Path, process::Command};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use strandline::task;

use crate::skipped::skipped;

const INSIDE: &str = "STRANDLINE_TEST_INSIDE";

/// Whether this process is in a network of its own. Where it is not, the test of this name is run again in one, and has passed when
/// this returns.
pub(crate) fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Err(why) = possible() {
        skipped(test, &why);
        return false;
    }
    let me = std::env::current_exe().expect("the test knows its program");
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--"])
        .arg(me)
        .args([test, "--exact", "--nocapture", "--include-ignored"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare runs");
    assert!(status.success(), "{test}, in a network of its own, ended with {status}");
    false
}

fn possible() -> Result<(), String> {
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

/// The network. The tests themselves are at [`Network::HUB`].
pub(crate) struct Network(());

impl Network {
    /// Where the tests' own side is: clients and the object store.
    pub(crate) const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);

    /// Makes the bridge. Only in a process for which [`inside`] holds.
    pub(crate) fn make() -> Self {
        std::fs::create_dir_all("/run/netns").expect("a place for names");
        run("mount", &["-t", "tmpfs", "tmpfs", "/run/netns"]);
        ip("link set lo up");
        ip("link add br0 type bridge");
        ip(&format!("addr add {}/24 dev br0", Self::HUB));
        ip("link set br0 up");
        Self(())
    }

    /// Adds a machine with the last number of its address.
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

    /// From now on nothing comes from the machine `from` to `to`; what comes the other way arrives.
    pub(crate) fn cut(&self, from: &str, to: Ipv4Addr) {
        ip(&format!("-n {from} route replace blackhole {to}/32"));
    }

    /// Ends a cut.
    pub(crate) fn mend(&self, from: &str, to: Ipv4Addr) {
        ip(&format!("-n {from} route del blackhole {to}/32"));
    }
}

/// Does something in the network of a machine; sockets that are made meanwhile are that machine's. On a thread of its own, because a
/// thread does not come back.
pub(crate) fn within<T: Send + 'static>(machine: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = std::fs::File::open(format!("/run/netns/{machine}")).expect("the machine is there");
    let thread = task::spawn_thread("machine", move || {
        let network = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), network).expect("the superuser may");
        act()
    });
    thread.join().expect("it did not fail")
}

fn ip(arguments: &str) {
    run("ip", &arguments.split(' ').collect::<Vec<_>>());
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(Path::new(program)).args(arguments).output().expect("the program is there");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
