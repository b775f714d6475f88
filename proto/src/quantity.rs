//! Quantities as people write them: `500m`, `256MiB`, `1h30m`.
//!
//! What is printed reads back as the same number.

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidQuantity {
    /// Not a number of processors.
    #[error("\"{0}\" is not an amount of processors; write e.g. 500m (half a processor), 2 or 1.5")]
    Cpu(String),
    /// Not a number of bytes.
    #[error("\"{0}\" is not an amount of bytes; write e.g. 256MiB, 1GiB or 500MB")]
    Bytes(String),
    /// Not a duration.
    #[error("\"{0}\" is not a duration; write e.g. 500ms, 30s, 5m or 1h30m")]
    Duration(String),
}

/// Thousandths of a processor: `500m`, `2`, `1.5`.
///
/// # Errors
/// When the text is something else or too large.
pub fn parse_cpu(text: &str) -> Result<u64, InvalidQuantity> {
    let wrong = || InvalidQuantity::Cpu(text.to_owned());
    if let Some(millis) = text.strip_suffix('m') {
        return digits(millis).ok_or_else(wrong);
    }
    decimal(text, 3).ok_or_else(wrong)
}

/// What [`parse_cpu`] reads back.
#[must_use]
pub fn format_cpu(millis: u64) -> String {
    if millis.is_multiple_of(1000) { (millis / 1000).to_string() } else { format!("{millis}m") }
}

const UNITS: [(&str, u64); 12] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Bytes: `256MiB`, `1.5GiB`, `500MB`, `1048576`.
///
/// # Errors
/// When the text is something else or too large.
pub fn parse_bytes(text: &str) -> Result<u64, InvalidQuantity> {
    let wrong = || InvalidQuantity::Bytes(text.to_owned());
    for (unit, size) in UNITS {
        if let Some(number) = text.strip_suffix(unit) {
            let millis = decimal(number.trim_end(), 3).ok_or_else(wrong)?;
            let bytes = u128::from(millis) * u128::from(size) / 1000;
            return u64::try_from(bytes).map_err(|_| wrong());
        }
    }
    digits(text.strip_suffix('B').unwrap_or(text)).ok_or_else(wrong)
}

/// What [`parse_bytes`] reads back as the same number.
#[must_use]
pub fn format_bytes(bytes: u64) -> String {
    for (unit, size) in [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)]
    {
        if bytes > 0 && bytes.is_multiple_of(size) {
            return format!("{}{unit}", bytes / size);
        }
    }
    bytes.to_string()
}

/// Bytes for people, rounded: `6.2 MiB`.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    for (unit, size) in [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)]
    {
        if bytes >= size {
            return format!("{:.1} {unit}", bytes as f64 / size as f64);
        }
    }
    format!("{bytes} B")
}

/// Milliseconds: `100ms`, `30s`, `5m`, `1h30m`, `2d`, `0`.
///
/// # Errors
/// When the text is something else or too large.
pub fn parse_duration_ms(text: &str) -> Result<u64, InvalidQuantity> {
    let wrong = || InvalidQuantity::Duration(text.to_owned());
    if text == "0" {
        return Ok(0);
    }
    let mut rest = text;
    let mut total: u64 = 0;
    let mut last = u64::MAX;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(end);
        let end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let size: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        // Largest unit first, each once: `1h30m`, never `30m1h`.
        if size >= last {
            return Err(wrong());
        }
        last = size;
        let thousandths = decimal(number, 3).ok_or_else(wrong)?;
        let ms = u128::from(thousandths) * u128::from(size) / 1000;
        total = u64::try_from(ms).ok().and_then(|ms| total.checked_add(ms)).ok_or_else(wrong)?;
        rest = tail;
    }
    if last == u64::MAX { Err(wrong()) } else { Ok(total) }
}

/// What [`parse_duration_ms`] reads back.
#[must_use]
pub fn format_duration_ms(ms: u64) -> String {
    if ms == 0 {
        return "0".to_owned();
    }
    let mut rest = ms;
    let mut text = String::new();
    for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)]
    {
        if rest >= size {
            text.push_str(&format!("{}{unit}", rest / size));
            rest %= size;
        }
    }
    text
}

fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// A decimal number times 10^places.
fn decimal(text: &str, places: u32) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let scale = 10_u64.pow(places);
    let whole = digits(whole)?.checked_mul(scale)?;
    let length = u32::try_from(fraction.len()).ok()?;
    if length > places {
        return None;
    }
    whole.checked_add(digits(fraction)? * 10_u64.pow(places - length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn people_s_quantities_are_read() {
        assert_eq!(parse_cpu("500m"), Ok(500));
        assert_eq!(parse_cpu("1.5"), Ok(1500));
        assert_eq!(parse_bytes("256MiB"), Ok(256 << 20));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("500MB"), Ok(500_000_000));
        assert_eq!(parse_bytes("64KB"), parse_bytes("64kB"));
        assert_eq!(parse_duration_ms("1h30m"), Ok(5_400_000));
        assert_eq!(parse_duration_ms("0"), Ok(0));
        assert_eq!(parse_duration_ms("1.5s"), Ok(1500));
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for bad in ["", "m", "1,5", "-1", "1.2345", "five"] {
            assert!(parse_cpu(bad).is_err(), "{bad}");
        }
        for bad in ["", "MiB", "1 XiB", "-1", "99999999999TiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        for bad in ["", "5", "s", "1m1h", "1s1s", "5 minutes", "99999999999999999d"] {
            assert!(parse_duration_ms(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(n in any::<u64>()) {
            prop_assert_eq!(parse_bytes(&format_bytes(n)), Ok(n));
            prop_assert_eq!(parse_duration_ms(&format_duration_ms(n)), Ok(n));
            let cpu = n % 1_000_000_000;
            prop_assert_eq!(parse_cpu(&format_cpu(cpu)), Ok(cpu));
        }
    }
}
