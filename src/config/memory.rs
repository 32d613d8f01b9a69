//! Memory that clients can make a broker hold: the default of the total, and its shares.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    ConfigError, ValueSource,
    setting::{MEMORY, MEMORY_DEFAULT, MEMORY_SHARES, REPLICAS, Setting, ValueKind},
    sources::{ProvidedValue, ResolvedValues},
    value::{bytes, size},
};

/// Minimum default of the total, in bytes.
const MIN_MEMORY_BYTES: u64 = 512 << 20;

/// Memory of one replica, in bytes. The default of `broker.max_replicas` allows replicas that take as much memory again
/// as the total. An idle replica takes 16 KiB, and a written one 20 KiB (docs/performance.md, `replicas`).
const REPLICA_BYTES: u64 = 16 << 10;

/// Paths of the cgroup limits on Linux: version 2, version 2 beside version 1, and version 1.
const UNIFIED: [&str; 2] = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];
const LEGACY: &str = "sys/fs/cgroup/memory";

impl ResolvedValues {
    /// Sets the defaults of the total and of its shares, and checks that the configured shares fit.
    pub(super) fn share_memory(&mut self, errors: &mut Vec<ConfigError>) {
        let whole = self.bytes_of(MEMORY).unwrap_or_else(|| default_memory_bytes(1));
        self.default_bytes(MEMORY, whole);
        self.default_text(REPLICAS, default_replicas(whole).to_string());
        let set: Vec<_> =
            MEMORY_SHARES.iter().filter_map(|share| Some((share.key, self.bytes_of(share.key)?))).collect();
        let taken = set.iter().fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        if taken > whole {
            let keys: Vec<_> = set.iter().map(|(key, bytes)| format!("{key} {}", size(*bytes))).collect();
            let reason = format!(
                "{} together are {}, more than {MEMORY}, which is {}: lower them, or raise {MEMORY}",
                keys.join(", "),
                size(taken),
                size(whole)
            );
            errors.push(ConfigError::Wrong { place: self.place_of(&set), reason });
        }
        let mut is_reported = taken > whole;
        let left = whole.saturating_sub(taken);
        let unset = MEMORY_SHARES.iter().filter(|share| set.iter().all(|(key, _)| *key != share.key));
        let parts: u64 = unset.clone().map(|share| share.sixteenths).sum();
        for share in unset {
            let part = (whole / 16 * share.sixteenths).min(left / parts * share.sixteenths);
            // Memory permits count whole KiB.
            let part = part.min(share.most.unwrap_or(u64::MAX)) >> 10 << 10;
            if let Some(ValueKind::Bytes { least, .. }) = Setting::find(share.key).map(|setting| setting.kind)
                && part < least
                && !std::mem::replace(&mut is_reported, true)
            {
                let (key, left, least) = (share.key, size(left), size(least));
                let reason = format!(
                    "the configured parts leave {left} of {MEMORY}, which is {}, and {key} would be less than \
                     {least}: lower these parts, or raise {MEMORY}",
                    size(whole)
                );
                errors.push(ConfigError::Wrong { place: self.place_of(&set), reason });
            }
            self.default_bytes(share.key, part);
        }
    }

    /// Returns the place of the first configured share.
    fn place_of(&self, set: &[(&str, u64)]) -> ValueSource {
        set.first().map_or(ValueSource::Default, |(key, _)| self.set[*key].source.clone())
    }

    fn bytes_of(&self, key: &str) -> Option<u64> {
        self.set.get(key).and_then(|given| bytes(&given.text))
    }

    fn default_bytes(&mut self, key: &str, bytes: u64) {
        self.default_text(key, size(bytes));
    }

    fn default_text(&mut self, key: &str, text: String) {
        self.set.entry(key.to_owned()).or_insert(ProvidedValue { text, source: ValueSource::Default });
    }
}

/// Returns the default of `broker.max_replicas` for this total. Replicas may take as much memory again as clients.
fn default_replicas(whole: u64) -> u64 {
    (whole / REPLICA_BYTES).min(10_000_000)
}

/// Returns the default of the total for each of `brokers` brokers on this machine.
pub fn default_memory_bytes(brokers: u64) -> u64 {
    let quarter = memory_bytes(Path::new("/")).unwrap_or_default() / 4 / brokers.max(1);
    (quarter >> 20 << 20).max(MIN_MEMORY_BYTES)
}

/// Describes the default of the total, of a share, or of `broker.max_replicas`.
pub(super) fn default_share(key: &str) -> Option<String> {
    if key == MEMORY {
        return Some(MEMORY_DEFAULT.to_owned());
    }
    if key == REPLICAS {
        return Some(format!("one for each {} of `{MEMORY}`", size(REPLICA_BYTES)));
    }
    let share = MEMORY_SHARES.iter().find(|share| share.key == key)?;
    let part = match share.sixteenths {
        1 => "a sixteenth".to_owned(),
        2 => "an eighth".to_owned(),
        4 => "a quarter".to_owned(),
        other => format!("{other} sixteenths"),
    };
    let most = share.most.map(|most| format!(", at most {}", size(most))).unwrap_or_default();
    Some(format!("{part} of `{MEMORY}`{most}"))
}

/// Returns the memory of the machine, or the limit of this process's cgroup if that is lower. `root` is `/` outside
/// tests.
fn memory_bytes(root: &Path) -> Option<u64> {
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
    });
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut least = machine;
    for line in groups.lines() {
        // `number:controllers:path`; the line of version 2 names no controllers.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mounts, file) = match controllers {
            "" => (&UNIFIED[..], "memory.max"),
            names if names.split(',').any(|name| name == "memory") => (&[LEGACY][..], "memory.limit_in_bytes"),
            _ => continue,
        };
        // The limits of all parent groups apply too. In a container, the path may exist only on the host, and the mount
        // point itself is the group. The mount point is the last ancestor.
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            for mount in mounts {
                least = least.into_iter().chain(number(root.join(mount).join(folder).join(file))).min();
            }
        }
    }
    least
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
        let own = ("sys/fs/cgroup/system.slice/s.service/memory.max", "4294967296\n");
        assert_eq!(memory_with(&[machine, v2, own]), Some(4 * GIB));
        let above = ("sys/fs/cgroup/system.slice/memory.max", "2147483648\n");
        assert_eq!(memory_with(&[machine, v2, own, above]), Some(2 * GIB), "the group above it is smaller");
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
        assert_eq!(MEMORY_SHARES.iter().map(|share| share.sixteenths).sum::<u64>(), 16);
    }
}
