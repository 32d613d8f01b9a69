//! Commands that run while a test continues.

use std::{
    io::{Read, Write as _},
    process::{Child, ChildStdin, Stdio},
    sync::Arc,
    thread,
};

use rustix::process::{Pid, Signal};
use strandline::{task, task::lock::Mutex};

use crate::{broker::Cli, test_timeout::eventually};

/// A command that runs while the test continues, with its output so far. Dropping the value kills the process.
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    pub(crate) stdout: Arc<Mutex<String>>,
    pub(crate) stderr: Arc<Mutex<String>>,
    readers: Vec<thread::JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start(cli: &Cli, arguments: &[&str]) -> Self {
        let mut command = cli.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let (stdout, stderr) = (Arc::<Mutex<String>>::default(), Arc::<Mutex<String>>::default());
        let readers = vec![
            gather(child.stdout.take().expect("piped"), stdout.clone()),
            gather(child.stderr.take().expect("piped"), stderr.clone()),
        ];
        Self { stdin: child.stdin.take(), child, stdout, stderr, readers }
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().expect("open").write_all(bytes).expect("the command reads its input");
    }

    /// Waits until `stream`, which is `stdout` or `stderr`, contains this text.
    pub(crate) fn wait_for_output(&self, stream: &Mutex<String>, text: &str) {
        let output = || stream.lock().clone();
        eventually(&format!("the output contains {text:?}"), || output().contains(text).then_some(()));
    }

    /// Sends a signal and waits for the exit. Returns the exit code and the standard output.
    pub(crate) fn stop(mut self, signal: Signal) -> (Option<i32>, String) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).expect("the process can be signalled");
        let status = self.child.wait().expect("the process exits");
        for reader in self.readers.drain(..) {
            reader.join().expect("read to the end");
        }
        (status.code(), self.stdout.lock().clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Appends the output of a command to `into` on a thread, until the output ends.
fn gather(mut from: impl Read + Send + 'static, into: Arc<Mutex<String>>) -> thread::JoinHandle<()> {
    task::spawn_thread("gather", move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            into.lock().push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    })
}
