//! What this host's kernel can do.

/// The first kernel whose TAP takes UDP segmentation (`TUN_F_USO4`, `TUN_F_USO6`).
const USO_SINCE: (u32, u32) = (6, 2);

/// Whether a TAP of this host passes UDP segments on. Workers share the daemon's kernel, in containers too.
pub(super) fn passes_uso() -> bool {
    // An Err cannot be where the call exists; a kernel of which nothing is known is taken for an old one.
    nix::sys::utsname::uname()
        .is_ok_and(|name| name.release().to_str().and_then(version).is_some_and(|version| version >= USO_SINCE))
}

/// The first two numbers of a release such as `6.12.9-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(version("6.12.9-amd64"), Some((6, 12)));
        assert_eq!(version("5.10.0"), Some((5, 10)));
        assert_eq!(version("7.0-rc1"), Some((7, 0)));
        assert!(version("6.12.9").is_some_and(|v| v >= USO_SINCE) && version("6.1.200").is_some_and(|v| v < USO_SINCE));
        for odd in ["", "6", "x.y", "6.", "99999999999.1"] {
            assert_eq!(version(odd), None, "{odd:?}");
        }
    }
}
