//! Files to and from a fork: single ones as they are, or anything as a tar stream. Nothing is written on the host.

use std::{io, sync::Arc};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, TryStreamExt};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, DuplexStream, duplex};
use tokio_util::io::{ReaderStream, StreamReader};
use utoipa::{IntoParams, ToSchema};

use super::connect;
use crate::{
    App,
    auth::Forker,
    extract::{Asked, At},
    problem::Problem,
};

/// Bytes between the guest and the client.
const BUFFER: usize = 256 << 10;
/// A tar archive is made of these.
const BLOCK: usize = 512;
/// Longest path in the guest.
const MAX_PATH: usize = 4096;
/// Most bytes of what stands before a file in an archive (a long name, extended attributes).
const MAX_EXTENSION: u64 = 1 << 20;

/// How a file travels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = FileFormat)]
pub(super) enum Format {
    /// One file, as it is.
    #[default]
    Raw,
    /// A tar stream: a file or a folder with everything in it.
    Tar,
}

/// Which file.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Which {
    /// Its path in the guest, absolute.
    #[param(example = "/etc/hostname", pattern = "^/")]
    path: String,
    /// `raw` (one file as it is) or `tar` (a file or a folder).
    #[serde(default)]
    #[param(value_type = Format, required = false)]
    format: Format,
    /// Permission bits of a new file in octal digits; only for `raw` uploads.
    #[serde(default)]
    #[param(nullable = false, pattern = "^[0-7]{1,4}$")]
    mode: Option<String>,
}

impl Which {
    fn check(&self) -> Result<(), Problem> {
        let plain = self.path.starts_with('/') && self.path.len() <= MAX_PATH && !self.path.contains('\0');
        if plain { Ok(()) } else { Err(Problem::invalid("path", "a path in the guest is absolute, up to 4096 bytes")) }
    }
}

/// Read a file or a folder of a fork
#[utoipa::path(get, path = "/v1/forks/{fork}/files", tag = "forks", params(("fork" = String, Path, description = "Name or id"), Which), responses(
    (
        status = 200,
        description = "Its content, or a tar stream",
        content((Vec<u8> = "application/octet-stream"), (Vec<u8> = "application/x-tar"))
    ),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The fork did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn download(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
    Asked(which): Asked<Which>,
) -> Result<Response, Problem> {
    which.check()?;
    let (_, mut channel) = connect(&app, fork).await?;
    let (mut ours, theirs) = duplex(BUFFER);
    let path = which.path.clone();
    let packing = tokio::spawn(async move { channel.pack_from(&path, theirs).await });
    // An error of the guest comes before the first byte, or not at all.
    let mut first = vec![0; BLOCK];
    if let Err(error) = ours.read_exact(&mut first).await {
        packing.await.map_err(|error| Problem::internal(&error))??;
        return Err(Problem::internal(&error));
    }
    if which.format == Format::Tar {
        let stream = ReaderStream::with_capacity(io::Cursor::new(first).chain(ours), 64 << 10);
        // An archive that ends early must not look like a whole one: its end is an error then.
        let stream = stream.chain(futures_util::stream::once(packing).filter_map(async |packed| match packed {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Err(io::Error::other(error))),
            Err(error) => Some(Err(io::Error::other(error))),
        }));
        return Ok(([(header::CONTENT_TYPE, "application/x-tar")], Body::from_stream(stream)).into_response());
    }
    let len = file_of(&mut ours, first).await?;
    // Should it end before that, the client sees it: the length is announced.
    let stream = ReaderStream::with_capacity(ours.take(len), 64 << 10);
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, len.to_string())];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// Reads up to the content of the one file of an archive, which is hostile; answers with the content's length.
async fn file_of(archive: &mut DuplexStream, mut block: Vec<u8>) -> Result<u64, Problem> {
    let torn = |_| Problem::new(StatusCode::BAD_GATEWAY, "hostile_archive", "the sandbox sent no proper archive");
    loop {
        let header = tar::Header::from_byte_slice(&block);
        let len = header.entry_size().map_err(torn)?;
        match header.entry_type() {
            tar::EntryType::Regular => return Ok(len),
            // What stands before the file itself.
            tar::EntryType::GNULongName
            | tar::EntryType::GNULongLink
            | tar::EntryType::XHeader
            | tar::EntryType::XGlobalHeader
                if len <= MAX_EXTENSION =>
            {
                let padded = len.div_ceil(BLOCK as u64) * BLOCK as u64;
                let mut skipped = archive.take(padded);
                tokio::io::copy(&mut skipped, &mut tokio::io::sink()).await.map_err(torn)?;
                archive.read_exact(&mut block).await.map_err(torn)?;
            }
            _ => {
                let detail = "this is no regular file; ask for it with format=tar";
                return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "not_a_file", detail).in_field("path"));
            }
        }
    }
}

/// Write a file or a folder into a fork
///
/// `raw`: the body is one file's content and needs a Content-Length; it is put at `path`, or into it where that is a folder. `tar`: a stream, unpacked as `cp -r` would
/// bring it.
#[utoipa::path(put, path = "/v1/forks/{fork}/files", tag = "forks", params(("fork" = String, Path, description = "Name or id"), Which), request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 204, description = "It is there"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The fork did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn upload(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
    Asked(which): Asked<Which>,
    request: Request,
) -> Result<StatusCode, Problem> {
    which.check()?;
    let len = request.headers().get(header::CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse::<u64>().ok());
    let body = StreamReader::new(request.into_body().into_data_stream().map_err(io::Error::other));
    let archive: Box<dyn AsyncRead + Unpin + Send> = match which.format {
        Format::Tar => Box::new(body),
        Format::Raw => {
            let len = len.ok_or_else(|| {
                Problem::new(StatusCode::LENGTH_REQUIRED, "length_required", "a raw file needs a Content-Length")
            })?;
            let head = head(&which, len)?;
            let padding = len.next_multiple_of(BLOCK as u64) - len;
            // Two empty blocks are the archive's end.
            let tail = vec![0; usize::try_from(padding).unwrap_or(0) + 2 * BLOCK];
            Box::new(io::Cursor::new(head).chain(body.take(len)).chain(io::Cursor::new(tail)))
        }
    };
    let (_, mut channel) = connect(&app, fork).await?;
    channel.unpack_into(&which.path, archive).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn head(which: &Which, len: u64) -> Result<Vec<u8>, Problem> {
    let mode = match which.mode.as_deref() {
        None => 0o644,
        Some(text) => u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| Problem::invalid("mode", "a mode is octal digits up to 7777"))?,
    };
    let name = which.path.rsplit('/').next().filter(|name| !matches!(*name, "" | "." | ".."));
    let name = name.ok_or_else(|| Problem::invalid("path", "the path of a raw file ends in its name"))?;
    let mut header = tar::Header::new_gnu();
    header.set_size(len);
    header.set_mode(mode);
    let now = crate::events::now_ms() / 1000;
    header.set_mtime(now);
    header.set_path(name).map_err(|_| Problem::invalid("path", "the file's name is too long"))?;
    header.set_cksum();
    Ok(header.as_bytes().to_vec())
}
