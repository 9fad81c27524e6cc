//! Numbers, sizes and times, as the page and the warnings word them.

/// A number with commas: 1,234,567.
pub fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of things: 1 key, 1,234 keys.
pub fn count(n: u64, thing: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{} {thing}{plural}", number(n))
}

/// Bytes with a unit and three digits: 512 B, 1.50 KiB, 68.5 GiB.
pub fn bytes(n: f64) -> String {
    let (mut n, mut unit) = (n, 0);
    while n >= 999.5 && unit < 5 {
        (n, unit) = (n / 1024.0, unit + 1);
    }
    let unit = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit];
    if unit == "B" { format!("{n:.0} B") } else { format!("{} {unit}", three_digits(n)) }
}

/// A rate: 0, 0.25, 12.4, 1,250.
pub fn rate(n: f64) -> String {
    match n {
        0.0 => "0".into(),
        n if n >= 999.5 => number(n.round() as u64),
        n => three_digits(n),
    }
}

fn three_digits(n: f64) -> String {
    match n {
        n if n < 9.995 => format!("{n:.2}"),
        n if n < 99.95 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

/// A latency: 0.42 ms, 12.3 ms, 1.50 s.
pub fn latency(seconds: f64) -> String {
    if seconds < 0.9995 { format!("{} ms", three_digits(seconds * 1000.0)) } else { duration_in_s(seconds) }
}

fn duration_in_s(seconds: f64) -> String {
    format!("{} s", three_digits(seconds))
}

/// A duration in its two largest units: 5 s, 3 min 20 s, 2 d 4 h.
pub fn duration(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let first = units.iter().position(|(length, _)| seconds >= *length).unwrap_or(3);
    let (length, unit) = units[first];
    let text = format!("{} {unit}", seconds / length);
    match units.get(first + 1) {
        Some((smaller, name)) if seconds % length / smaller > 0 => {
            format!("{text} {} {name}", seconds % length / smaller)
        }
        _ => text,
    }
}

/// How long ago this was, in seconds since 1970.
pub fn ago(time: u64, now: u64) -> String {
    format!("{} ago", duration(now.saturating_sub(time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sizes_and_times_are_short() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(number), ["0", "999", "1,000", "1,234,567"]);
        let sizes = [0.0, 999.0, 1000.0, 1536.0, 68.54 * 1073741824.0, 252e12];
        assert_eq!(sizes.map(bytes), ["0 B", "999 B", "0.98 KiB", "1.50 KiB", "68.5 GiB", "229 TiB"]);
        assert_eq!([0.0, 0.2, 12.44, 999.9, 1250.0].map(rate), ["0", "0.20", "12.4", "1,000", "1,250"]);
        assert_eq!([0.00042, 0.0123, 1.5].map(latency), ["0.42 ms", "12.3 ms", "1.50 s"]);
        assert_eq!([0, 5, 60, 200, 93_600].map(duration), ["0 s", "5 s", "1 min", "3 min 20 s", "1 d 2 h"]);
    }
}
