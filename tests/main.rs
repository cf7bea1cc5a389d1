//! All integration tests, in one binary: files are named by what they prove.

mod clients;
mod docs;
mod process;
mod structure;
mod support;
