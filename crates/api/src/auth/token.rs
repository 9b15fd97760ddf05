//! Tokens. What is kept of one is a hash: who reads the disk can not use it.
//!
//! ```text
//! ofs_<id>_<secret>                    a token: 12 hexadecimal digits, and 32 random bytes (base64url)
//! <data>/api/tokens/<id>.json          name, scope, times, and the secret's BLAKE3 hash
//! ```
//!
//! The secret has 256 random bits, so a plain hash is as good as a slow one. Each request reads the file: a token that is removed ends at once,
//! whoever removed it.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use host::codes::Coded;
use identity::Secret;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use thiserror::Error;
use utoipa::ToSchema;

use super::Scope;

const PREFIX: &str = "ofs_";
/// A token's record has some hundred bytes.
const MAX_RECORD: u64 = 64 << 10;
/// Most characters of a token's name.
const MAX_NAME: usize = 64;

/// Why tokens could not be read or changed.
#[derive(Debug, Error)]
pub enum TokenError {
    /// There is no such token.
    #[error("there is no token {0:?}; see `offshoot token ls`")]
    NotFound(String),
    /// Its name.
    #[error("a token's name is 1 to {MAX_NAME} printable characters")]
    Name,
    /// The directory.
    #[error("the tokens could not be {what}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Coded for TokenError {
    fn code(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "token_not_found",
            Self::Name => "invalid_name",
            Self::File { .. } => "state_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::Name)
    }
}

/// What is known of a token; not the token.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    /// The part of it that may be shown.
    #[schema(example = "3f9a01c2b7de")]
    pub id: String,
    /// What it is for.
    pub name: String,
    /// What it allows.
    pub scope: Scope,
    /// When it was made, in milliseconds since the epoch.
    pub created_ms: u64,
    /// When it ends, in milliseconds since the epoch; none: when it is removed.
    pub expires_ms: Option<u64>,
}

/// A token that was just made: the only time that it is shown.
#[derive(Debug)]
pub struct NewToken {
    /// What is kept of it.
    pub info: TokenInfo,
    /// The whole token.
    pub token: Secret,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    info: TokenInfo,
    /// Hexadecimal.
    hash: String,
}

/// The tokens of one data directory.
#[derive(Debug, Clone)]
pub struct Tokens {
    dir: PathBuf,
}

impl Tokens {
    /// Those below the data directory `data`.
    ///
    /// # Errors
    /// [`TokenError::File`] if the directory can not be made.
    pub fn open(data: &Path) -> Result<Self, TokenError> {
        let dir = data.join("api").join("tokens");
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&dir).map_err(file("made"))?;
        Ok(Self { dir })
    }

    /// Makes one.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn create(&self, name: &str, scope: Scope, life: Option<Duration>) -> Result<NewToken, TokenError> {
        if !(1..=MAX_NAME).contains(&name.chars().count()) || name.chars().any(char::is_control) {
            return Err(TokenError::Name);
        }
        let mut random = zeroize::Zeroizing::new([0_u8; 38]);
        getrandom::fill(&mut random[..])
            .map_err(|error| TokenError::File { what: "made", source: io::Error::other(error.to_string()) })?;
        let id: String = random[32..].iter().map(|byte| format!("{byte:02x}")).collect();
        let secret = zeroize::Zeroizing::new(URL_SAFE_NO_PAD.encode(&random[..32]));
        let now = now_ms();
        let info = TokenInfo {
            id: id.clone(),
            name: name.to_owned(),
            scope,
            created_ms: now,
            expires_ms: life.map(|life| now.saturating_add(u64::try_from(life.as_millis()).unwrap_or(u64::MAX))),
        };
        let record = Record { info: info.clone(), hash: blake3::hash(secret.as_bytes()).to_hex().to_string() };
        let text = serde_json::to_vec_pretty(&record).map_err(io::Error::from).map_err(file("written"))?;
        let temporary = self.dir.join(format!(".{id}.tmp"));
        let written =
            fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary).and_then(|mut new| {
                new.write_all(&text)?;
                new.sync_all()?;
                fs::rename(&temporary, self.path(&id))
            });
        written.map_err(file("written"))?;
        Ok(NewToken { info, token: Secret::new(format!("{PREFIX}{id}_{}", secret.as_str()).into_bytes()) })
    }

    /// Whose `token` it is; none if it is nobody's, or not any more.
    ///
    /// # Errors
    /// [`TokenError::File`].
    pub fn find(&self, token: &str) -> Result<Option<TokenInfo>, TokenError> {
        let Some((id, secret)) = token.strip_prefix(PREFIX).and_then(|rest| rest.split_once('_')) else {
            return Ok(None);
        };
        if !is_id(id) {
            return Ok(None);
        }
        let Some(record) = self.read(id)? else { return Ok(None) };
        let given = blake3::hash(secret.as_bytes()).to_hex();
        let same: bool = given.as_bytes().ct_eq(record.hash.as_bytes()).into();
        let lives = record.info.expires_ms.is_none_or(|end| now_ms() < end);
        Ok((same && lives).then_some(record.info))
    }

    /// All, oldest first; those that have expired too.
    ///
    /// # Errors
    /// [`TokenError::File`].
    pub fn list(&self) -> Result<Vec<TokenInfo>, TokenError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(file("read"))? {
            let name = entry.map_err(file("read"))?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")).filter(|id| is_id(id)) else {
                continue;
            };
            found.extend(self.read(id)?.map(|record| record.info));
        }
        found.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
        Ok(found)
    }

    /// Removes one: it ends at once.
    ///
    /// # Errors
    /// [`TokenError::NotFound`].
    pub fn remove(&self, id: &str) -> Result<(), TokenError> {
        let none = || TokenError::NotFound(id.chars().take(80).collect());
        if !is_id(id) {
            return Err(none());
        }
        fs::remove_file(self.path(id)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => none(),
            _ => file("removed")(error),
        })
    }

    fn read(&self, id: &str) -> Result<Option<Record>, TokenError> {
        let opened = match fs::File::open(self.path(id)) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file("read")(error)),
        };
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(opened, MAX_RECORD), &mut text).map_err(file("read"))?;
        let record: Record = serde_json::from_str(&text).map_err(io::Error::from).map_err(file("read"))?;
        Ok(Some(record).filter(|record| record.info.id == id))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

fn is_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn file(what: &'static str) -> impl Fn(io::Error) -> TokenError {
    move |source| TokenError::File { what, source }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn text(token: &NewToken) -> String {
        String::from_utf8(token.token.expose().to_vec()).unwrap()
    }

    #[test]
    fn o1_a_token_is_known_by_its_whole_secret_and_its_hash_alone_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let [one, two] = [Scope::Read, Scope::Admin].map(|scope| tokens.create("ci", scope, None).unwrap());
        assert_eq!(tokens.find(&text(&one)).unwrap().unwrap().scope, Scope::Read);
        assert_eq!(tokens.find(&text(&two)).unwrap().unwrap().id, two.info.id);

        let whole = text(&one);
        let secret = whole.rsplit_once('_').unwrap().1;
        let crossed = format!("ofs_{}_{secret}", two.info.id);
        let longer = format!("{whole}x");
        for wrong in [&whole[..whole.len() - 1], &longer, &crossed, "", "ofs__", "ofs_../../etc/passwd_x"] {
            assert!(tokens.find(wrong).unwrap().is_none(), "{wrong}");
        }
        for entry in fs::read_dir(dir.path().join("api/tokens")).unwrap() {
            assert!(!fs::read_to_string(entry.unwrap().path()).unwrap().contains(secret));
        }
    }

    #[test]
    fn o1_a_removed_or_expired_token_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let expired = tokens.create("a", Scope::Fork, Some(Duration::ZERO)).unwrap();
        assert!(tokens.find(&text(&expired)).unwrap().is_none());
        let removed = tokens.create("b", Scope::Fork, Some(Duration::from_secs(600))).unwrap();
        assert!(tokens.find(&text(&removed)).unwrap().is_some());
        tokens.remove(&removed.info.id).unwrap();
        assert!(tokens.find(&text(&removed)).unwrap().is_none());
        assert!(matches!(tokens.remove(&removed.info.id), Err(TokenError::NotFound(_))));
        assert!(matches!(tokens.remove("../../x"), Err(TokenError::NotFound(_))));
        assert_eq!(tokens.list().unwrap().len(), 1);
    }
}
