//! Tokens and registrants as they are stored, apart from the types that they are read into: all in the file
//! `registrants.json` of a data directory, or each in a Secret.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Scope, ScopeSpec, TokenId, from_hex,
    state::{JoinedRegistrant, JoiningState, Token},
};
use crate::model::hex;

/// The version that is written.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct StoredState {
    version: u32,
    tokens: Vec<StoredToken>,
    registrants: Vec<StoredRegistrant>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredToken {
    id: String,
    secret_sha256: String,
    scope: ScopeSpec,
    created_by: String,
    created: u64,
    expires: u64,
    uses: u32,
    used: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredRegistrant {
    user: String,
    scope: ScopeSpec,
    host: String,
    token: String,
    joined: u64,
    expires: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revoked: Option<u64>,
}

/// One of them alone.
#[derive(Debug, Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    stored: T,
}

impl StoredToken {
    fn new(id: TokenId, token: &Token) -> Self {
        Self {
            id: id.to_string(),
            secret_sha256: hex::encode(&token.secret),
            scope: token.scope.spec(),
            created_by: token.created_by.clone(),
            created: seconds(token.created),
            expires: seconds(token.expires),
            uses: token.uses,
            used: token.used,
        }
    }

    fn read(self) -> Result<(TokenId, Token), String> {
        let Self { id, secret_sha256, scope, created_by, created, expires, uses, used } = self;
        let at = |err: String| format!("token {id:?}: {err}");
        let token = Token {
            scope: Scope::parse(&scope).map_err(|err| at(err.to_string()))?,
            created_by,
            created: time(created),
            expires: time(expires),
            uses,
            used,
            secret: from_hex(&secret_sha256).ok_or_else(|| at("secret_sha256: not 64 hexadecimal digits".into()))?,
        };
        Ok((id.parse().map_err(|err| at(format!("{err}")))?, token))
    }
}

impl StoredRegistrant {
    fn new(user: &str, registrant: &JoinedRegistrant) -> Self {
        Self {
            user: user.to_owned(),
            scope: registrant.scope.spec(),
            host: registrant.host.clone(),
            token: registrant.token.to_string(),
            joined: seconds(registrant.joined),
            expires: seconds(registrant.expires),
            revoked: registrant.revoked.map(seconds),
        }
    }

    fn read(self) -> Result<(String, JoinedRegistrant), String> {
        let Self { user, scope, host, token, joined, expires, revoked } = self;
        let at = |err: String| format!("registrant {user:?}: {err}");
        let registrant = JoinedRegistrant {
            scope: Scope::parse(&scope).map_err(|err| at(err.to_string()))?,
            host,
            token: token.parse().map_err(|err| at(format!("{err}")))?,
            joined: time(joined),
            expires: time(expires),
            revoked: revoked.map(time),
        };
        Ok((user, registrant))
    }
}

/// All, for a file.
pub(super) fn encode(state: &JoiningState) -> Vec<u8> {
    let mut registrants: Vec<_> = state.registrants.iter().collect();
    registrants.sort_unstable_by_key(|(user, registrant)| (registrant.joined, *user));
    let stored = StoredState {
        version: VERSION,
        tokens: state.tokens.iter().map(|(id, token)| StoredToken::new(*id, token)).collect(),
        registrants: registrants.into_iter().map(|(user, one)| StoredRegistrant::new(user, one)).collect(),
    };
    write(&stored)
}

/// What the file holds, or what is wrong with it.
pub(super) fn decode(bytes: &[u8]) -> Result<JoiningState, String> {
    let stored: StoredState = read(bytes)?;
    let mut state = JoiningState::default();
    for token in stored.tokens {
        let (id, token) = token.read()?;
        state.put_token(id, token);
    }
    for registrant in stored.registrants {
        let (user, registrant) = registrant.read()?;
        state.put_registrant(user, registrant);
    }
    Ok(state)
}

/// One token alone.
pub(super) fn encode_token(id: TokenId, token: &Token) -> Vec<u8> {
    write(&Versioned { version: VERSION, stored: StoredToken::new(id, token) })
}

pub(super) fn decode_token(bytes: &[u8]) -> Result<(TokenId, Token), String> {
    read::<Versioned<StoredToken>>(bytes)?.stored.read()
}

/// One registrant alone.
pub(super) fn encode_registrant(user: &str, registrant: &JoinedRegistrant) -> Vec<u8> {
    write(&Versioned { version: VERSION, stored: StoredRegistrant::new(user, registrant) })
}

pub(super) fn decode_registrant(bytes: &[u8]) -> Result<(String, JoinedRegistrant), String> {
    read::<Versioned<StoredRegistrant>>(bytes)?.stored.read()
}

fn write(stored: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(stored).expect("texts and numbers can be written")
}

/// What has a version, if it is one that this program knows.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_slice(bytes).map_err(|err| err.to_string())?;
    if version != VERSION {
        return Err(format!("is of version {version}, and this program reads {VERSION}: a newer one wrote it"));
    }
    serde_json::from_slice(bytes).map_err(|err| err.to_string())
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A time far beyond what the clock can say is its end.
fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(u64::from(u32::MAX) * 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of version 1, which every later version has to read.
    const VERSION_1: &str = r#"{
  "version": 1,
  "tokens": [
    {
      "id": "0101010101010101",
      "secret_sha256": "0202020202020202020202020202020202020202020202020202020202020202",
      "scope": {
        "namespace": "shop",
        "service": "web",
        "verbs": [
          "create"
        ],
        "addresses": [
          "own"
        ]
      },
      "created_by": "gangplank:loopback",
      "created": 1800000000,
      "expires": 1800003600,
      "uses": 2,
      "used": 1
    }
  ],
  "registrants": [
    {
      "user": "gangplank:registrant:0a0b0c0d0e0f",
      "scope": {
        "namespace": "shop",
        "service": "web",
        "verbs": [
          "create"
        ],
        "addresses": [
          "own"
        ]
      },
      "host": "vm-1",
      "token": "0101010101010101",
      "joined": 1800000001,
      "expires": 1800086401,
      "revoked": 1800000002
    }
  ]
}"#;

    #[test]
    fn version_1_is_read_and_written() {
        let state = decode(VERSION_1.as_bytes()).expect("valid");
        assert_eq!((state.tokens.len(), state.registrants.len()), (1, 1));
        let registrant = &state.registrants["gangplank:registrant:0a0b0c0d0e0f"];
        assert_eq!((registrant.host.as_str(), registrant.revoked), ("vm-1", Some(time(1_800_000_002))));
        assert_eq!(String::from_utf8(encode(&state)).expect("UTF-8"), VERSION_1);
        assert_eq!(decode(&encode(&JoiningState::default())).expect("valid"), JoiningState::default());
    }

    #[test]
    fn one_alone_is_read_as_it_was_written() {
        let state = decode(VERSION_1.as_bytes()).expect("valid");
        for (id, token) in &state.tokens {
            let text = encode_token(*id, token);
            assert!(String::from_utf8_lossy(&text).contains("\"version\": 1"));
            assert_eq!(decode_token(&text).expect("valid"), (*id, token.clone()));
        }
        for (user, registrant) in &state.registrants {
            let text = encode_registrant(user, registrant);
            assert_eq!(decode_registrant(&text).expect("valid"), (user.clone(), registrant.clone()));
        }
        let newer = br#"{"version": 2, "user": 7}"#;
        assert!(decode_registrant(newer).expect_err("refused").contains("a newer one wrote it"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, why) in [
            (VERSION_1.replace("\"version\": 1", "\"version\": 2"), "is of version 2"),
            (VERSION_1.replace("\"create\"", "\"fly\""), "token \"0101010101010101\": verbs: \"fly\""),
            (VERSION_1.replace("0202", "02"), "secret_sha256: not 64"),
            (VERSION_1[..200].to_owned(), "EOF"),
        ] {
            let err = decode(text.as_bytes()).expect_err("refused");
            assert!(err.contains(why), "{err}");
        }
    }
}
