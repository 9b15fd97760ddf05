//! Files to and from a guest, as tar streams. One that comes from a guest is hostile: nothing is written outside of the
//! destination, links are made but never followed, and nothing but files, directories and links is taken.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use guest_api::proto::{ExecStart, TarPath, exec_start::What};
use tar::EntryType;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    sync::mpsc,
    task::JoinHandle,
};

use super::{
    GuestChannel, GuestError, STALL_LIMIT,
    exec::{Bounded, check, run},
};

/// Bytes between the archive and the connection.
const BUFFER: usize = 256 * 1024;

/// Why something was not copied.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A file on this side.
    #[error("{path}")]
    Local {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest's archive tries what it must not.
    #[error("the sandbox sent {what}; nothing outside of the destination was written")]
    Hostile {
        /// What.
        what: String,
    },
}

impl GuestChannel {
    /// Copies a file or a directory into the guest, as `cp -r` does: into an existing directory under its own name, else as `to`.
    ///
    /// # Errors
    /// [`CopyError`].
    pub async fn copy_in(&mut self, from: &Path, to: &str) -> Result<(), CopyError> {
        let from = from.to_owned();
        fs::metadata(&from).map_err(|source| CopyError::Local { path: from.clone(), source })?;
        let (ours, theirs) = duplex(BUFFER);
        let moved = Moved::default();
        let stream = Blocking::new(theirs, &moved);
        let packing = tokio::task::spawn_blocking(move || write_archive(&from, stream));
        let mut stderr = Bounded::new(4096);
        let (_, controls) = mpsc::channel(1);
        let start = ExecStart { what: Some(What::Unpack(TarPath { path: to.to_owned() })), timeout_ms: 0 };
        let mut nowhere = tokio::io::sink();
        let running = run(self.client(), start, Some(ours), &mut nowhere, &mut stderr, controls);
        let result = moved.while_moving(STALL_LIMIT, running).await?;
        check(&result, &stderr)?;
        packing.await.map_err(|error| GuestError::Transport(error.to_string()))?
    }

    /// Copies a file or a directory out of the guest, as `cp -r` does: into an existing directory under its own name, else as `to`.
    ///
    /// # Errors
    /// [`CopyError`].
    pub async fn copy_out(&mut self, from: &str, to: &Path) -> Result<(), CopyError> {
        let to = to.to_owned();
        let (mut ours, theirs) = duplex(BUFFER);
        let moved = Moved::default();
        let stream = Blocking::new(theirs, &moved);
        let unpacking = tokio::task::spawn_blocking(move || read_archive(stream, &to));
        let mut stderr = Bounded::new(4096);
        let (_, controls) = mpsc::channel(1);
        let start = ExecStart { what: Some(What::Pack(TarPath { path: from.to_owned() })), timeout_ms: 0 };
        let running = run(self.client(), start, None::<tokio::io::Empty>, &mut ours, &mut stderr, controls);
        let ran = moved.while_moving(STALL_LIMIT, running).await;
        if let Err(error @ GuestError::Stalled(_)) = ran {
            // The rest of the archive is missing: that it ends early is no news.
            return Err(error.into());
        }
        let _ = ours.shutdown().await;
        drop(ours);
        let unpacked = unpacking.await.map_err(|error| GuestError::Transport(error.to_string()))?;
        // A refusal of ours closes the stream, which the other side sees as an error of its own: ours comes first.
        match (ran, unpacked) {
            (_, Err(error @ (CopyError::Hostile { .. } | CopyError::Local { .. }))) => Err(error),
            (Ok(result), unpacked) => {
                check(&result, &stderr)?;
                unpacked
            }
            (Err(error), _) => Err(error.into()),
        }
    }

    /// Unpacks a tar stream into the guest, below the directory `to` or, where that is none, as `to`.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::Stalled`] if nothing moves for a while.
    pub async fn unpack_into(
        &mut self,
        to: &str,
        archive: impl AsyncRead + Unpin + Send + 'static,
    ) -> Result<(), GuestError> {
        let moved = Moved::default();
        let mut stderr = Bounded::new(4096);
        let (_, controls) = mpsc::channel(1);
        let start = ExecStart { what: Some(What::Unpack(TarPath { path: to.to_owned() })), timeout_ms: 0 };
        let mut nowhere = tokio::io::sink();
        let archive = Counted { stream: archive, moved: moved.clone() };
        let running = run(self.client(), start, Some(archive), &mut nowhere, &mut stderr, controls);
        check(&moved.while_moving(STALL_LIMIT, running).await?, &stderr)
    }

    /// Packs a file or a directory of the guest as a tar stream. What comes is hostile.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::Stalled`] if nothing moves for a while.
    pub async fn pack_from(&mut self, from: &str, archive: impl AsyncWrite + Unpin) -> Result<(), GuestError> {
        let moved = Moved::default();
        let mut stderr = Bounded::new(4096);
        let (_, controls) = mpsc::channel(1);
        let start = ExecStart { what: Some(What::Pack(TarPath { path: from.to_owned() })), timeout_ms: 0 };
        let mut archive = Counted { stream: archive, moved: moved.clone() };
        let running = run(self.client(), start, None::<tokio::io::Empty>, &mut archive, &mut stderr, controls);
        check(&moved.while_moving(STALL_LIMIT, running).await?, &stderr)?;
        Ok(archive.shutdown().await?)
    }
}

/// Packs a file or a directory of this side as `cp -r` would bring it: the stream, and what became of it, which is to be asked at its end.
///
/// # Errors
/// [`CopyError::Local`] if it is not there. Needs a runtime.
pub fn pack(from: &Path) -> Result<(DuplexStream, JoinHandle<Result<(), CopyError>>), CopyError> {
    fs::metadata(from).map_err(local(from))?;
    let (ours, theirs) = duplex(BUFFER);
    let (from, stream) = (from.to_owned(), Blocking::new(theirs, &Moved::default()));
    Ok((ours, tokio::task::spawn_blocking(move || write_archive(&from, stream))))
}

/// Unpacks a stream that a guest packed, whoever handed it on, as [`GuestChannel::copy_out`] does.
///
/// # Errors
/// [`CopyError`]; [`GuestError::Transport`] if the stream breaks.
pub async fn unpack(mut archive: impl AsyncRead + Unpin, to: &Path) -> Result<(), CopyError> {
    let (mut ours, theirs) = duplex(BUFFER);
    let (to, stream) = (to.to_owned(), Blocking::new(theirs, &Moved::default()));
    let unpacking = tokio::task::spawn_blocking(move || read_archive(stream, &to));
    let copied = tokio::io::copy(&mut archive, &mut ours).await;
    drop(ours);
    let unpacked = unpacking.await.map_err(|error| GuestError::Transport(error.to_string()))?;
    match copied {
        // Nobody reads on: it was refused, or it is behind the archive's end.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => unpacked,
        Err(error) => Err(GuestError::Transport(error.to_string()).into()),
        Ok(_) => unpacked,
    }
}

fn local(path: &Path) -> impl Fn(io::Error) -> CopyError + '_ {
    move |source| CopyError::Local { path: path.to_owned(), source }
}

fn write_archive(from: &Path, stream: Blocking) -> Result<(), CopyError> {
    let whole = from.canonicalize().map_err(local(from))?;
    let name = whole.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from);
    let mut archive = tar::Builder::new(stream);
    archive.follow_symlinks(false);
    let packed = if whole.is_dir() {
        archive.append_dir_all(&name, &whole)
    } else {
        fs::File::open(&whole).and_then(|mut file| archive.append_file(&name, &mut file))
    };
    packed.and_then(|()| archive.finish()).map_err(local(from))
}

fn read_archive(stream: Blocking, to: &Path) -> Result<(), CopyError> {
    let (parent, rename) = if to.is_dir() {
        (to.to_owned(), None)
    } else {
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        (parent.to_owned(), to.file_name().map(PathBuf::from))
    };
    let parent = parent.canonicalize().map_err(local(&parent))?;
    let mut archive = tar::Archive::new(stream);
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(true);
    for entry in archive.entries().map_err(local(to))? {
        let mut entry = entry.map_err(local(to))?;
        let name = entry.path().map_err(local(to))?.into_owned();
        let target = destination(&name, rename.as_deref())?;
        let kind = entry.header().entry_type();
        if !matches!(kind, EntryType::Regular | EntryType::Directory | EntryType::Symlink | EntryType::GNUSparse) {
            return Err(CopyError::Hostile { what: format!("an entry of the forbidden kind {kind:?}") });
        }
        make_parents(&parent, &target)?;
        let path = parent.join(&target);
        // A link that an earlier entry made would lead elsewhere: it is replaced, not followed.
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_symlink() => fs::remove_file(&path).map_err(local(&path))?,
            _ => {}
        }
        entry.unpack(&path).map_err(local(&path))?;
    }
    Ok(())
}

/// Where an entry goes, below the destination: its first component is the copied thing's own name.
fn destination(name: &Path, rename: Option<&Path>) -> Result<PathBuf, CopyError> {
    let mut parts = name.components();
    let plain = parts.clone().all(|part| matches!(part, Component::Normal(_)));
    let first = parts.next();
    match first {
        Some(Component::Normal(first)) if plain => {
            // Not by joining what is left, even if that is nothing: a file's path must not end in '/'.
            let mut target = rename.unwrap_or(Path::new(first)).to_owned();
            target.extend(parts);
            Ok(target)
        }
        _ => Err(CopyError::Hostile { what: "an entry that points outside".into() }),
    }
}

/// Makes the directories above `target`; a link among them is refused.
fn make_parents(base: &Path, target: &Path) -> Result<(), CopyError> {
    let mut path = base.to_owned();
    for part in target.parent().into_iter().flat_map(Path::components) {
        path.push(part);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(CopyError::Hostile { what: "an entry below something that is no directory".into() }),
            Err(_) => fs::create_dir(&path).map_err(local(&path))?,
        }
    }
    Ok(())
}

/// Counts the bytes of a copy, to tell one that stands still from one that is slow.
#[derive(Debug, Clone, Default)]
struct Moved(Arc<AtomicU64>);

impl Moved {
    fn add(&self, bytes: io::Result<usize>) -> io::Result<usize> {
        bytes.inspect(|count| {
            self.0.fetch_add(*count as u64, Ordering::Relaxed);
        })
    }

    /// Gives up on what is being done once no byte has moved for `limit`, or for up to twice as long.
    async fn while_moving<T>(
        &self,
        limit: Duration,
        doing: impl Future<Output = Result<T, GuestError>>,
    ) -> Result<T, GuestError> {
        let standing_still = async {
            let mut before = self.0.load(Ordering::Relaxed);
            loop {
                tokio::time::sleep(limit).await;
                let now = self.0.load(Ordering::Relaxed);
                if now == before {
                    return;
                }
                before = now;
            }
        };
        tokio::select! {
            done = doing => done,
            () = standing_still => Err(GuestError::Stalled(limit)),
        }
    }
}

/// A stream whose bytes are counted.
struct Counted<S> {
    stream: S,
    moved: Moved,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            let _ = self.moved.add(Ok(buffer.filled().len() - before));
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        polled.map(|written| self.moved.add(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A stream of the runtime, for code that blocks on a thread of its own.
struct Blocking {
    stream: DuplexStream,
    handle: tokio::runtime::Handle,
    moved: Moved,
}

impl Blocking {
    fn new(stream: DuplexStream, moved: &Moved) -> Self {
        Self { stream, handle: tokio::runtime::Handle::current(), moved: moved.clone() }
    }
}

impl io::Read for Blocking {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.moved.add(self.handle.block_on(self.stream.read(buffer)))
    }
}

impl io::Write for Blocking {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.moved.add(self.handle.block_on(self.stream.write(bytes)))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.handle.block_on(self.stream.flush())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Unpacks an archive as if a guest had sent it.
    fn receive(archive: Vec<u8>, to: &Path) -> Result<(), CopyError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(unpack(io::Cursor::new(archive), to))
    }

    #[test]
    fn f3_what_is_packed_here_is_unpacked_as_the_same_and_a_stream_that_breaks_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::write(from.join("a"), vec![7; 3 << 20]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (archive, packing) = pack(&from).unwrap();
            unpack(archive, &to).await.unwrap();
            packing.await.unwrap().unwrap();
            assert_eq!(fs::read(to.join("a")).unwrap(), fs::read(from.join("a")).unwrap());
            let (archive, packing) = pack(&from).unwrap();
            let broken = breaking_off(archive.take(1 << 20));
            let error = unpack(broken, &dir.path().join("torn")).await.unwrap_err();
            assert!(matches!(error, CopyError::Guest(GuestError::Transport(_))), "{error}");
            assert!(packing.await.unwrap().is_err());
            assert!(matches!(pack(Path::new("/nonexistent")), Err(CopyError::Local { .. })));
        });
    }

    /// What ends with an error instead of an end.
    fn breaking_off(from: impl AsyncRead + Unpin) -> impl AsyncRead + Unpin {
        struct Broken;
        impl AsyncRead for Broken {
            fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Err(io::Error::other("broken")))
            }
        }
        from.chain(Broken)
    }

    fn entry(archive: &mut tar::Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        // The builder refuses such names, a hostile guest does not.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o4755);
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }

    #[test]
    fn a_hostile_archive_writes_nothing_outside() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().join("secret");
        let link = outside.path().to_str().unwrap().to_owned();
        let attacks: [&[(EntryType, &str, &str)]; 5] = [
            &[(EntryType::Regular, "../escaped", "")],
            &[(EntryType::Regular, "/escaped-offshoot-test", "")],
            &[(EntryType::Symlink, "d", &link), (EntryType::Regular, "d/secret", "")],
            &[(EntryType::Link, "hard", "/etc/passwd")],
            &[(EntryType::Char, "device", "")],
        ];
        for attack in attacks {
            let to = tempfile::tempdir_in(outside.path()).unwrap();
            let mut archive = tar::Builder::new(Vec::new());
            for &(kind, name, link) in attack {
                entry(&mut archive, kind, name, link, if kind == EntryType::Regular { b"x" } else { b"" });
            }
            let error = receive(archive.into_inner().unwrap(), to.path()).unwrap_err();
            assert!(matches!(error, CopyError::Hostile { .. }), "{attack:?}: {error}");
            assert!(!target.exists() && !outside.path().join("escaped").exists(), "{attack:?}");
        }
    }

    #[test]
    fn f3_a_single_file_arrives_under_its_own_name_or_another() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        entry(&mut archive, EntryType::Regular, "a", "", b"one");
        let archive = archive.into_inner().unwrap();
        receive(archive.clone(), dir.path()).unwrap();
        receive(archive, &dir.path().join("b")).unwrap();
        assert_eq!(["a", "b"].map(|name| fs::read(dir.path().join(name)).unwrap()), [b"one", b"one"]);
    }

    #[test]
    fn a_copy_that_stands_still_is_given_up_and_a_slow_one_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let moved = Moved::default();
            let slow = async {
                for _ in 0..10 {
                    tokio::time::sleep(STALL_LIMIT * 9 / 10).await;
                    moved.add(Ok(1))?;
                }
                Ok(7)
            };
            assert_eq!(moved.while_moving(STALL_LIMIT, slow).await.unwrap(), 7);
            let stuck = moved.while_moving(STALL_LIMIT, std::future::pending::<Result<(), _>>()).await;
            assert!(matches!(stuck, Err(GuestError::Stalled(STALL_LIMIT))));
        });
    }

    #[test]
    fn f3_files_and_directories_arrive_as_cp_would_bring_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        entry(&mut archive, EntryType::Directory, "box", "", b"");
        entry(&mut archive, EntryType::Regular, "box/a", "", b"one");
        entry(&mut archive, EntryType::Symlink, "box/l", "a", b"");
        let archive = archive.into_inner().unwrap();
        receive(archive.clone(), dir.path()).unwrap();
        receive(archive, &dir.path().join("renamed")).unwrap();
        for name in ["box", "renamed"] {
            assert_eq!(fs::read(dir.path().join(name).join("l")).unwrap(), b"one");
            let mode = std::os::unix::fs::PermissionsExt::mode(
                &fs::metadata(dir.path().join(name).join("a")).unwrap().permissions(),
            );
            assert_eq!(mode & 0o7000, 0, "no set-user-id bit from a guest");
        }
    }
}
