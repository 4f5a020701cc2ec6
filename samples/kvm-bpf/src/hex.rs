// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Bytes as text of two hexadecimal digits each; with serde, `#[serde(with = "hex")]`.

use std::fmt::Write;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

/// Writes bytes.
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // It never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads bytes; none where the text is something else.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let pair = |[high, low]: &[u8; 2]| Some((digit(*high)? << 4 | digit(*low)?) as u8);
    pairs.iter().map(pair).collect()
}

/// Writes a field.
pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(bytes))
}

/// Reads a field.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    decode(&text).ok_or_else(|| D::Error::custom("no pairs of hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use crate::hex;

    #[derive(Debug, serde::Deserialize, PartialEq, Serialize)]
    struct Bytes(#[serde(with = "hex")] Vec<u8>);

    #[test]
    fn bytes_are_two_digits_each() {
        let bytes = Bytes(vec![0, 0x1f, 0xff]);
        let text = serde_json::to_string(&bytes).unwrap();
        assert_eq!(text, "\"001fff\"");
        assert_eq!(serde_json::from_str::<Bytes>(&text).unwrap(), bytes);
        assert_eq!(hex::decode("aBC0"), Some(vec![0xab, 0xc0]));
        for bad in ["\"0\"", "\"0g\"", "\"+1\"", "\"\u{e9}\"", "0"] {
            assert!(serde_json::from_str::<Bytes>(bad).is_err(), "{bad}");
        }
    }
}
