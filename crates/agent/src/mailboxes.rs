//! Mailboxes of guest software (being written).
