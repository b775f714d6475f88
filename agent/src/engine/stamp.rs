//! RFC 3339 stamps as engines write them, read without a calendar library.

use berth_proto::ids::Wall;

/// Nanoseconds since 1970 of `2026-11-23T19:13:00.123456789Z` or with an offset; `None` when it is
/// no such stamp. Go's zero time (`0001-01-01T00:00:00Z`), which means "never", is `None`, too.
#[must_use]
pub fn nanoseconds(text: &str) -> Option<i128> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = bytes.get(from..to)?;
        part.iter().try_fold(0_i64, |n, b| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0')))
    };
    let is = |at: usize, b: u8| bytes.get(at) == Some(&b);
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let separators = is(4, b'-') && is(7, b'-') && is(13, b':') && is(16, b':');
    if !separators || !(is(10, b'T') || is(10, b't') || is(10, b' ')) || year < 1970 {
        return None;
    }
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let mut at = 19;
    let mut nanos = 0_i64;
    if is(at, b'.') {
        at += 1;
        let mut unit = 100_000_000_i64;
        while let Some(b) = bytes.get(at).filter(|b| b.is_ascii_digit()) {
            nanos += i64::from(b - b'0') * unit;
            unit /= 10;
            at += 1;
        }
    }
    let offset_s = match bytes.get(at)? {
        b'Z' | b'z' if at + 1 == bytes.len() => 0,
        sign @ (b'+' | b'-') if is(at + 3, b':') && at + 6 == bytes.len() => {
            let seconds = number(at + 1, at + 3)? * 3600 + number(at + 4, at + 6)? * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some(i128::from(seconds - offset_s) * 1_000_000_000 + i128::from(nanos))
}

/// The same in milliseconds.
#[must_use]
pub fn wall(text: &str) -> Option<Wall> {
    i64::try_from(nanoseconds(text)? / 1_000_000).ok().map(Wall)
}

/// Days from 1970-01-01 in the Gregorian calendar. Years are counted from March, so that the leap
/// day is a year's last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (century, of_century) = (year / 100, year % 100);
    // 146,097 days in 400 years, 1,461 in 4; (153 m + 2) / 5 days before the m-th month from March;
    // 719,469 days from 0000-03-01, this count's zero, to 1970-01-01, less one for `day` from 1.
    century * 146_097 / 4 + of_century * 1461 / 4 + (153 * month + 2) / 5 + day - 719_469
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_engines_write_and_nothing_else() {
        let table: [(&str, Option<i128>); 12] = [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("1970-01-01T00:00:00.000000001Z", Some(1)),
            ("2000-02-29T12:00:00Z", Some(951_825_600_000_000_000)),
            ("2026-11-23T19:13:00.5Z", Some(1_795_461_180_500_000_000)),
            ("2026-11-23T20:13:00.5+01:00", Some(1_795_461_180_500_000_000)),
            ("2026-11-23T14:13:00.5-05:00", Some(1_795_461_180_500_000_000)),
            ("0001-01-01T00:00:00Z", None),
            ("2026-11-23T19:13:00", None),
            ("2026-13-23T19:13:00Z", None),
            ("2026-11-23T19:13:00ZZ", None),
            ("", None),
            ("2026-11-23T19:13:00+0100", None),
        ];
        for (text, want) in table {
            assert_eq!(nanoseconds(text), want, "{text}");
        }
    }
}
