//! Parses sizes.

/// Parses a number of bytes, or of the units K, M, G and T, each 1024 times the one before.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        Some(b't' | b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: Option<u64> = digits.parse().ok().filter(|_| is_number);
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "expected a size, such as 512M or 8G".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_may_have_a_unit() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64k"), Ok(65_536));
        assert_eq!(size("3G"), Ok(3 << 30));
        assert_eq!(size("1T"), Ok(1 << 40));
        for bad in ["", "M", "+1M", "-1", "1.5G", "1 G", "1GB", "99999999T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
