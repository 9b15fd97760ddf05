//! `cp`, as tar streams. What comes out of a fork is hostile, whoever hands it on: it is unpacked by the same code as here.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use host::guest::{CopyError, pack, unpack};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::body::{Bytes, Frame};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::{
    args::Cp,
    commands::{
        Outcome,
        cp::{Copy, print, sides},
    },
    error::Failure,
    output::Output,
    remote::client::{Client, lost, part},
};

pub async fn copy(args: &Cp, client: &mut Client, output: &Output) -> Outcome {
    let (fork, copy) = sides(args)?;
    let url = |path: &str| format!("/v1/forks/{}/files?format=tar&path={}", part(fork), part(path));
    match copy {
        Copy::In { from, path } => copy_in(client, from, &url(path)).await?,
        Copy::Out { path, to } => copy_out(client, &url(path), to).await?,
    }
    print(args, output)?;
    Ok(0)
}

async fn copy_in(client: &mut Client, from: &Path, url: &str) -> Result<(), Failure> {
    let (archive, packing) = pack(from)?;
    let failed: Arc<Mutex<Option<CopyError>>> = Arc::default();
    let noted = Arc::clone(&failed);
    // A file that can not be read breaks the request off: an archive that just ended would count as whole.
    let end = stream::once(async move {
        match packing.await.map_err(io::Error::other)? {
            Ok(()) => Ok(Bytes::new()),
            Err(error) => {
                *noted.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Err(io::Error::other("a file could not be read"))
            }
        }
    });
    let parts = ReaderStream::with_capacity(archive, 64 << 10).chain(end);
    let parts = parts.try_filter(|bytes| std::future::ready(!bytes.is_empty()));
    let sent = client.upload(url, StreamBody::new(parts.map_ok(Frame::data)).boxed_unsync()).await;
    match failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(error.into()),
        None => sent,
    }
}

async fn copy_out(client: &mut Client, url: &str, to: &Path) -> Result<(), Failure> {
    let answer = client.download(url).await?;
    let parts = TryStreamExt::map_err(BodyStream::new(answer.into_body()), io::Error::other);
    let parts = parts.try_filter_map(|frame| std::future::ready(Ok(frame.into_data().ok())));
    match unpack(StreamReader::new(parts), to).await {
        // What broke is the way to the daemon, or the daemon's to the fork.
        Err(CopyError::Guest(error)) => Err(lost(&error)),
        other => Ok(other?),
    }
}
