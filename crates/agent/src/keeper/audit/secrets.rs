//! What looks like a secret: by the name of a variable or an option, or by the form of a value. Pure, and a table.
//!
//! The forms are those that their issuers have published so that leaks can be found: the prefixes of tokens (GitHub "Token formats", GitLab "Token overview",
//! Slack "Token types", AWS "IAM identifiers: unique ids", Stripe "API keys", Google Cloud "API keys", npm, PyPI, Docker Hub, Hugging Face, Vault, DigitalOcean, age),
//! RFC 7468 (PEM), RFC 7519 (JWT), RFC 3986 (userinfo). The lengths follow the rules of gitleaks, which are made of the same.
//!
//! A miss is a missing warning and a false alarm a warning too many, so values that can be no secret are left out: paths, placeholders, switches, short numbers.

/// Which bytes follow a prefix.
#[derive(Debug, Clone, Copy)]
enum Tail {
    /// Letters and digits.
    Alphanumeric,
    /// And `_` and `-`, as in base64url.
    Url,
    /// And dots.
    Dotted,
    /// Upper-case letters and digits only, and exactly that many.
    ExactlyUpper,
}

/// A form: prefix, what follows, at least how much of it, and what it is.
struct Form(&'static str, Tail, usize, &'static str);

const FORMS: [Form; 34] = [
    Form("ghp_", Tail::Alphanumeric, 30, "a GitHub token"),
    Form("gho_", Tail::Alphanumeric, 30, "a GitHub token"),
    Form("ghu_", Tail::Alphanumeric, 30, "a GitHub token"),
    Form("ghs_", Tail::Alphanumeric, 30, "a GitHub token"),
    Form("ghr_", Tail::Alphanumeric, 30, "a GitHub token"),
    Form("github_pat_", Tail::Url, 30, "a GitHub token"),
    Form("glpat-", Tail::Url, 20, "a GitLab token"),
    Form("glrt-", Tail::Url, 20, "a GitLab token"),
    Form("sk-", Tail::Url, 20, "an API key (sk-…)"),
    Form("sk_live_", Tail::Alphanumeric, 16, "a Stripe key"),
    Form("rk_live_", Tail::Alphanumeric, 16, "a Stripe key"),
    Form("sk_test_", Tail::Alphanumeric, 16, "a Stripe key"),
    Form("xoxb-", Tail::Url, 10, "a Slack token"),
    Form("xoxp-", Tail::Url, 10, "a Slack token"),
    Form("xoxa-", Tail::Url, 10, "a Slack token"),
    Form("xoxr-", Tail::Url, 10, "a Slack token"),
    Form("xoxs-", Tail::Url, 10, "a Slack token"),
    Form("xapp-", Tail::Url, 10, "a Slack token"),
    Form("AKIA", Tail::ExactlyUpper, 16, "an AWS access key id"),
    Form("ASIA", Tail::ExactlyUpper, 16, "an AWS access key id"),
    Form("AIza", Tail::Url, 35, "a Google API key"),
    Form("ya29.", Tail::Url, 20, "a Google access token"),
    Form("GOCSPX-", Tail::Url, 20, "a Google client secret"),
    Form("npm_", Tail::Alphanumeric, 36, "an npm token"),
    Form("pypi-", Tail::Url, 50, "a PyPI token"),
    Form("dckr_pat_", Tail::Url, 20, "a Docker token"),
    Form("hf_", Tail::Alphanumeric, 30, "a Hugging Face token"),
    Form("hvs.", Tail::Url, 24, "a Vault token"),
    Form("dop_v1_", Tail::Alphanumeric, 60, "a DigitalOcean token"),
    Form("shpat_", Tail::Alphanumeric, 30, "a Shopify token"),
    Form("glsa_", Tail::Url, 30, "a Grafana token"),
    Form("SG.", Tail::Dotted, 60, "a SendGrid key"),
    Form("AGE-SECRET-KEY-1", Tail::Alphanumeric, 50, "an age key"),
    Form("Bearer ", Tail::Dotted, 20, "a bearer token"),
];

impl Tail {
    fn has(self, byte: u8) -> bool {
        match self {
            Self::Alphanumeric => byte.is_ascii_alphanumeric(),
            Self::Url => byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'),
            Self::Dotted => byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'),
            Self::ExactlyUpper => byte.is_ascii_uppercase() || byte.is_ascii_digit(),
        }
    }
}

impl Form {
    fn is_in(&self, text: &str) -> bool {
        let Self(prefix, tail, least, _) = self;
        text.match_indices(prefix).any(|(at, _)| {
            let before = at.checked_sub(1).and_then(|before| text.as_bytes().get(before));
            if before.is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')) {
                return false;
            }
            let rest = &text.as_bytes()[at + prefix.len()..];
            let len = rest.iter().take_while(|&&byte| tail.has(byte)).count();
            let fits = match tail {
                // The next byte would belong to a longer word.
                Tail::ExactlyUpper => len == *least && !rest.get(len).is_some_and(u8::is_ascii_alphanumeric),
                _ => len >= *least,
            };
            fits && is_random(&rest[..len])
        })
    }
}

/// Whether these bytes could have been drawn: words of a language, and the same character over and over, were not.
fn is_random(bytes: &[u8]) -> bool {
    let mut seen = [false; 256];
    bytes.iter().for_each(|&byte| seen[usize::from(byte)] = true);
    let digit = bytes.iter().any(u8::is_ascii_digit);
    let mixed = bytes.iter().any(u8::is_ascii_uppercase) && bytes.iter().any(u8::is_ascii_lowercase);
    let least = if bytes.len() >= 20 { 10 } else { 6 };
    seen.iter().filter(|&&seen| seen).count() >= least && (digit || mixed)
}

/// What a text has in it by its form, wherever in it.
pub(super) fn looks_like(text: &str) -> Option<&'static str> {
    if is_private_key(text) {
        return Some("a private key");
    }
    if is_jwt(text) {
        return Some("a JSON web token");
    }
    if has_userinfo(text) {
        return Some("a password in an address");
    }
    FORMS.iter().find(|form| form.is_in(text)).map(|form| form.3)
}

/// RFC 7468, and what OpenSSH and PGP make of it.
fn is_private_key(text: &str) -> bool {
    text.match_indices("-----BEGIN ").any(|(at, begin)| {
        let rest = &text[at + begin.len()..];
        rest.split_once("-----").is_some_and(|(label, _)| label.len() < 40 && label.contains("PRIVATE KEY"))
    })
}

/// RFC 7519: three parts in base64url; the first two are JSON objects, which begin with `{"`.
fn is_jwt(text: &str) -> bool {
    text.match_indices("eyJ").any(|(at, _)| {
        let before = at.checked_sub(1).and_then(|before| text.as_bytes().get(before));
        let word =
            text[at..].split(|character: char| !character.is_ascii() || !Tail::Dotted.has(character as u8)).next();
        let mut parts = word.unwrap_or_default().split('.');
        let mut part = |begins: &str| parts.next().is_some_and(|part| part.len() >= 10 && part.starts_with(begins));
        !before.is_some_and(u8::is_ascii_alphanumeric) && part("eyJ") && part("eyJ") && part("")
    })
}

/// RFC 3986: `scheme://user:password@host`.
fn has_userinfo(text: &str) -> bool {
    text.match_indices("://").any(|(at, separator)| {
        if !text[..at].ends_with(|character: char| character.is_ascii_alphanumeric()) {
            return false;
        }
        let rest = &text[at + separator.len()..];
        let end = rest.find(|character: char| {
            character.is_whitespace() || matches!(character, '/' | '?' | '#' | '"' | '\'' | '<' | '>' | '`' | '\\')
        });
        let authority = &rest[..end.unwrap_or(rest.len())];
        let Some((userinfo, host)) = authority.rsplit_once('@') else { return false };
        let Some((_, password)) = userinfo.split_once(':') else { return false };
        !host.is_empty() && !password.is_empty() && !is_placeholder(password)
    })
}

/// Words of a name that say that its value is a secret…
const WORDS: [&str; 10] = [
    "TOKEN",
    "SECRET",
    "SECRETS",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "APIKEY",
    "CREDENTIAL",
    "CREDENTIALS",
    "SSHPASS",
];
/// …also as the end of a longer word (`PGPASSWORD`)…
const ENDINGS: [&str; 6] = ["PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "APIKEY"];
/// …or only as the last of several…
const LAST: [&str; 3] = ["PASS", "PWD", "AUTH"];
/// …or before `KEY`.
const KEYS: [&str; 14] = [
    "API",
    "ACCESS",
    "PRIVATE",
    "SECRET",
    "ENCRYPTION",
    "SIGNING",
    "MASTER",
    "AUTH",
    "ACCOUNT",
    "DEPLOY",
    "SSH",
    "SESSION",
    "COOKIE",
    "HMAC",
];
/// Last words by which it is about a secret and not one.
const ABOUT: [&str; 47] = [
    "ID",
    "IDS",
    "NAME",
    "NAMES",
    "URL",
    "URI",
    "ENDPOINT",
    "HOST",
    "TYPE",
    "KIND",
    "EXPIRY",
    "EXPIRES",
    "EXPIRATION",
    "TTL",
    "TIMEOUT",
    "AGE",
    "LENGTH",
    "LEN",
    "SIZE",
    "LIMIT",
    "COUNT",
    "MAX",
    "MIN",
    "ENABLED",
    "DISABLED",
    "REQUIRED",
    "POLICY",
    "ALGORITHM",
    "ALG",
    "ISSUER",
    "AUDIENCE",
    "SCOPE",
    "SCOPES",
    "REGION",
    "VERSION",
    "USER",
    "USERNAME",
    "HEADER",
    "PREFIX",
    "FORMAT",
    "PROVIDER",
    "STORE",
    "MANAGER",
    "BACKEND",
    "COMMAND",
    "STDIN",
    "PROMPT",
];
/// Last words by which it says where a secret lies.
const PLACES: [&str; 5] = ["FILE", "PATH", "DIR", "FOLDER", "SOCK"];
/// First words of options that are switches.
const SWITCHES: [&str; 6] = ["NO", "SKIP", "DISABLE", "ENABLE", "USE", "ALLOW"];
/// Values that say what to do, or that there is nothing.
const SETTINGS: [&str; 18] = [
    "true",
    "false",
    "yes",
    "no",
    "on",
    "off",
    "none",
    "null",
    "nil",
    "undefined",
    "default",
    "auto",
    "required",
    "optional",
    "enabled",
    "disabled",
    "prompt",
    "stdin",
];

/// Whether a variable or an option of this name, with this value, holds a secret.
pub(super) fn is_secret(name: &str, value: &str) -> bool {
    !is_no_secret(value) && is_secret_name(name, is_path(value))
}

fn is_secret_name(name: &str, path: bool) -> bool {
    let words = words(name);
    let Some((last, before)) = words.split_last() else { return false };
    if path || ABOUT.contains(&last.as_str()) || words.first().is_some_and(|first| SWITCHES.contains(&first.as_str())) {
        return false;
    }
    let ends = !before.is_empty() && LAST.contains(&last.as_str());
    // It names a file, and has something else: the content, by mistake.
    let words = if PLACES.contains(&last.as_str()) { before } else { &words };
    let word = |word: &String| {
        WORDS.contains(&word.as_str())
            || ENDINGS.iter().any(|ending| word.len() > ending.len() && word.ends_with(ending))
    };
    let pair = |pair: &[String]| pair[1] == "KEY" && KEYS.contains(&pair[0].as_str());
    words.iter().any(word) || words.windows(2).any(pair) || ends
}

/// The words of a name, in upper case: `clientSecret`, `client-secret` and `CLIENT_SECRET` have the same.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut lower = false;
    for character in name.chars() {
        let ends = !character.is_ascii_alphanumeric() || (lower && character.is_ascii_uppercase());
        if ends {
            words.push(String::new());
        }
        if character.is_ascii_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.push(character.to_ascii_uppercase());
        }
        lower = character.is_ascii_lowercase();
    }
    words.retain(|word| !word.is_empty());
    words
}

fn is_no_secret(value: &str) -> bool {
    let value = value.trim_matches(|character: char| character.is_whitespace() || matches!(character, '"' | '\''));
    value.is_empty()
        || SETTINGS.iter().any(|setting| value.eq_ignore_ascii_case(setting))
        || (value.len() < 6 && value.bytes().all(|byte| byte.is_ascii_digit()))
        || is_placeholder(value)
}

/// What stands for a value: a variable, a command, a pattern, or the same character over and over.
fn is_placeholder(value: &str) -> bool {
    let first = value.chars().next();
    let same = value.chars().all(|character| Some(character) == first);
    same && matches!(first, Some('*' | '.' | 'x' | 'X' | '-' | '?' | '…'))
        || value.starts_with(['$', '`', '<', '@'])
        || value.starts_with("{{")
        || value.starts_with("%(")
        || value.starts_with("%s")
}

/// Whether it is a path and no secret that begins with a slash: those in base64 end, or go on, otherwise.
fn is_path(value: &str) -> bool {
    let value = value.strip_prefix("file://").unwrap_or(value);
    (value.starts_with("./") || value.starts_with("../") || value.starts_with("~/"))
        || (value.len() > 1
            && value.starts_with('/')
            && value[1..].contains('/')
            && !value.contains(['+', '=', ' ', '\n']))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No real ones: each is put together so that no scanner takes this file for a leak.
    fn token(prefix: &str, len: usize) -> String {
        prefix.chars().chain("a1B2c3D4e5F6g7H8i9J0".chars().cycle().take(len)).collect()
    }

    #[test]
    fn i17_values_are_known_by_their_form_wherever_they_stand() {
        for (prefix, len, what) in [
            ("ghp_", 36, "a GitHub token"),
            ("github_pat_", 82, "a GitHub token"),
            ("glpat-", 20, "a GitLab token"),
            ("sk-", 48, "an API key (sk-…)"),
            ("sk-ant-api03-", 60, "an API key (sk-…)"),
            ("xoxb-", 40, "a Slack token"),
            ("AIza", 35, "a Google API key"),
            ("npm_", 36, "an npm token"),
            ("hf_", 34, "a Hugging Face token"),
        ] {
            let token = token(prefix, len);
            for text in
                [token.clone(), format!("--x={token}"), format!("curl -H 'X: {token}' there"), format!("a\n{token}\n")]
            {
                assert_eq!(looks_like(&text), Some(what), "{text}");
            }
            // A part of a longer word, cut short, or made of one character.
            for text in
                [format!("a{token}"), token[..prefix.len() + 5].to_owned(), format!("{prefix}{}", "x".repeat(len))]
            {
                assert_eq!(looks_like(&text), None, "{text}");
            }
        }
        assert_eq!(looks_like("AKIAQ3EGRZ2NXYWV5J7T"), Some("an AWS access key id"));
        assert_eq!(looks_like("AKIAQ3EGRZ2NXYWV5J7TA"), None);
        let jwt = format!("{}.{}.{}", token("eyJ", 20), token("eyJ", 30), token("", 43));
        assert_eq!(looks_like(&format!("Authorization: Bearer {jwt}")), Some("a JSON web token"));
        assert_eq!(looks_like(&format!("Authorization: Bearer {}", token("", 40))), Some("a bearer token"));
        for label in ["PRIVATE KEY", "RSA PRIVATE KEY", "OPENSSH PRIVATE KEY", "PGP PRIVATE KEY BLOCK"] {
            assert_eq!(looks_like(&format!("-----BEGIN {label}-----\nMIIE")), Some("a private key"));
        }
        for text in
            ["-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "-----BEGIN PRIVATE KEY", "eyJ", "eyJ.eyJ.x"]
        {
            assert_eq!(looks_like(text), None, "{text}");
        }
    }

    #[test]
    fn i17_an_address_with_a_password_is_found_and_one_without_is_not() {
        for text in [
            "postgres://app:hunter2@db/app",
            "redis://:hunter2@cache:6379",
            "x --db=mysql://u:p@[::1]/d",
            "amqp://a:b%40c@q",
        ] {
            assert_eq!(looks_like(text), Some("a password in an address"), "{text}");
        }
        for text in [
            "postgres://app@db/app",
            "http://host:80/a@b:c",
            "http://host/?q=a:b@c",
            "postgres://app:$PASSWORD@db",
            "postgres://app:***@db",
            "postgres://app:@db",
            "://u:p@h",
            "a://u:p@",
            "user@host:path",
            "git@github.com:a/b",
        ] {
            assert_eq!(looks_like(text), None, "{text}");
        }
    }

    #[test]
    fn i17_names_tell_secrets_and_values_that_can_be_none_are_passed_over() {
        let secret = [
            "API_TOKEN",
            "GITHUB_TOKEN",
            "TOKEN",
            "DB_PASSWORD",
            "PGPASSWORD",
            "MYSQL_PWD",
            "MYSQL_ROOT_PASSWORD",
            "SMTP_PASS",
            "AWS_SECRET_ACCESS_KEY",
            "CLIENT_SECRET",
            "SECRET_KEY_BASE",
            "clientSecret",
            "client-secret",
            "--api-key",
            "OPENAI_API_KEY",
            "PRIVATE_KEY",
            "SSH_PRIVATE_KEY",
            "passphrase",
            "STRIPE_APIKEY",
            "REDISCLI_AUTH",
            "GOOGLE_CREDENTIALS",
            "TOKEN_FILE",
        ];
        for name in secret {
            assert!(is_secret(name, "hunter2hunter2"), "{name}");
        }
        let harmless = [
            "PATH",
            "PWD",
            "OLDPWD",
            "HOME",
            "SSH_AUTH_SOCK",
            "XAUTHORITY",
            "TOKENIZERS_PARALLELISM",
            "MAX_TOKENS",
            "AWS_ACCESS_KEY_ID",
            "TOKEN_TTL",
            "SECRET_NAME",
            "PASSWORD_POLICY",
            "PUBLIC_KEY",
            "KEYBOARD",
            "MONKEY",
            "KEY",
            "no-password",
            "password-stdin",
            "AUTH",
            "PASS",
            "COMPASS",
            "",
            "__",
            "GPG_AGENT_INFO",
            "TOKEN_URL",
        ];
        for name in harmless {
            assert!(!is_secret(name, "hunter2hunter2"), "{name}");
        }
        for value in [
            "",
            " ",
            "true",
            "FALSE",
            "none",
            "12345",
            "/run/secrets/token",
            "~/.token",
            "./token",
            "file:///etc/token",
            "$TOKEN",
            "${TOKEN}",
            "$(cat /token)",
            "`cat token`",
            "<token>",
            "{{ token }}",
            "%(token)s",
            "@token",
            "****",
            "xxxxxxxx",
            "\"\"",
            "'none'",
        ] {
            assert!(!is_secret("API_TOKEN", value), "{value}");
        }
        // A secret may begin with a slash.
        for value in
            ["123456", "postgres", "/bPxRfiCYEXAMPLEKEYabc+wJalrXUtn", "/wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"]
        {
            assert!(is_secret("AWS_SECRET_ACCESS_KEY", value), "{value}");
        }
    }

    #[test]
    fn i17_no_text_makes_it_stumble() {
        for text in ["ghp_", "é://é:é@é", "eyJé.eyJé.é", "-----BEGIN é", "AKIA\u{fffd}", "://", "@:@:@://:@", "ß=ß"]
        {
            let _ = (looks_like(text), is_secret(text, text), words(text));
        }
    }
}
