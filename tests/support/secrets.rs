//! Every token, secret and key that the tests use, so that all of them are looked for in whatever gangplank says.

use std::sync::{Mutex, PoisonError};

/// In each form in which one could be told.
static KNOWN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Fewer characters may be anywhere.
const MIN_LENGTH: usize = 16;

/// Remembers a token, or the key in a PEM text, of which each line counts.
pub(crate) fn remember(secret: &str) {
    let lines = secret.lines().map(str::trim).filter(|line| line.len() >= MIN_LENGTH && !line.starts_with("-----"));
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    for line in lines {
        if !known.iter().any(|one| one == line) {
            known.push(line.to_owned());
        }
    }
}

/// Remembers bytes, as they are written in Debug output, in hexadecimal digits and in base64.
pub(crate) fn remember_bytes(secret: &[u8]) {
    use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
    let listed = format!("{secret:?}");
    remember(listed.trim_matches(['[', ']']));
    remember(&secret.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    let base64 = STANDARD_NO_PAD.encode(secret);
    remember(&base64);
    remember(&base64.replace('+', "-").replace('/', "_"));
}

/// How many forms are known.
pub(crate) fn count() -> usize {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).len()
}

/// Fails if any of them is in `text`, and does not print it.
pub(crate) fn assert_none_in(what: &str, text: &str) {
    assert!(!text.contains("PRIVATE KEY"), "a private key is in {what}");
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let found = known.iter().filter(|secret| text.contains(secret.as_str())).count();
    assert_eq!(found, 0, "secrets in {what}");
}

#[test]
fn secret_is_found_in_each_form() {
    let secret: Vec<u8> = (0..32).map(|_| fastrand::u8(..)).collect();
    remember_bytes(&secret);
    let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &secret);
    for text in [format!("secret: {secret:?}"), base64] {
        assert!(std::panic::catch_unwind(|| assert_none_in("a text", &text)).is_err());
    }
    assert_none_in("a text", "nothing of the kind");
    assert!(count() >= 4, "each form is one");
}
