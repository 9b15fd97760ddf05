//! Verbs about templates.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use host::network::Mode;
use identity::Tag;

use crate::values;

/// `build`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot build python --tag py
  offshoot build busybox --tag tiny --memory 128M
  offshoot build ./my-recipe --tag web --vcpus 2
  offshoot build ./rootfs.tar --tag mine        a root file system of your own")]
pub struct Build {
    /// A recipe by name (python, browser, busybox), a recipe's folder, or a root file system (folder, tar, OCI layout)
    #[arg(value_name = "RECIPE|DIR")]
    pub recipe: String,
    /// Name of the template; one that exists is never replaced (see rmi)
    #[arg(long, value_name = "TAG")]
    pub tag: Tag,
    /// Refuse a template in which the audit finds secrets, connections, unseeded randomness… (else they are warnings)
    #[arg(long)]
    pub strict: bool,
    /// Guest memory, for example 512M or 1G [default: the recipe's]
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub memory: Option<u64>,
    /// Virtual CPUs [default: the recipe's]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Guest kernel; with it come the modules installed for it, or those in a folder `modules` beside it [default: the distribution's, unpacked into the cache]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// What runs the template and its forks [default: kvm where a probe shows that it works, else qemu]
    #[arg(long, value_name = "ENGINE", env = "OFFSHOOT_ENGINE", hide_env_values = true)]
    pub engine: Option<EngineArg>,
    /// What executes the guest [default: kvm where a probe shows that it works, else tcg]
    #[arg(long, value_name = "ACCEL")]
    pub accel: Option<AccelArg>,
}

/// What runs a template and its forks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    /// offshoot's own machine monitor; needs hardware virtualisation
    Kvm,
    /// QEMU from the distribution
    Qemu,
}

/// What executes the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AccelArg {
    /// Hardware virtualisation
    Kvm,
    /// Emulation
    Tcg,
}

/// `rmi`
#[derive(Debug, Args)]
#[command(after_help = "Forks that were made of it live on.\n\nExample:\n  offshoot rmi py")]
pub struct Rmi {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
}

/// Verbs about one template.
#[derive(Debug, Args)]
pub struct OfTemplate {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
}

/// `verify`
#[derive(Debug, Args)]
#[command(after_help = "\
Compares everything that must differ: all pairs of forks, and each fork with the template.
Exit code 1 if any two share anything. The forks are removed again.")]
pub struct Verify {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
    /// How many forks to compare
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 3, allow_negative_numbers = true)]
    pub count: usize,
}

/// `bench`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  offshoot bench py -n 1,10,50 --rounds 5")]
pub struct Bench {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
    /// How many at once, one or more numbers
    #[arg(short = 'n', long = "at-once", value_name = "N,N…", value_delimiter = ',', default_value = "1,10",
          value_parser = values::at_least_one, allow_negative_numbers = true)]
    pub at_once: Vec<usize>,
    /// Rounds of each
    #[arg(long, value_name = "R", default_value = "5", value_parser = values::at_least_one, allow_negative_numbers = true)]
    pub rounds: usize,
    /// What the network cards lead to [default: as `fork`]
    #[arg(long, value_name = "none|user|tap", env = "OFFSHOOT_NETWORK", hide_env_values = true)]
    pub network: Option<Mode>,
}

/// `pool`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot pool py 4      four machines with the template loaded, stopped, without identity
  offshoot pool           what is ready
  offshoot pool py 0      end them

A fork takes one if there is one, and another is started after it. A fork with --memory-limit
or --cpus starts a machine of its own.")]
pub struct Pool {
    /// The template [default: show all pools]
    #[arg(value_name = "TAG")]
    pub tag: Option<Tag>,
    /// How many to keep ready; 0 ends them [default: show the pool]
    #[arg(value_name = "SIZE")]
    pub size: Option<usize>,
    /// What their network cards lead to; only forks that ask for the same use them [default: as `fork`]
    #[arg(long, value_name = "none|tap", env = "OFFSHOOT_NETWORK", hide_env_values = true)]
    pub network: Option<Mode>,
    /// Fill the pool up to its size, unless somebody does already, and print nothing
    #[arg(long, hide = true, requires = "tag", conflicts_with = "size")]
    pub fill: bool,
}
