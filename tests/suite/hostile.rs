//! Attacks by a hostile guest or VMM, kind by kind; `docs/hostile-guest.md` has the table.
//!
//! Each kind is a named case. After each the reply is checked, and then that the same session
//! (after a VMM's fault: the next one) is served as usual.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]
#![allow(unreachable_pub, reason = "one program, of several files")]

mod bounds;
mod faults;
mod messages;
mod names;
mod numbers;
mod rings;
mod scene;
mod sessions;
mod taken;

use bounds::{
    half_read_directories_are_bounded, inodes_beyond_the_bound_are_enfile,
    locks_beyond_the_bound_are_enolck, open_files_beyond_the_bound_are_enfile,
    waiting_locks_are_bounded, what_is_remembered_gives_way_to_what_is_known,
};
use messages::{messages_end_their_session_alone, stalled_eventfds_keep_nobody};
use names::{names_lead_nowhere, names_that_change_while_they_are_read_lead_nowhere};
use numbers::{headers_and_numbers_get_an_errno, unknown_things_get_an_errno};
use rings::{
    chains_are_refused_one_by_one, indexes_that_jump_take_nothing, rings_that_overlap_hurt_nobody,
    without_indirect_descriptors_none_is_followed,
};
use sessions::{
    init_again_begins_anew_whatever_is_under_way, sessions_begin_and_end_only_by_init_and_destroy,
};
use taken::{
    a_log_that_is_taken_away_ends_the_session, memory_that_is_taken_away_ends_the_session,
    what_is_in_flight_may_be_taken_away_too,
};

on_both_runtimes!(
    a_log_that_is_taken_away_ends_the_session,
    chains_are_refused_one_by_one,
    half_read_directories_are_bounded,
    headers_and_numbers_get_an_errno,
    indexes_that_jump_take_nothing,
    init_again_begins_anew_whatever_is_under_way,
    inodes_beyond_the_bound_are_enfile,
    locks_beyond_the_bound_are_enolck,
    memory_that_is_taken_away_ends_the_session,
    messages_end_their_session_alone,
    names_lead_nowhere,
    names_that_change_while_they_are_read_lead_nowhere,
    open_files_beyond_the_bound_are_enfile,
    rings_that_overlap_hurt_nobody,
    sessions_begin_and_end_only_by_init_and_destroy,
    stalled_eventfds_keep_nobody,
    unknown_things_get_an_errno,
    waiting_locks_are_bounded,
    without_indirect_descriptors_none_is_followed,
    what_is_in_flight_may_be_taken_away_too,
    what_is_remembered_gives_way_to_what_is_known,
);
