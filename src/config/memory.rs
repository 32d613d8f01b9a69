//! Memory that clients can make a broker use: the default of the total, and the defaults that depend on it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    settings::{self, DefaultValue, MEMORY, MIN_MEMORY_BYTES, REPLICA_BYTES, Setting},
    sources::ResolvedValues,
    value::{ValueKind, format_bytes, parse_bytes},
};

/// Mount points of cgroup version 2 on Linux: alone, and beside version 1.
const UNIFIED: [&str; 2] = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];
/// Mount point of the memory controller of cgroup version 1.
const LEGACY: &str = "sys/fs/cgroup/memory";

/// A setting whose default is a share of [`MEMORY`].
struct Share {
    setting: &'static Setting,
    /// Size of the share in sixteenths of the total.
    sixteenths: u64,
    /// Maximum of the default, in bytes.
    max_bytes: u64,
}

/// Returns the shares of all settings that have one. Together they have 16 sixteenths.
fn shares() -> impl Iterator<Item = Share> {
    settings::all().filter_map(|setting| match setting.default {
        DefaultValue::MemoryShare { sixteenths, max_bytes } => {
            Some(Share { setting, sixteenths, max_bytes: max_bytes.unwrap_or(u64::MAX) })
        }
        _ => None,
    })
}

impl ResolvedValues {
    /// Sets the defaults that depend on memory. Adds an error if the configured shares exceed the total, or if they
    /// leave less than the minimum of an unset share.
    pub(super) fn apply_memory_defaults(&mut self) {
        let total = self.bytes(MEMORY).unwrap_or_else(|| default_memory_bytes(1));
        for setting in settings::all() {
            match setting.default {
                DefaultValue::MachineMemory => self.set_default(setting, format_bytes(total)),
                DefaultValue::ReplicasInMemory => self.set_default(setting, default_replicas(total).to_string()),
                _ => {}
            }
        }
        let configured: Vec<(&str, u64)> =
            shares().filter_map(|share| Some((share.setting.key, self.bytes(share.setting.key)?))).collect();
        let unset: Vec<Share> = shares().filter(|share| self.bytes(share.setting.key).is_none()).collect();
        let configured_bytes = configured.iter().fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let mut conflict = (configured_bytes > total).then(|| {
            let keys: Vec<_> =
                configured.iter().map(|(key, bytes)| format!("{key} {}", format_bytes(*bytes))).collect();
            let (keys, sum, total) = (keys.join(", "), format_bytes(configured_bytes), format_bytes(total));
            format!("{keys} together are {sum}, more than {MEMORY}, which is {total}: lower them, or raise {MEMORY}")
        });
        // An unset share gets its sixteenths of the total, at most its maximum. If the configured shares leave less for
        // the unset ones, it gets its proportion of the remaining memory.
        let remaining = total.saturating_sub(configured_bytes);
        let unset_sixteenths: u64 = unset.iter().map(|share| share.sixteenths).sum();
        for Share { setting, sixteenths, max_bytes } in unset {
            let bytes = (total / 16 * sixteenths).min(remaining / unset_sixteenths * sixteenths).min(max_bytes);
            // Memory permits count whole KiB.
            let bytes = bytes >> 10 << 10;
            if let ValueKind::Bytes(range) = &setting.kind
                && bytes < *range.start()
            {
                conflict.get_or_insert_with(|| {
                    let (remaining, total) = (format_bytes(remaining), format_bytes(total));
                    let min = format_bytes(*range.start());
                    format!(
                        "the configured parts leave {remaining} of {MEMORY}, which is {total}, and {} would be less \
                         than {min}: lower these parts, or raise {MEMORY}",
                        setting.key
                    )
                });
            }
            self.set_default(setting, format_bytes(bytes));
        }
        if let (Some(reason), Some((key, _))) = (conflict, configured.first()) {
            self.reject(key, reason);
        }
    }

    /// Returns the value of a setting that is a number of bytes; `None` if the setting is unset.
    fn bytes(&self, key: &str) -> Option<u64> {
        self.text(key).and_then(parse_bytes)
    }
}

/// Returns the default of `broker.max_replicas` if `limits.memory_bytes` is `total`. Replicas may use as much memory
/// again as clients. The maximum is that of the setting.
fn default_replicas(total: u64) -> u64 {
    (total / REPLICA_BYTES).min(10_000_000)
}

/// Returns the default of `limits.memory_bytes` for each of `brokers` brokers on this machine. This is an equal part of
/// a quarter of the memory, but at least `MIN_MEMORY_BYTES`.
pub fn default_memory_bytes(brokers: u64) -> u64 {
    let quarter = memory_bytes(Path::new("/")).unwrap_or_default() / 4 / brokers.max(1);
    (quarter >> 20 << 20).max(MIN_MEMORY_BYTES)
}

/// Returns the memory of the machine, or the limit of this process's cgroup if that is lower; `None` if neither can be
/// read. `root` is `/` outside tests.
fn memory_bytes(root: &Path) -> Option<u64> {
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
    });
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut min = machine;
    for line in groups.lines() {
        // `number:controllers:path`; the line of version 2 names no controllers.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mounts, file) = match controllers {
            "" => (&UNIFIED[..], "memory.max"),
            names if names.split(',').any(|name| name == "memory") => (&[LEGACY][..], "memory.limit_in_bytes"),
            _ => continue,
        };
        // The limits of all parent groups apply too. In a container, `path` may exist only on the host, and the mount
        // point itself is the container's group. The last of `ancestors` is empty and stands for the mount point.
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            for mount in mounts {
                min = min.into_iter().chain(number(root.join(mount).join(folder).join(file))).min();
            }
        }
    }
    min
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn memory_with(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, text).expect("written");
        }
        memory_bytes(root.path())
    }

    #[test]
    fn memory_is_min_of_machine_and_cgroup_limits() {
        let machine = ("proc/meminfo", "MemTotal:       16777216 kB\nMemFree: 1 kB\n");
        assert_eq!(memory_with(&[]), None);
        assert_eq!(memory_with(&[machine]), Some(16 * GIB));
        let v2 = ("proc/self/cgroup", "0::/system.slice/s.service\n");
        let max = ("sys/fs/cgroup/system.slice/s.service/memory.max", "max\n");
        assert_eq!(memory_with(&[machine, v2, max]), Some(16 * GIB), "no limit");
        let group = ("sys/fs/cgroup/system.slice/s.service/memory.max", "4294967296\n");
        assert_eq!(memory_with(&[machine, v2, group]), Some(4 * GIB));
        let parent = ("sys/fs/cgroup/system.slice/memory.max", "2147483648\n");
        assert_eq!(
            memory_with(&[machine, v2, group, parent]),
            Some(2 * GIB),
            "the limit of the parent group is smaller"
        );
        let container = ("sys/fs/cgroup/memory.max", "1073741824\n");
        assert_eq!(memory_with(&[machine, v2, container]), Some(GIB), "the path is the host's");
        let v1 = ("proc/self/cgroup", "9:cpu:/a\n4:memory:/pods/one\n0::/\n");
        let none = ("sys/fs/cgroup/memory/pods/one/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(memory_with(&[machine, v1, none]), Some(16 * GIB), "version 1 without a limit");
        let limit = ("sys/fs/cgroup/memory/pods/one/memory.limit_in_bytes", "3221225472\n");
        assert_eq!(memory_with(&[machine, v1, limit]), Some(3 * GIB));
    }

    #[test]
    fn memory_shares_sum_to_total() {
        assert_eq!(shares().map(|share| share.sixteenths).sum::<u64>(), 16);
    }
}
