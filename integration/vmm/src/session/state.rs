//! The device's state, out of one back end and into another, through a pipe.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::{Session, SessionError};
use crate::connection::message::DeviceState;
use crate::event::wait_readable;

impl Session {
    /// Takes the device's state out of the back end. Stop the rings first.
    ///
    /// # Errors
    /// [`SessionError::Connection`] if the back end refuses or says that it went wrong;
    /// [`SessionError::State`] if the pipe fails or nothing comes for `timeout`.
    pub fn save_state(&mut self, timeout: Duration) -> Result<Vec<u8>, SessionError> {
        let (ours, theirs) = io::pipe().map_err(SessionError::State)?;
        let instead = self
            .connection
            .set_device_state_fd(DeviceState::SAVE, theirs.as_fd())?;
        // Or the end of the state would never be seen.
        drop(theirs);
        let mut from = File::from(instead.unwrap_or_else(|| OwnedFd::from(ours)));
        let mut state = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        loop {
            if !wait_readable(from.as_fd(), timeout).map_err(SessionError::State)? {
                return Err(SessionError::State(io::ErrorKind::TimedOut.into()));
            }
            let read = from.read(&mut chunk).map_err(SessionError::State)?;
            match chunk.get(..read) {
                Some([]) | None => break,
                Some(bytes) => state.extend_from_slice(bytes),
            }
        }
        self.connection.check_device_state()?;
        Ok(state)
    }

    /// Puts a device's state into the back end. Do it before the rings start.
    ///
    /// # Errors
    /// [`SessionError::Connection`] if the back end refuses or says that it went wrong;
    /// [`SessionError::State`] if the pipe fails. A back end that hangs up early is asked for
    /// its verdict all the same.
    pub fn load_state(&mut self, state: &[u8]) -> Result<(), SessionError> {
        let (theirs, ours) = io::pipe().map_err(SessionError::State)?;
        let instead = self
            .connection
            .set_device_state_fd(DeviceState::LOAD, theirs.as_fd())?;
        drop(theirs);
        let mut to = File::from(instead.unwrap_or_else(|| OwnedFd::from(ours)));
        match to.write_all(state) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(SessionError::State(error));
            }
            _ => drop(to),
        }
        Ok(self.connection.check_device_state()?)
    }
}
