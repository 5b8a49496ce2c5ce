//! Switching to another program in the same process, while the guest's session is kept.
//!
//! The new program is tried first. Then the serving process returns all requests and ends, and the
//! new program runs in this process and makes a serving process of its own. If that one doesn't get
//! as far as serving, the old program is run again in the same way.
//!
//! The invariant: until the new program serves, the old one's file is open, and the program that
//! runs in this process returns to it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::{DRAIN_TIMEOUT, LEFT, Resources, Supervision};
use crate::error_chain;
use crate::recovery::RecoveryError;
use crate::recovery::exec;
use crate::recovery::exec_handover::{Outgoing, VARIABLE};
use crate::recovery::supervisor::Event;
use crate::recovery::upgrade::{UpgradeRequest, arguments, environment};
use crate::recovery::upgrade_attempt::{NOT_UPGRADED, START_TIMEOUT, UpgradeAttempt, send_line};
use crate::sandbox::{self, Ending};

impl<R: Resources> Supervision<R> {
    /// Carries out a request. Returns only if that fails, possibly after the serving process has
    /// ended; with an ending if it is the server's.
    pub(super) fn upgrade(
        &mut self,
        request: UpgradeRequest,
    ) -> Result<Option<Ending>, RecoveryError> {
        if let Err(reason) = self.try_program(&request) {
            log::error!("{NOT_UPGRADED}{reason}");
            send_line(request.client.as_ref(), &format!("{NOT_UPGRADED}{reason}"));
            return Ok(None);
        }
        let since = sandbox::now();
        let ending = self.end_serving_process().map_err(RecoveryError::Watch)?;
        if !matches!(ending, Ending::Status(LEFT) | Ending::Signal(_)) {
            return Ok(Some(ending));
        }
        if self.supervisor.is_to_stop().map_err(RecoveryError::Watch)? {
            return Ok(Some(Ending::Status(0)));
        }
        self.is_down(since);
        let mut attempt = UpgradeAttempt {
            since,
            old: exec::own_program().ok(),
            client: request.client,
            failed: None,
        };
        let reason = match request.program.take() {
            Ok(program) => self.become_program(&program, &attempt),
            Err(error) => error_chain::one_line(&error),
        };
        attempt.old = None;
        attempt.failed = Some(reason);
        self.attempt = Some(attempt);
        Ok(None)
    }

    /// Whether the new program can take over. Changes nothing.
    fn try_program(&self, request: &UpgradeRequest) -> Result<(), String> {
        if self.supervisor.sandbox_refs().is_none() {
            return Err("this server doesn't serve yet".to_owned());
        }
        request.try_program()
    }

    /// Makes the serving process return all requests and end.
    fn end_serving_process(&mut self) -> std::io::Result<Ending> {
        self.supervisor.drain()?;
        loop {
            match self.supervisor.next_within(DRAIN_TIMEOUT)? {
                Some(Event::Ended(ending)) => return Ok(ending),
                Some(_) => {}
                None => {
                    log::warn!("some requests are still in flight: they will be replayed");
                    self.supervisor.kill()?;
                }
            }
        }
    }

    /// Returns to the old program, as the new one doesn't serve. Returns only if there is none, or
    /// it can't be run.
    pub(super) fn fall_back(&mut self, reason: &str) -> std::io::Result<()> {
        if self.supervisor.has_child() {
            self.supervisor.kill()?;
            while self.supervisor.has_child() {
                self.supervisor.next_within(START_TIMEOUT)?;
            }
        }
        let Some(attempt) = &mut self.attempt else {
            return Ok(());
        };
        let Some(old) = attempt.old.take() else {
            return Ok(());
        };
        attempt.failed = Some(reason.to_owned());
        log::error!("{reason}: returning to the previous program");
        let attempt = self.attempt.take();
        if let Some(attempt) = attempt {
            let error = match old.take() {
                Ok(program) => self.become_program(&program, &attempt),
                Err(error) => error_chain::one_line(&error),
            };
            log::error!("the previous program can't be run either: {error}");
        }
        Ok(())
    }

    /// Runs `program` in this process. Returns only if that fails: the reason.
    fn become_program(&self, program: &OwnedFd, attempt: &UpgradeAttempt) -> String {
        let Some(state) = self.resources.state() else {
            return "the session's state table has no file".to_owned();
        };
        let outgoing = Outgoing {
            supervisor: &self.supervisor,
            listener: self.resources.listener(),
            state,
            control: self.resources.control(),
            user: self.resources.user(),
            metrics: self.resources.metrics(),
            metrics_socket: self.resources.metrics_socket(),
            pid_file: self.resources.pid_file(),
            attempt,
        };
        let list = match outgoing.write() {
            Ok(list) => list,
            Err(error) => return format!("writing the list of open descriptors: {error}"),
        };
        let number = list.as_raw_fd().to_string();
        let (arguments, environment) = (arguments(), environment(VARIABLE, &number));
        let error = exec::run_instead(exec::Call {
            file: program.as_fd(),
            arguments: &arguments,
            environment: &environment,
        });
        format!("the program can't be run: {error}")
    }
}
