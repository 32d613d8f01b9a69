//! A configured directory. All access below it uses its handle.
//!
//! # Guarantees
//!
//! - The path of the directory itself may contain symbolic links. The directory must belong to this process's user or
//!   to root; a directory of any other owner is refused.
//! - Below it no component of a name is followed if it is a symbolic link. Each component is opened relative to the
//!   handle of the previous one. So no process can exchange a component between its check and its use.
//! - A file or directory below it that belongs to another user is refused before a byte is read, written or truncated.
//! - Created entries are for this user alone: directories 0700, files 0600, regardless of the umask. Other modes of
//!   this user's entries are corrected. This happens for a configured directory when it is opened, and for its direct
//!   entries by [`PrivateDir::correct_entries`]. All entries further below are corrected when they are opened.
//!
//! A removal and a rename check the directory only: they act on the name, never on the target of a link. A hard link
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

/// Permission bits of directories and of files, for this process's user alone.
const DIR_MODE: Mode = Mode::RWXU;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Mask of the permission bits that are compared and corrected. All other bits stay, such as the setgid bit of a
/// volume.
const PERMISSION_BITS: u32 = 0o777;

/// Directories of the system. One of them may be configured by mistake, or because there is no other directory. Its
/// mode is not corrected, because other programs use it.
const SYSTEM_DIRS: &[&str] = &[
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
const DIR_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// An open directory: a configured one, or one below it. A method with a name below the directory also fails if the
/// name is absolute or contains `..`. The method fails too if a directory on its path is a link or belongs to another
/// user.
#[derive(Debug)]
pub struct PrivateDir {
    path: PathBuf,
    handle: OwnedFd,
    /// Owner and mode of a directory that keeps its mode (see [`Self::from_handle`]); `None` if the directory is for
    /// this user alone.
    uncorrected: Option<(u32, u32)>,
}

impl PrivateDir {
    /// Opens a configured directory, which must exist. Corrects its mode, unless other programs use the directory or it
    /// belongs to root and this process runs as another user.
    ///
    /// # Errors
    /// The directory cannot be opened, belongs to a user that is neither this process's nor root, or its mode cannot be
    /// changed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let handle = retry_if_interrupted(|| sys::open(path, DIR_FLAGS, Mode::empty()))?;
        Self::from_handle(path, handle)
    }

    /// Opens a directory as [`PrivateDir::open`] does, and creates it with its parents if it is absent.
    ///
    /// # Errors
    /// Those of [`PrivateDir::open`], or the directory cannot be created.
    pub fn make(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(DIR_MODE.bits()).create(path)?;
        Self::open(path)
    }

    /// Creates a directory below this one if it is absent, and opens it.
    ///
    /// # Errors
    /// Those of [`PrivateDir::make_dir`] and [`PrivateDir::open`].
    pub fn make_below(&self, name: &Path) -> io::Result<Self> {
        self.make_dir(name)?;
        Self::from_handle(&self.path.join(name), self.walk(name)?)
    }

    /// Checks the owner of an opened directory, and corrects its mode. The mode stays if the directory belongs to root
    /// and this process runs as another user, or if other programs use the directory.
    fn from_handle(path: &Path, handle: OwnedFd) -> io::Result<Self> {
        let stat = sys::fstat(&handle)?;
        let (owner, user) = (stat.st_uid, geteuid().as_raw());
        if owner != user && owner != 0 {
            return Err(foreign_owner_error(path, owner));
        }
        let uncorrected = (owner != user || is_shared(path, &stat)).then_some((owner, stat.st_mode & 0o7777));
        if uncorrected.is_none() {
            correct_mode(handle.as_fd(), &stat, DIR_MODE)?;
        }
        Ok(Self { path: path.to_owned(), handle, uncorrected })
    }

    /// Returns the path by which the directory was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Logs a warning if the mode of the directory was not corrected.
    pub fn warn_if_uncorrected(&self) {
        if let Some((owner, mode)) = self.uncorrected {
            tracing::warn!(
                dir = %self.path.display(), owner, mode = %format_args!("{mode:04o}"),
                "this directory keeps its mode, because it belongs to root or other programs use it; only this process's \
                 user can read the files that this process creates in it"
            );
        }
    }

    /// Opens a file below the directory. Without `CREATE` the file must exist. The flags must not contain `TRUNC`,
    /// which would truncate the file before its owner is checked.
    ///
    /// # Errors
    /// The file is absent, is no regular file, belongs to another user, or cannot be opened with these flags.
    pub fn open_file(&self, name: &Path, flags: OFlags) -> io::Result<fs::File> {
        debug_assert!(!flags.contains(OFlags::TRUNC), "the owner is checked first");
        let (dir, last) = self.parent(name)?;
        // Without NONBLOCK the open would block on a named pipe. Regular files ignore the flag.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let path = || self.path.join(name);
        let opened = retry_if_interrupted(|| sys::openat(&dir, last, flags, FILE_MODE));
        let file = opened.map_err(|error| open_error(dir.as_fd(), last, &path(), error))?;
        let stat = sys::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(permission_denied(format!("{} is not a regular file: remove it", path().display())));
        }
        check_entry(file.as_fd(), &stat, FILE_MODE, path)?;
        Ok(file.into())
    }

    /// Creates a directory below this one, with the directories on its path. Existing directories are no error.
    ///
    /// # Errors
    /// A directory cannot be created, or a component of the path is a link or belongs to another user.
    pub fn make_dir(&self, name: &Path) -> io::Result<()> {
        let mut dir = self.handle.try_clone()?;
        let mut path = self.path.clone();
        for component in components_of(name)? {
            match sys::mkdirat(&dir, component, DIR_MODE) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            path.push(component);
            dir = open_component(dir.as_fd(), component, &path)?;
        }
        Ok(())
    }

    /// Returns the entries of a directory below this one, sorted by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self, name: &Path) -> io::Result<Vec<DirEntry>> {
        let dir = self.walk(name)?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." {
                continue;
            }
            // A file may disappear after the directory was listed. It is then absent from the result.
            let Ok(stat) = sys::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let len = u64::try_from(stat.st_size).unwrap_or(0);
            entries.push(DirEntry { name: name.to_owned(), is_dir, len });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Renames the file `from` below this directory to `to` below `to_root`, which may be another directory.
    ///
    /// # Errors
    /// The file is absent, or the new name cannot be assigned.
    pub fn rename(&self, from: &Path, to_root: &Self, to: &Path) -> io::Result<()> {
        let ((from_dir, from_name), (to_dir, to_name)) = (self.parent(from)?, to_root.parent(to)?);
        Ok(sys::renameat(&from_dir, from_name, &to_dir, to_name)?)
    }

    /// Removes a file below the directory.
    ///
    /// # Errors
    /// The file is absent, or cannot be removed.
    pub fn remove(&self, name: &Path) -> io::Result<()> {
        let (dir, last) = self.parent(name)?;
        Ok(sys::unlinkat(&dir, last, AtFlags::empty())?)
    }

    /// Removes an empty directory below this one.
    ///
    /// # Errors
    /// The directory is absent, is not empty, or cannot be removed.
    pub fn remove_dir(&self, name: &Path) -> io::Result<()> {
        let (dir, last) = self.parent(name)?;
        Ok(sys::unlinkat(&dir, last, AtFlags::REMOVEDIR)?)
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

    /// Opens the parent directory of a name below this one. Returns it with the last component of the name.
    fn parent<'a>(&self, name: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let last = name.file_name().ok_or_else(|| not_below_error(name))?;
        Ok((self.walk(name.parent().unwrap_or(Path::new("")))?, last))
    }

    /// Opens a directory below this one, component by component. An empty name opens this directory again.
    fn walk(&self, name: &Path) -> io::Result<OwnedFd> {
        let mut dir = self.handle.try_clone()?;
        let mut path = self.path.clone();
        for component in components_of(name)? {
            path.push(component);
            dir = open_component(dir.as_fd(), component, &path)?;
        }
        Ok(dir)
    }

    /// Corrects the modes of the direct entries that belong to this user. Links and special files are skipped. There
    /// may be very many entries further below, so they are corrected only when they are opened.
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
            let (mode, type_flag) = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => (DIR_MODE, OFlags::DIRECTORY),
                FileType::RegularFile => (FILE_MODE, OFlags::empty()),
                _ => continue,
            };
            if stat.st_uid == geteuid().as_raw() && stat.st_mode & PERMISSION_BITS != mode.bits() {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | type_flag;
                let Ok(handle) = sys::openat(&self.handle, name, flags, Mode::empty()) else { continue };
                correct_mode(handle.as_fd(), &sys::fstat(&handle)?, mode)?;
            }
        }
        Ok(())
    }
}

/// Returns true if other programs use the directory as well: it is a directory of the system, or has the sticky bit as
/// `/tmp` has. A narrower mode would harm these programs.
fn is_shared(path: &Path, stat: &Stat) -> bool {
    let is_sticky = stat.st_mode & Mode::SVTX.bits() != 0;
    is_sticky || fs::canonicalize(path).is_ok_and(|path| SYSTEM_DIRS.iter().any(|dir| path == Path::new(dir)))
}

/// Returns the components of a name below a directory. Fails if the name is absolute or contains `..`.
fn components_of(name: &Path) -> io::Result<Vec<&OsStr>> {
    let to_name = |component| match component {
        Component::Normal(name) => Ok(name),
        _ => Err(not_below_error(name)),
    };
    name.components().filter(|component| *component != Component::CurDir).map(to_name).collect()
}

/// Opens the directory `name` in the directory `parent`, without following a link. Checks its owner and corrects its
/// mode. `path` is the full path of the directory, for errors.
fn open_component(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> io::Result<OwnedFd> {
    let opened = retry_if_interrupted(|| sys::openat(parent, name, DIR_FLAGS | OFlags::NOFOLLOW, Mode::empty()));
    let handle = opened.map_err(|error| open_error(parent, name, path, error))?;
    check_entry(handle.as_fd(), &sys::fstat(&handle)?, DIR_MODE, || path.to_owned())?;
    Ok(handle)
}

/// Fails for an entry of another user, and corrects the mode of an entry of this user to `mode`.
fn check_entry(handle: BorrowedFd<'_>, stat: &Stat, mode: Mode, path: impl FnOnce() -> PathBuf) -> io::Result<()> {
    if stat.st_uid != geteuid().as_raw() {
        return Err(foreign_owner_error(&path(), stat.st_uid));
    }
    correct_mode(handle, stat, mode)
}

/// Sets the permission bits of an open entry to `mode`, unless they are equal, or the file system is read-only or has
/// no modes.
fn correct_mode(handle: BorrowedFd<'_>, stat: &Stat, mode: Mode) -> io::Result<()> {
    if stat.st_mode & PERMISSION_BITS == mode.bits() {
        return Ok(());
    }
    let other_bits = Mode::from_raw_mode(stat.st_mode & 0o7777 & !PERMISSION_BITS);
    match sys::fchmod(handle, other_bits | mode) {
        // The file system is read-only, or has no modes.
        Ok(()) | Err(Errno::ROFS | Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Repeats a system call while a signal interrupts it.
fn retry_if_interrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    rustix::io::retry_on_intr(&mut call)
}

/// Converts the error of opening `name` in the directory `parent`. If a symbolic link was the cause, the error names
/// the link.
fn open_error(parent: BorrowedFd<'_>, name: &OsStr, path: &Path, error: Errno) -> io::Error {
    let is_link = matches!(error, Errno::LOOP | Errno::NOTDIR | Errno::MLINK)
        && sys::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink);
    if is_link {
        return permission_denied(format!(
            "{} is a symbolic link, and links inside a configured directory are not followed: replace the link with \
             its target, or set another directory with log.journal_dir, cache.dir or broker.data_dir",
            path.display()
        ));
    }
    error.into()
}

fn foreign_owner_error(path: &Path, owner: u32) -> io::Error {
    permission_denied(format!(
        "{} belongs to user {owner}, and this process runs as user {}: run the process as the owner, or change the \
         owner with chown -R",
        path.display(),
        geteuid().as_raw()
    ))
}

fn not_below_error(name: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a name below a directory", name.display()))
}

fn permission_denied(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

#[cfg(test)]
mod tests;
