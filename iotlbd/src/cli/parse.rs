//! Values of flags: sizes, modes, descriptors, log filters.

use std::os::fd::RawFd;
use std::str::FromStr;

use tracing_subscriber::filter::LevelFilter;

use crate::server::config::{TABLE_SIZE_MAX, TABLE_SIZE_MIN};

/// A size in bytes, with an optional suffix K, M or G (powers of 1024).
///
/// # Errors
/// Not a number, or out of the range a table can have.
pub fn size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let (digits, shift) = match trimmed.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&trimmed[..at], 10),
        Some((at, 'm' | 'M')) => (&trimmed[..at], 20),
        Some((at, 'g' | 'G')) => (&trimmed[..at], 30),
        _ => (trimmed, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is not a size; write bytes, or 512K, 16M, 1G"))?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` does not fit 64 bits"))?;
    if !(TABLE_SIZE_MIN..=TABLE_SIZE_MAX).contains(&bytes) {
        return Err(format!("`{text}` is out of range; use {}K to {}G", TABLE_SIZE_MIN >> 10, TABLE_SIZE_MAX >> 30));
    }
    Ok(bytes)
}

/// Permission bits in octal, 0 to 777.
///
/// # Errors
/// Not octal, or more than permissions.
pub fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("`{text}` is not a permission mode; write octal, like 0660")),
    }
}

/// A descriptor number that can be inherited: not one of the three standard ones.
///
/// # Errors
/// Not a number from 3 up.
pub fn descriptor(text: &str) -> Result<RawFd, String> {
    match text.parse::<RawFd>() {
        Ok(fd) if fd > 2 => Ok(fd),
        _ => Err(format!("`{text}` is not a descriptor number that can be inherited; use 3 or above")),
    }
}

/// A log filter.
///
/// # Errors
/// Not understood.
pub fn log_filter(text: &str) -> Result<String, String> {
    let help = "write error, warn, info, debug or trace, or a filter like `iotlbd::server=debug`";
    // A word that is no level would be taken for the name of a module, of which there is none: nothing would be logged.
    for word in text.split(',').map(str::trim) {
        let plain = !word.contains(['=', '[', ':']) && !word.starts_with("iotlb");
        if word.is_empty() || (plain && LevelFilter::from_str(word).is_err()) {
            return Err(format!("`{word}` is no level; {help}"));
        }
    }
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; {help}")),
    }
}

#[cfg(test)]
mod tests {
    use iotlb_proto::table::{TableConfig, TableWriter};

    use super::*;

    #[test]
    fn sizes_with_and_without_suffix() {
        assert_eq!(size("2097152"), Ok(2 << 20));
        assert_eq!(size("512K"), Ok(512 << 10));
        assert_eq!(size("16m"), Ok(16 << 20));
        assert_eq!(size("1G"), Ok(1 << 30));
    }

    #[test]
    fn the_smallest_size_that_is_taken_makes_a_table() {
        let table = |size| TableWriter::create(&TableConfig { size, generation: 1 });
        assert_eq!(size(&TABLE_SIZE_MIN.to_string()), Ok(TABLE_SIZE_MIN));
        assert!(table(TABLE_SIZE_MIN).is_ok());
        let below = TABLE_SIZE_MIN - 1;
        let error = size(&below.to_string()).expect_err("too small");
        assert!(table(below).is_err());
        // What the message names is taken.
        let least = error.split_whitespace().find(|word| word.ends_with('K')).expect("a size");
        assert!(size(least).is_ok_and(|size| table(size).is_ok()), "{error}");
    }

    #[test]
    fn sizes_that_are_none() {
        for bad in ["", "K", "16MB", "-1M", "0", "1.5G", "99999999999999999999", "17179869184G", "1T", "16µ"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn modes() {
        assert_eq!(mode("0660"), Ok(0o660));
        assert_eq!(mode("777"), Ok(0o777));
        for bad in ["", "8", "1000", "-1", "rw"] {
            assert!(mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors() {
        assert_eq!(descriptor("3"), Ok(3));
        for bad in ["2", "-1", "x", ""] {
            assert!(descriptor(bad).is_err(), "{bad}");
        }
    }
}
