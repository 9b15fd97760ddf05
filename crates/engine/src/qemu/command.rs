//! QEMU's command line.
//!
//! A template and its forks must describe the same machine: the device state of one is loaded into the other. What both
//! share is built by one function, and only what may differ is added by the callers.

use std::{
    ffi::OsString,
    os::fd::{AsRawFd, RawFd},
};

use vmm::config::NETWORK_MAC;

use crate::{
    Accel, Machine, NetworkEnd,
    machine_dir::{CONTROL_CHANNELS, KERNEL_COMMAND_LINE},
};

/// Numbers of descriptors that the process inherits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fds {
    /// Listening monitor socket.
    pub(super) monitor: RawFd,
    /// The ack port's pipe, for writing. A file as QEMU sees it, so always open: a port that is open at the capture and
    /// not at the load costs the guest control messages in its first milliseconds (measured: 5 ms of 12).
    pub(super) ack: RawFd,
    /// Root image, opened for reading only.
    pub(super) root_image: RawFd,
    /// `O_PATH` of the directory that holds the memory file.
    pub(super) memory_dir: RawFd,
    /// Listening sockets of the control channels.
    pub(super) channels: [RawFd; CONTROL_CHANNELS],
}

/// The card's optional parts, all left out: a guest is captured with what the card and its driver have agreed on, and a fork's must offer
/// the same whatever it is connected to. Without offloads neither side leaves checksums or cutting to the other.
const CARD_WITHOUT: &str = "csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,guest_announce=off,\
    host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,mrg_rxbuf=off,status=off,mq=off,ctrl_vq=off,ctrl_rx=off,ctrl_vlan=off,\
    ctrl_rx_extra=off,ctrl_mac_addr=off,ctrl_guest_offloads=off";

/// How the memory file is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemoryUse {
    /// Written through: the template's own machine.
    Shared,
    /// Mapped copy-on-write; opened for writing all the same (QEMU before 8.2 knows no other way).
    Private,
    /// Mapped copy-on-write and opened for reading only (QEMU 8.2 and later).
    PrivateReadOnly,
}

/// A command line under construction.
#[derive(Debug, Default)]
pub(super) struct CommandLine(Vec<OsString>);

impl CommandLine {
    /// What template and fork have in common.
    pub(super) fn machine(
        machine: Machine,
        accel: Accel,
        memory: MemoryUse,
        memory_name: &str,
        fds: Fds,
        network: Option<NetworkEnd<'_>>,
    ) -> Self {
        let mut line = Self::default();
        line.option("-M", "microvm,acpi=on,pit=on,pic=off,rtc=on,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off,pcie=off,usb=off,memory-backend=mem,mem-merge=off");
        match accel {
            Accel::Kvm => line.option("-accel", "kvm"),
            Accel::Tcg => line.option("-accel", "tcg,thread=multi,tb-size=32"),
        }
        line.option("-cpu", if accel == Accel::Kvm { "host" } else { "max,x2apic=off" });
        line.option("-smp", &machine.vcpus.to_string());
        line.option("-m", &format!("{}K", machine.memory_bytes / 1024));
        let sharing = match memory {
            MemoryUse::Shared => "share=on",
            MemoryUse::Private => "share=off",
            MemoryUse::PrivateReadOnly => "share=off,readonly=on,rom=off",
        };
        line.option(
            "-object",
            &format!(
                "memory-backend-file,id=mem,{sharing},mem-path=/proc/self/fd/{}/{memory_name},size={}K",
                fds.memory_dir,
                machine.memory_bytes / 1024
            ),
        );
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            line.flag(flag);
        }
        line.option("-display", "none");
        line.option("-bios", "qboot.rom");
        line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        line.option("-chardev", &format!("socket,id=monitor,fd={},server=on,wait=off", fds.monitor));
        line.option("-mon", "chardev=monitor,mode=control");
        line.option("-global", "migration.x-events=on");
        // After a load QEMU would tell the network, in the template's name, where its card is now.
        line.option("-global", "migration.announce-rounds=0");

        line.option("-device", "virtio-serial-device,id=ports,max_ports=16");
        line.option("-add-fd", &format!("fd={},set=3,opaque=ack", fds.ack));
        line.option("-chardev", "file,id=ack,path=/dev/fdset/3,append=on");
        line.option("-device", "virtserialport,bus=ports.0,chardev=ack,name=offshoot.ack,nr=1");
        for (channel, fd) in fds.channels.iter().enumerate() {
            line.option("-chardev", &format!("socket,id=ctl{channel},fd={fd},server=on,wait=off"));
            line.option(
                "-device",
                &format!(
                    "virtserialport,bus=ports.0,chardev=ctl{channel},name=offshoot.ctl.{channel},nr={}",
                    channel + 2
                ),
            );
        }
        line.option("-add-fd", &format!("fd={},set=1,opaque=root", fds.root_image));
        line.option(
            "-blockdev",
            "driver=raw,node-name=root,read-only=on,file.driver=file,file.filename=/dev/fdset/1,file.locking=off",
        );
        line.option("-device", "virtio-blk-device,drive=root");
        if machine.network {
            line.card(network);
        }
        line
    }

    /// The network card, connected to nothing or to this. It is made last: where the other devices are does not depend on it.
    fn card(&mut self, network: Option<NetworkEnd<'_>>) {
        match network {
            None => {}
            // Whether its frames have virtio headers QEMU asks the tap.
            Some(NetworkEnd::Tap(fd)) => self.option("-netdev", &format!("tap,id=net,fd={}", fd.as_raw_fd())),
            // Not `stream`, which speaks the same: that connects in a thread of its own, some time after the start, and until then it drops
            // what a guest sends.
            Some(NetworkEnd::Stream(fd)) => self.option("-netdev", &format!("socket,id=net,fd={}", fd.as_raw_fd())),
        }
        let mac = NETWORK_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let end = if network.is_some() { ",netdev=net" } else { "" };
        self.option("-device", &format!("virtio-net-device,mac={mac},{CARD_WITHOUT}{end}"));
    }

    /// What only a template's first boot needs.
    pub(super) fn boot(mut self, kernel: RawFd, initramfs: Option<RawFd>, console: RawFd, extra: &str) -> Self {
        self.option("-kernel", &format!("/proc/self/fd/{kernel}"));
        if let Some(initramfs) = initramfs {
            self.option("-initrd", &format!("/proc/self/fd/{initramfs}"));
        }
        self.option("-append", &[KERNEL_COMMAND_LINE, extra.trim()].join(" "));
        self.option("-add-fd", &format!("fd={console},set=2,opaque=console"));
        self.option("-chardev", "file,id=console,path=/dev/fdset/2");
        self.option("-serial", "chardev:console");
        self
    }

    /// What only a fork needs: it starts stopped, and waits to be told where its state is. The kernel is in memory by now.
    /// Its console goes to a ring in memory: a file would let a guest fill the host's disk.
    ///
    /// The state of a fork that was captured while it ran begins without the section that says how it was sent.
    pub(super) fn restore(mut self, of_fork: bool) -> Self {
        if of_fork {
            self.option("-global", "migration.send-configuration=off");
        }
        self.flag("-S");
        self.option("-incoming", "defer");
        self.option("-chardev", "ringbuf,id=console,size=65536");
        self.option("-serial", "chardev:console");
        self
    }

    pub(super) fn into_args(self) -> Vec<OsString> {
        self.0
    }

    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn option(&mut self, option: &str, value: &str) {
        self.0.push(option.into());
        self.0.push(value.into());
    }
}
