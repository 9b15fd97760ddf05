//! What goes over the wire: requests ([`create`]) and what is told of things ([`view`]).

pub(crate) mod create;
pub(crate) mod view;
