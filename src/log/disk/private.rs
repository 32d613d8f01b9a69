//! A configured directory. All access below it uses its handle.
//!
//! # Guarantees
//!
//! - The path of the directory itself may contain symbolic links. The directory must belong to this process's user or
//!   to root; one of any other owner is refused.
//! - Below it no component of a name is followed if it is a symbolic link. Each component is opened relative to the
//!   handle of the previous one. So no process can exchange a component between its check and its use.
//! - A file or directory below it that belongs to another user is refused before a byte is read, written or truncated.
//! - Created entries are for this user alone: directories 0700, files 0600, regardless of the umask. Wider modes of
//!   this user's entries are corrected: for a directory and its direct entries at its admission, for all others when
//!   they are opened.
//!
//! Removing and renaming check the directory only: they act on the name, never on the target of a link. A hard link
//! equals any other file and is not refused.

use std::{
    ffi::OsStr,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::DirBuilderExt as _,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{self as sys, AtFlags, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
    process::geteuid,
};

use super::DirEntry;

/// Permission bits of directories and of files.
const DIRECTORY: Mode = Mode::RWXU;
const FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Permission bits that are compared and corrected. All others (a volume's setgid bit) stay.
const PERMISSIONS: u32 = 0o777;

/// Directories of the system that may be configured by mistake, or for lack of another place.
const SHARED: &[&str] = &[
    "/",
    "/bin",
    "/boot",
    "/etc",
    "/home",
    "/lib",
    "/media",
    "/mnt",
    "/opt",
    "/run",
    "/srv",
    "/usr",
    "/usr/local",
    "/var",
    "/var/cache",
    "/var/lib",
    "/var/log",
    "/var/opt",
];

/// Flags for opening a directory.
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// An open directory: a configured one, or one below it.
#[derive(Debug)]
pub struct PrivateDir {
    path: PathBuf,
    handle: OwnedFd,
    /// Owner and mode of a directory whose mode is not corrected.
    kept: Option<(u32, u32)>,
}

impl PrivateDir {
    /// Opens a configured directory, which must exist.
    ///
    /// # Errors
    /// The directory cannot be opened, or belongs to a user that is neither this process's nor root.
    pub fn open(path: &Path) -> io::Result<Self> {
        let handle = retry(|| sys::open(path, FOLDER, Mode::empty()))?;
        Self::of(path, handle)
    }

    /// Opens a directory as [`PrivateDir::open`] does, and creates it with its parents if it is absent.
    ///
    /// # Errors
    /// Those of [`PrivateDir::open`], or the directory cannot be created.
    pub fn make(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(DIRECTORY.bits()).create(path)?;
        Self::open(path)
    }

    /// Opens a directory below this one as [`PrivateDir::make`] does.
    ///
    /// # Errors
    /// Those of [`PrivateDir::make_dir`].
    pub fn make_below(&self, name: &Path) -> io::Result<Self> {
        self.make_dir(name)?;
        Self::of(&self.path.join(name), self.walk(name)?)
    }

    fn of(path: &Path, handle: OwnedFd) -> io::Result<Self> {
        let stat = sys::fstat(&handle)?;
        let (owner, user) = (stat.st_uid, geteuid().as_raw());
        if owner != user && owner != 0 {
            return Err(of_another_user(path, owner));
        }
        let kept = (owner != user || is_shared(path, &stat)).then_some((owner, stat.st_mode & 0o7777));
        if kept.is_none() {
            correct(handle.as_fd(), &stat, DIRECTORY)?;
        }
        Ok(Self { path: path.to_owned(), handle, kept })
    }

    /// Returns the path by which the directory was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Logs a warning if the mode of the directory is not corrected.
    pub fn warn_of_owner(&self) {
        if let Some((owner, mode)) = self.kept {
            tracing::warn!(
                dir = %self.path.display(), owner, mode = %format_args!("{mode:04o}"),
                "this directory keeps its mode, because it belongs to another user or is a system directory; only this \
                 process's user can access the files that this process creates in it"
            );
        }
    }

    /// Opens a file below the directory. Without `CREATE` the file must exist. The call never truncates (`TRUNC` would
    /// truncate before the owner is known).
    ///
    /// # Errors
    /// The file is absent, is no regular file, belongs to another user, or cannot be opened with these flags.
    pub fn open_file(&self, name: &Path, flags: OFlags) -> io::Result<fs::File> {
        debug_assert!(!flags.contains(OFlags::TRUNC), "the owner is checked first");
        let (folder, last) = self.parent(name)?;
        // Without NONBLOCK a pipe of that name would block the open. Regular files ignore the flag.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let path = || self.path.join(name);
        let opened = retry(|| sys::openat(&folder, last, flags, FILE));
        let file = opened.map_err(|error| explain(folder.as_fd(), last, &path(), error))?;
        let stat = sys::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused(format!("{} is not a regular file: remove it", path().display())));
        }
        check(file.as_fd(), &stat, FILE, path)?;
        Ok(file.into())
    }

    /// Creates a directory below this one, with the directories on its path.
    ///
    /// # Errors
    /// A directory cannot be created, or a component of the path is a link or belongs to another user.
    pub fn make_dir(&self, name: &Path) -> io::Result<()> {
        let mut at = self.handle.try_clone()?;
        let mut path = self.path.clone();
        for part in parts(name)? {
            match sys::mkdirat(&at, part, DIRECTORY) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            path.push(part);
            at = step(at.as_fd(), part, &path)?;
        }
        Ok(())
    }

    /// Returns the entries of a directory below this one, sorted by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self, name: &Path) -> io::Result<Vec<DirEntry>> {
        let folder = self.walk(name)?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&folder)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." {
                continue;
            }
            // A file may disappear between the two calls. It is then absent from the result.
            let Ok(stat) = sys::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let len = u64::try_from(stat.st_size).unwrap_or(0);
            entries.push(DirEntry { name: name.to_owned(), is_dir, len });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Renames a file below the directory, possibly to a name below another directory.
    ///
    /// # Errors
    /// The file is absent, or the new name cannot be assigned.
    pub fn rename(&self, from: &Path, into: &Self, to: &Path) -> io::Result<()> {
        let ((from, old), (to, new)) = (self.parent(from)?, into.parent(to)?);
        Ok(sys::renameat(&from, old, &to, new)?)
    }

    /// Removes a file below the directory.
    ///
    /// # Errors
    /// The file is absent, or cannot be removed.
    pub fn remove(&self, name: &Path) -> io::Result<()> {
        let (folder, last) = self.parent(name)?;
        Ok(sys::unlinkat(&folder, last, AtFlags::empty())?)
    }

    /// Removes an empty directory below this one.
    ///
    /// # Errors
    /// The directory is absent, is not empty, or cannot be removed.
    pub fn remove_dir(&self, name: &Path) -> io::Result<()> {
        let (folder, last) = self.parent(name)?;
        Ok(sys::unlinkat(&folder, last, AtFlags::REMOVEDIR)?)
    }

    /// Makes the names in a directory below this one durable.
    ///
    /// # Errors
    /// The sync fails.
    pub fn sync(&self, name: &Path) -> io::Result<()> {
        Ok(sys::fsync(self.walk(name)?)?)
    }

    /// Returns the bytes that can still be written in the file system of the directory.
    ///
    /// # Errors
    /// The file system does not report its free space.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let stat = sys::fstatvfs(&self.handle)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Returns the parent directory of a name below this one, and the last component of the name.
    fn parent<'a>(&self, name: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let last = name.file_name().ok_or_else(|| not_below(name))?;
        Ok((self.walk(name.parent().unwrap_or(Path::new("")))?, last))
    }

    /// Opens a directory below this one, component by component.
    fn walk(&self, name: &Path) -> io::Result<OwnedFd> {
        let mut at = self.handle.try_clone()?;
        let mut path = self.path.clone();
        for part in parts(name)? {
            path.push(part);
            at = step(at.as_fd(), part, &path)?;
        }
        Ok(at)
    }

    /// Corrects the modes of the direct entries that belong to this user. Entries further below are corrected when they
    /// are opened, because there may be very many.
    ///
    /// # Errors
    /// The directory cannot be read, or a mode cannot be changed.
    pub fn correct_entries(&self) -> io::Result<()> {
        for entry in Dir::read_from(&self.handle)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(stat) = sys::statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let (mode, kind) = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => (DIRECTORY, OFlags::DIRECTORY),
                FileType::RegularFile => (FILE, OFlags::empty()),
                _ => continue,
            };
            if stat.st_uid == geteuid().as_raw() && stat.st_mode & PERMISSIONS != mode.bits() {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | kind;
                let Ok(handle) = sys::openat(&self.handle, name, flags, Mode::empty()) else { continue };
                correct(handle.as_fd(), &sys::fstat(&handle)?, mode)?;
            }
        }
        Ok(())
    }
}

/// Returns true if other programs use the directory as well. A narrower mode would harm the system.
fn is_shared(path: &Path, stat: &Stat) -> bool {
    let is_sticky = stat.st_mode & Mode::SVTX.bits() != 0;
    is_sticky || fs::canonicalize(path).is_ok_and(|path| SHARED.iter().any(|inner| path == Path::new(inner)))
}

/// Returns the components of a name below a directory.
fn parts(name: &Path) -> io::Result<Vec<&OsStr>> {
    let part = |component| match component {
        Component::Normal(part) => Ok(part),
        _ => Err(not_below(name)),
    };
    name.components().filter(|component| *component != Component::CurDir).map(part).collect()
}

/// Opens one component, the directory at `path`.
fn step(at: BorrowedFd<'_>, part: &OsStr, path: &Path) -> io::Result<OwnedFd> {
    let opened = retry(|| sys::openat(at, part, FOLDER | OFlags::NOFOLLOW, Mode::empty()));
    let handle = opened.map_err(|error| explain(at, part, path, error))?;
    check(handle.as_fd(), &sys::fstat(&handle)?, DIRECTORY, || path.to_owned())?;
    Ok(handle)
}

/// Refuses an entry of another user, and corrects the mode of an entry of this user.
fn check(handle: BorrowedFd<'_>, stat: &Stat, mode: Mode, path: impl FnOnce() -> PathBuf) -> io::Result<()> {
    if stat.st_uid != geteuid().as_raw() {
        return Err(of_another_user(&path(), stat.st_uid));
    }
    correct(handle, stat, mode)
}

fn correct(handle: BorrowedFd<'_>, stat: &Stat, mode: Mode) -> io::Result<()> {
    if stat.st_mode & PERMISSIONS == mode.bits() {
        return Ok(());
    }
    let special = Mode::from_raw_mode(stat.st_mode & 0o7777 & !PERMISSIONS);
    match sys::fchmod(handle, special | mode) {
        // The file system is read-only, or has no modes.
        Ok(()) | Err(Errno::ROFS | Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    rustix::io::retry_on_intr(&mut call)
}

/// Returns the error of an open. If a symbolic link was the cause, the error names it.
fn explain(at: BorrowedFd<'_>, part: &OsStr, path: &Path, error: Errno) -> io::Error {
    let is_link = matches!(error, Errno::LOOP | Errno::NOTDIR | Errno::MLINK)
        && sys::statat(at, part, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink);
    if is_link {
        return refused(format!(
            "{} is a symbolic link, and links inside a configured directory are not followed: replace the link with \
             its target, or set another directory with log.journal_dir, cache.dir or broker.data_dir",
            path.display()
        ));
    }
    error.into()
}

fn of_another_user(path: &Path, owner: u32) -> io::Error {
    refused(format!(
        "{} belongs to user {owner}, and this process runs as user {}: run the process as the owner, or change the \
         owner with chown -R",
        path.display(),
        geteuid().as_raw()
    ))
}

fn not_below(name: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a name below a directory", name.display()))
}

fn refused(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

#[cfg(test)]
mod tests;
