//! The existing front ends: what each of them asks for. [`session`](crate::session) has the order in
//! which each sends its messages.

use crate::connection::message::protocol;

/// A front end to play.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Profile {
    /// None that exists: everything once, in the specification's order, each message
    /// acknowledged.
    Simple,
    /// QEMU's `vhost-user-fs-pci`, as recorded from 10.0.2.
    Qemu,
    /// Cloud Hypervisor's `--fs`.
    CloudHypervisor,
    /// Dragonball, in Kata Containers.
    Dragonball,
    /// crosvm's vhost-user front end.
    Crosvm,
    /// libkrun's vhost-user device.
    Libkrun,
}

impl Profile {
    /// Every profile.
    pub const ALL: [Self; 6] = [
        Self::Simple,
        Self::Qemu,
        Self::CloudHypervisor,
        Self::Dragonball,
        Self::Crosvm,
        Self::Libkrun,
    ];

    /// The protocol features that the front end requests.
    #[must_use]
    pub fn protocol_features(self) -> u64 {
        match self {
            Self::Simple => {
                protocol::MQ
                    | protocol::REPLY_ACK
                    | protocol::CONFIG
                    | protocol::CONFIGURE_MEM_SLOTS
                    | protocol::INFLIGHT_SHMFD
                    | protocol::LOG_SHMFD
                    | protocol::DEVICE_STATE
                    | protocol::RESET_DEVICE
            }
            // It accepts all that it knows, whether the device has a use for it or not. STATUS is
            // left out: it would bring messages that no virtio-fs back end answers.
            Self::Qemu => {
                protocol::MQ
                    | protocol::LOG_SHMFD
                    | protocol::REPLY_ACK
                    | protocol::BACKEND_REQ
                    | protocol::BACKEND_SEND_FD
                    | protocol::HOST_NOTIFIER
                    | protocol::INFLIGHT_SHMFD
                    | protocol::RESET_DEVICE
                    | protocol::CONFIGURE_MEM_SLOTS
                    | protocol::SHARED_OBJECT
                    | protocol::DEVICE_STATE
            }
            Self::CloudHypervisor => {
                protocol::MQ
                    | protocol::CONFIGURE_MEM_SLOTS
                    | protocol::REPLY_ACK
                    | protocol::INFLIGHT_SHMFD
                    | protocol::LOG_SHMFD
                    | protocol::DEVICE_STATE
            }
            Self::Dragonball => protocol::MQ | protocol::REPLY_ACK,
            Self::Crosvm => {
                protocol::CONFIG
                    | protocol::MQ
                    | protocol::BACKEND_REQ
                    | protocol::DEVICE_STATE
                    | protocol::SHMEM
                    | protocol::REPLY_ACK
            }
            Self::Libkrun => protocol::CONFIG | protocol::MQ,
        }
    }

    /// The default size of its queues.
    #[must_use]
    pub fn queue_size(self) -> u16 {
        match self {
            Self::Qemu => 128,
            Self::Libkrun => 256,
            Self::Simple | Self::CloudHypervisor | Self::Dragonball => 1024,
            Self::Crosvm => 32768,
        }
    }
}
