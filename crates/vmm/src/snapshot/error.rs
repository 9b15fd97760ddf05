//! Why a state file is not used.

use thiserror::Error;

/// Why bytes are no snapshot, or a snapshot cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SnapshotError {
    /// The magic is not there.
    #[error("this is not a state file of offshoot's virtual machines")]
    NotAState,
    /// Written by a later offshoot.
    #[error(
        "the state has format {found} and this offshoot knows {known}; use the offshoot that built the template, or a newer one"
    )]
    NewerFormat {
        /// The file's.
        found: u32,
        /// This program's.
        known: u32,
    },
    /// Written by an offshoot whose format is no longer read.
    #[error("the state has format {found} and this offshoot reads {known}; build the template again")]
    OlderFormat {
        /// The file's.
        found: u32,
        /// This program's.
        known: u32,
    },
    /// Larger than any machine's.
    #[error("a state of {found} bytes is larger than any can be ({limit})")]
    TooLarge {
        /// Bytes there are.
        found: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The file does not end where it says.
    #[error("the state file is damaged: it has {found} bytes and says {said}; fetch or build the template again")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        said: u64,
    },
    /// Bits have changed.
    #[error("the state file is damaged: its checksum is wrong; fetch or build the template again")]
    Checksum,
    /// The checksum is right and the content is not.
    #[error("the state file is not one offshoot wrote: {0}")]
    Content(&'static str),
}

/// Why a machine cannot run here.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HostError {
    /// Another maker's processor.
    #[error("the template was made on a processor of {state}, this one is of {host}; build it here")]
    Vendor {
        /// The template's.
        state: String,
        /// This host's.
        host: String,
    },
    /// Another processor of the same maker.
    #[error("the template was made on processor model {state}, this one is {host}; build it here")]
    Model {
        /// The template's family and model.
        state: String,
        /// This host's.
        host: String,
    },
    /// The guest uses what this processor, or this kernel's KVM, does not have.
    #[error(
        "the guest was told of processor features that this host does not give (leaf {function:#x}.{index}, {register}: {missing:#010x}); \
         build the template here"
    )]
    Features {
        /// Leaf of CPUID.
        function: u32,
        /// Its sub-leaf.
        index: u32,
        /// Register.
        register: &'static str,
        /// The bits that are missing.
        missing: u32,
    },
    /// A part of KVM is missing.
    #[error(
        "the guest's state needs {0} of KVM, which this host's kernel lacks; use the kernel the template was made on, or a newer one"
    )]
    Capability(&'static str),
    /// A model specific register is unknown here.
    #[error(
        "the guest's state has the model specific register {0:#x}, which this host's KVM does not know; build the template here"
    )]
    Msr(u32),
    /// The vector state does not fit.
    #[error("the guest's extended processor state has {state} bytes, this host knows {host}; build the template here")]
    Xsave {
        /// Bytes in the state.
        state: usize,
        /// Bytes this host's KVM has.
        host: usize,
    },
    /// The memory does not belong to the state.
    #[error("the state is of a machine with {state} bytes of memory, and {given} are given")]
    Memory {
        /// The state's.
        state: u64,
        /// What was given.
        given: u64,
    },
    /// The number of vCPUs is another.
    #[error(
        "the state is of a machine with {state} vCPUs, and {given} are asked for; their number is a template's, not a fork's"
    )]
    Vcpus {
        /// The state's.
        state: u8,
        /// What was given.
        given: u8,
    },
}
