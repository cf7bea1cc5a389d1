//! The state machine: what a command does to a service. Pure: no clock, no I/O, no lock.
