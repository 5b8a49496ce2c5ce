//! An error and its causes: how they are walked, and how they are printed.
//!
//! The invariant: each error of a chain appears once, the outermost first.

use std::error::Error;

/// Returns an error and its causes, the outermost first.
pub fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Formats an error and its causes in one line.
#[must_use]
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let texts: Vec<_> = causes(error).map(ToString::to_string).collect();
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("opening {0}")]
    struct Opening(&'static str, #[source] io::Error);

    #[test]
    fn one_line_has_error_and_causes_in_order() {
        let cause = io::Error::other("the disk is gone");
        assert_eq!(
            one_line(&Opening("x", cause)),
            "opening x: the disk is gone"
        );
        assert_eq!(one_line(&io::Error::other("alone")), "alone");
    }
}
