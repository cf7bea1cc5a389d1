//! Tokens and registrants: what changes them, as pure functions. Time is an argument.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime},
};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{Scope, Secret, TokenId};

/// Tokens that can exist at once.
const MAX_TOKENS: usize = 1_000;

/// The same for those of one namespace: who may create tokens there leaves room for the others.
const MAX_TOKENS_PER_NAMESPACE: usize = MAX_TOKENS / 4;

/// Registrants that can exist at once, revoked ones included.
const MAX_REGISTRANTS: usize = 20_000;

/// The same for those of one namespace.
const MAX_REGISTRANTS_PER_NAMESPACE: usize = MAX_REGISTRANTS / 2;

/// How long a token that has expired is remembered, to say so.
const EXPIRED_TOKEN_MEMORY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long after its end a certificate may still be renewed.
pub(super) const RENEWAL_GRACE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How long after the end of its last certificate a registrant is remembered: until then it can keep its name by joining again,
/// and one that was revoked is known.
const REGISTRANT_MEMORY: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// How every user name of a registrant begins.
pub(super) const USER_PREFIX: &str = "gangplank:registrant:";

/// SHA-256 of a secret. The secret has 256 random bits, so nothing slower is needed.
pub(super) type SecretHash = [u8; 32];

pub(super) fn hash(secret: &[u8]) -> SecretHash {
    Sha256::digest(secret).into()
}

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What may be done with it.
    pub scope: Scope,
    /// Who created it.
    pub created_by: String,
    /// When.
    pub created: SystemTime,
    /// From when on it is refused.
    pub expires: SystemTime,
    /// How often it may be used in all.
    pub uses: u32,
    /// How often it was used.
    pub used: u32,
    pub(super) secret: SecretHash,
}

/// A machine that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedRegistrant {
    /// What it may do.
    pub scope: Scope,
    /// What it called itself.
    pub host: String,
    /// With which token it joined.
    pub token: TokenId,
    /// When.
    pub joined: SystemTime,
    /// When its last certificate ends.
    pub expires: SystemTime,
    /// When it was revoked.
    pub revoked: Option<SystemTime>,
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// No such token, or another secret.
    #[error("the token is unknown: it was mistyped, revoked, or is of another server")]
    Unknown,
    /// Too old.
    #[error("the token has expired: create another")]
    Expired,
    /// No uses are left.
    #[error("the token was used already: create another")]
    Used,
}

/// No more can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many tokens.
    #[error("there are {MAX_TOKENS} tokens, and no more can be: revoke some")]
    Tokens,
    /// Too many registrants.
    #[error("there are {MAX_REGISTRANTS} registrants, and no more can be")]
    Registrants,
    /// Too many tokens of a namespace.
    #[error("there are {MAX_TOKENS_PER_NAMESPACE} tokens of the namespace, and no more can be: revoke some")]
    TokensOfNamespace,
    /// Too many registrants of a namespace.
    #[error("there are {MAX_REGISTRANTS_PER_NAMESPACE} registrants of the namespace, and no more can be")]
    RegistrantsOfNamespace,
}

impl Token {
    /// Whether a machine with this secret may use it now. Whoever does not know the secret learns nothing of the token.
    pub(super) fn check(&self, secret: &[u8], now: SystemTime) -> Result<(), TokenRefused> {
        if !is_secret(secret, &self.secret) {
            return Err(TokenRefused::Unknown);
        }
        self.is_usable(now)
    }

    /// Whether a machine that knows the secret may use it now.
    pub(super) fn is_usable(&self, now: SystemTime) -> Result<(), TokenRefused> {
        if now >= self.expires {
            return Err(TokenRefused::Expired);
        }
        if self.used >= self.uses {
            return Err(TokenRefused::Used);
        }
        Ok(())
    }

    /// The same with one use more.
    pub(super) fn used_once(&self) -> Self {
        Self { used: self.used + 1, ..self.clone() }
    }
}

fn is_secret(secret: &[u8], expected: &SecretHash) -> bool {
    hash(secret).ct_eq(expected).into()
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct JoiningState {
    pub(super) tokens: BTreeMap<TokenId, Token>,
    /// By user name. Changed by the functions below, which count.
    pub(super) registrants: HashMap<String, JoinedRegistrant>,
    /// Registrants that are not revoked.
    active: usize,
}

impl JoiningState {
    /// Forgets what has no meaning any more.
    pub(super) fn purge(&mut self, now: SystemTime) {
        for id in self.forgettable_tokens(now).collect::<Vec<_>>() {
            self.remove_token(id);
        }
        for user in self.forgettable_registrants(now).map(ToOwned::to_owned).collect::<Vec<_>>() {
            self.remove_registrant(&user);
        }
    }

    /// Tokens that have no meaning any more.
    pub(super) fn forgettable_tokens(&self, now: SystemTime) -> impl Iterator<Item = TokenId> {
        let past = self.tokens.iter().filter(move |(_, token)| now >= token.expires + EXPIRED_TOKEN_MEMORY);
        past.map(|(id, _)| *id)
    }

    /// Registrants that have no meaning any more.
    pub(super) fn forgettable_registrants(&self, now: SystemTime) -> impl Iterator<Item = &str> {
        // One that was revoked is to be known as long as its certificate could be used, or renewed.
        let memory = |one: &JoinedRegistrant| if one.revoked.is_some() { RENEWAL_GRACE } else { REGISTRANT_MEMORY };
        let past = self.registrants.iter().filter(move |(_, one)| now >= one.expires + memory(one));
        past.map(|(user, _)| user.as_str())
    }

    /// Registrants that are not revoked.
    pub(super) const fn active(&self) -> usize {
        self.active
    }

    /// Whether a token of this scope can be added.
    pub(super) fn room_for_token(&self, scope: &Scope) -> Result<(), Full> {
        if self.tokens.len() >= MAX_TOKENS {
            return Err(Full::Tokens);
        }
        let of_namespace =
            |namespace| self.tokens.values().filter(|one| one.scope.namespace() == Some(namespace)).count();
        let is_full = scope.namespace().is_some_and(|namespace| of_namespace(namespace) >= MAX_TOKENS_PER_NAMESPACE);
        if is_full { Err(Full::TokensOfNamespace) } else { Ok(()) }
    }

    /// Whether a registrant of this name, who may be known already, can be added with this scope.
    pub(super) fn room_for_registrant(&self, user: &str, scope: &Scope) -> Result<(), Full> {
        if self.registrants.contains_key(user) {
            return Ok(());
        }
        if self.registrants.len() >= MAX_REGISTRANTS {
            return Err(Full::Registrants);
        }
        let of = |namespace| self.registrants.values().filter(|one| one.scope.namespace() == Some(namespace)).count();
        let is_full = scope.namespace().is_some_and(|namespace| of(namespace) >= MAX_REGISTRANTS_PER_NAMESPACE);
        if is_full { Err(Full::RegistrantsOfNamespace) } else { Ok(()) }
    }

    /// Adds or replaces a token.
    pub(super) fn put_token(&mut self, id: TokenId, token: Token) {
        self.tokens.insert(id, token);
    }

    /// Removes a token. Returns whether there was one.
    pub(super) fn remove_token(&mut self, id: TokenId) -> bool {
        self.tokens.remove(&id).is_some()
    }

    /// The token with this secret, if it may be used now.
    pub(super) fn check_token(&self, id: TokenId, secret: &[u8], now: SystemTime) -> Result<&Token, TokenRefused> {
        let Some(token) = self.tokens.get(&id) else {
            // Compared for an unknown token, too, so that the time of the answer does not tell it from a known one.
            is_secret(secret, &hash(Secret::generate().expose()));
            return Err(TokenRefused::Unknown);
        };
        token.check(secret, now).map(|()| token)
    }

    /// Adds or replaces a registrant.
    pub(super) fn put_registrant(&mut self, user: String, registrant: JoinedRegistrant) {
        let is_active = |one: &JoinedRegistrant| usize::from(one.revoked.is_none());
        self.active += is_active(&registrant);
        self.active -= self.registrants.insert(user, registrant).as_ref().map_or(0, is_active);
    }

    /// Removes a registrant. Returns whether there was one.
    pub(super) fn remove_registrant(&mut self, user: &str) -> bool {
        let removed = self.registrants.remove(user);
        self.active -= usize::from(removed.as_ref().is_some_and(|one| one.revoked.is_none()));
        removed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::joining::ScopeSpec;

    const TTL: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn scope() -> Scope {
        Scope::parse(&ScopeSpec { namespace: "shop".into(), ..ScopeSpec::default() }).expect("valid")
    }

    fn token(secret: &Secret) -> Token {
        let (created, expires) = (now(), now() + TTL);
        let secret = hash(secret.expose());
        Token { scope: scope(), created_by: "ada".into(), created, expires, uses: 1, used: 0, secret }
    }

    fn registrant(token: TokenId) -> JoinedRegistrant {
        let expires = now() + 24 * TTL;
        JoinedRegistrant { scope: scope(), host: "vm".into(), token, joined: now(), expires, revoked: None }
    }

    #[test]
    fn token_is_good_for_its_secret_its_time_and_its_uses() {
        let (mut state, id, secret) = (JoiningState::default(), TokenId::generate(), Secret::generate());
        state.put_token(id, token(&secret));
        let check = |state: &JoiningState, secret: &[u8], at| state.check_token(id, secret, at).map(drop);
        assert_eq!(check(&state, secret.expose(), now()), Ok(()));
        assert_eq!(check(&state, secret.expose(), now() + TTL), Err(TokenRefused::Expired));
        for wrong in [&[][..], &[0; 32], Secret::generate().expose(), &secret.expose()[1..]] {
            assert_eq!(check(&state, wrong, now()), Err(TokenRefused::Unknown));
            assert_eq!(check(&state, wrong, now() + TTL), Err(TokenRefused::Unknown), "it tells nothing");
        }
        assert_eq!(state.check_token(TokenId::generate(), secret.expose(), now()), Err(TokenRefused::Unknown));
        state.put_token(id, token(&secret).used_once());
        assert_eq!(check(&state, secret.expose(), now()), Err(TokenRefused::Used));
    }

    #[test]
    fn numbers_are_bounded_and_the_past_is_forgotten() {
        let (mut state, secret) = (JoiningState::default(), Secret::generate());
        let of = |namespace: String| Scope::parse(&ScopeSpec { namespace, ..ScopeSpec::default() }).expect("valid");
        for number in 0..MAX_TOKENS {
            let scope = of(format!("n{}", number / MAX_TOKENS_PER_NAMESPACE));
            state.room_for_token(&scope).expect("there is room");
            state.put_token(TokenId::generate(), Token { scope, ..token(&secret) });
            if number == MAX_TOKENS_PER_NAMESPACE - 1 {
                assert_eq!(state.room_for_token(&of("n0".into())), Err(Full::TokensOfNamespace));
            }
        }
        assert_eq!(state.room_for_token(&of(String::new())), Err(Full::Tokens));
        for number in 0..MAX_REGISTRANTS {
            let scope = of(format!("n{}", number / MAX_REGISTRANTS_PER_NAMESPACE));
            if number % MAX_REGISTRANTS_PER_NAMESPACE == 0 {
                state.room_for_registrant(&number.to_string(), &scope).expect("there is room");
            }
            state.put_registrant(number.to_string(), JoinedRegistrant { scope, ..registrant(TokenId::generate()) });
            if number == MAX_REGISTRANTS_PER_NAMESPACE - 1 {
                assert_eq!(state.room_for_registrant("one more", &of("n0".into())), Err(Full::RegistrantsOfNamespace));
            }
        }
        assert_eq!(state.room_for_registrant("one more", &of("n9".into())), Err(Full::Registrants));
        assert_eq!(state.room_for_registrant("7", &of("n0".into())), Ok(()), "it is known");
        let revoked = JoinedRegistrant { revoked: Some(now()), ..registrant(TokenId::generate()) };
        for (registrant, active) in [(revoked, MAX_REGISTRANTS - 1), (registrant(TokenId::generate()), MAX_REGISTRANTS)]
        {
            state.put_registrant("7".into(), registrant);
            assert_eq!(state.active(), active);
        }
        state.purge(now() + TTL);
        assert_eq!((state.tokens.len(), state.registrants.len()), (MAX_TOKENS, MAX_REGISTRANTS));
        state.purge(now() + TTL + EXPIRED_TOKEN_MEMORY);
        assert_eq!((state.tokens.len(), state.registrants.len()), (0, MAX_REGISTRANTS));
        state.purge(now() + 24 * TTL + REGISTRANT_MEMORY);
        assert_eq!((state.registrants.len(), state.active()), (0, 0));
    }
}
