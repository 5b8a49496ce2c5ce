//! Errors with their sources, for the programs that are built on this crate.

use std::error::Error;
use std::fmt;

/// Displays an error and each of its sources, separated by colons.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(source) = cause {
            write!(f, ": {source}")?;
            cause = source.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryError;
    use crate::session::SessionError;

    #[test]
    fn chain_has_each_source_once() {
        let error = SessionError::Memory(MemoryError::Exhausted { len: 5 });
        let chain = Chain(&error).to_string();
        assert_eq!(chain, "no guest memory: guest memory has no 5 bytes left");
    }
}
