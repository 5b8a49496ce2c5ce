//! A session's options. Each front end has defaults of its own for what is left open.

use std::time::Duration;

use crate::connection::DEFAULT_TIMEOUT;
use crate::connection::message::{feature, protocol};
use crate::memory::Region;
use crate::profile::Profile;

/// The features that a virtio-fs driver and its front end accept by default.
const FEATURES: u64 =
    feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::PROTOCOL_FEATURES;

/// The default number of descriptors in one ring's indirect tables together.
const TABLE_BUDGET: u32 = 1 << 19;

/// Settings of a session.
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) request_queues: Option<u16>,
    pub(crate) queue_size: Option<u16>,
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    pub(crate) dax_window: bool,
    pub(crate) timeout: Duration,
    memory: Vec<Region>,
    indirect_capacity: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            request_queues: None,
            queue_size: None,
            features: FEATURES,
            protocol_features: u64::MAX,
            dax_window: false,
            timeout: DEFAULT_TIMEOUT,
            memory: Vec::new(),
            indirect_capacity: None,
        }
    }
}

impl Options {
    /// Request queues, not counting the high-priority one. By default 1, but as many as the back
    /// end has for crosvm (where this is ignored) and libkrun.
    #[must_use]
    pub fn request_queues(mut self, queues: u16) -> Self {
        self.request_queues = Some(queues);
        self
    }

    /// Entries of each queue. By default the front end's value.
    #[must_use]
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = Some(size);
        self
    }

    /// The features to accept where they are offered, instead of VERSION_1, EVENT_IDX,
    /// INDIRECT_DESC and PROTOCOL_FEATURES.
    #[must_use]
    pub fn features(mut self, features: u64) -> Self {
        self.features = features;
        self
    }

    /// Features not to accept.
    #[must_use]
    pub fn without_features(mut self, features: u64) -> Self {
        self.features &= !features;
        self
    }

    /// Protocol features not to ask for, though the front end does.
    #[must_use]
    pub fn without_protocol_features(mut self, features: u64) -> Self {
        self.protocol_features &= !features;
        self
    }

    /// The regions of the guest's memory. By default 16 MiB at 0 and 512 MiB at 4 GiB.
    #[must_use]
    pub fn memory(mut self, regions: &[Region]) -> Self {
        self.memory = regions.to_vec();
        self
    }

    /// Descriptors in each slot's indirect table. By default 288 (1 MiB in pages, and the
    /// headers) for rings up to 1024 entries and fewer for larger ones, but no more than the ring
    /// has entries: longer chains are against the specification (virtio 1.2, 2.7.5.3.1).
    #[must_use]
    pub fn indirect_capacity(mut self, descriptors: u16) -> Self {
        self.indirect_capacity = Some(descriptors);
        self
    }

    /// Whether Dragonball has a cache window, for which it asks for a socket for the back end's
    /// requests, or whether `Simple` has shared memory. crosvm always asks for it.
    #[must_use]
    pub fn dax_window(mut self, on: bool) -> Self {
        self.dax_window = on;
        self
    }

    /// How long a reply of the back end may take.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        if self.memory.is_empty() {
            vec![Region::new(0, 16 << 20), Region::new(4 << 30, 512 << 20)]
        } else {
            self.memory.clone()
        }
    }

    pub(crate) fn table_capacity(&self, queue_size: u16) -> u16 {
        let share = TABLE_BUDGET / u32::from(queue_size.max(1));
        let share = u16::try_from(share.clamp(4, 288)).unwrap_or(288);
        self.indirect_capacity.unwrap_or(share.min(queue_size))
    }

    /// The protocol features that the front end requests.
    pub(crate) fn asked(&self, profile: Profile) -> u64 {
        let dax = match profile {
            Profile::Dragonball if self.dax_window => {
                protocol::BACKEND_REQ | protocol::BACKEND_SEND_FD
            }
            Profile::Simple if self.dax_window => {
                protocol::BACKEND_REQ | protocol::BACKEND_SEND_FD | protocol::SHMEM
            }
            _ => 0,
        };
        (profile.protocol_features() | dax) & self.protocol_features
    }
}
